"""What goes into a pass over the vocabulary and what comes out of it: the contract of every path.

With z the logits of a row, p = softmax(z), y a target of the row and c = d z / d raw (1 / temperature, times
the slope of the soft-cap):

    logprob = z_y - lse(z)             d logprob / d raw_v = (1[v = y] - p_v) c_v
    entropy = lse(z) - sum_v p_v z_v   d entropy / d raw_v = -p_v (z_v - sum_u p_u z_u) c_v

A forward pass keeps, on request, the unscaled rows that a frozen head needs for its backward: nothing is then
recomputed, whatever the loss does with the log-probabilities. A row's own targets are left out of these sums and
added in the backward with the weight p_y - 1 in full precision: where p_y is almost 1, the difference
W_y - sum_v p_v W_v would otherwise be nothing but rounding error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gpo_fast.losses.head import Head, wide_dtype


@dataclass(frozen=True)
class Batch:
    """N rows, each with one target or more, and the K targets.

    A target outside [0, V), as it occurs where the head is a shard of the vocabulary, gets the logit -inf.
    """

    hidden: Tensor  # (N, H)
    extra: Tensor | None  # (N, r), the input of the adapter on the head
    targets: Tensor  # (K,)
    target_rows: Tensor  # (K,) ascending

    @property
    def count(self) -> int:
        return self.hidden.shape[0]

    def first_entries(self) -> Tensor:
        """(N + 1,): the entries of row t are those from [t] to [t + 1]."""
        return first_entries(self.target_rows, self.count)


@dataclass(frozen=True)
class ForwardWants:
    """What a forward pass computes beside the log-sum-exp. `entropy_row` needs `expected`."""

    entropy: bool = False
    expected: bool = False
    entropy_row: bool = False


class Rows(NamedTuple):
    """What the forward pass knows of N rows and K targets, in the wide dtype; the last two in that of `hidden`."""

    target_logits: Tensor  # (K,)
    target_slopes: Tensor  # (K,)  d z / d raw at the target
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,)  meaningless unless wanted
    expected: Tensor | None  # (N, H)  sum of p_v c_v W_v over all v but the row's targets
    entropy_row: Tensor | None  # (N, H)  sum of p_v (z_v - mean) c_v W_v over all v but the row's targets


@dataclass(frozen=True)
class OutputGradients:
    """d loss / d outputs, in the wide dtype."""

    logprobs: Tensor  # (K,)
    entropy: Tensor | None  # (N,)


@dataclass(frozen=True)
class GradientWants:
    """Which gradients a backward pass computes."""

    hidden: bool
    weight: bool
    bias: bool
    extra: bool
    lora_b: bool


class Gradients(NamedTuple):
    """Gradients of the inputs in their dtypes, None where not wanted."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    extra: Tensor | None = None
    lora_b: Tensor | None = None


@dataclass(frozen=True)
class Totals:
    """Gradients while they are summed; None where not wanted."""

    hidden: Tensor | None = None  # (N, H)
    weight: Tensor | None = None
    bias: Tensor | None = None
    extra: Tensor | None = None  # (N, r)
    lora_b: Tensor | None = None

    @classmethod
    def of_head(cls, head: Head, wants: GradientWants, *, narrow: bool = False) -> Totals:
        """Zeros for the head's parameters, in the wide dtype or, with `narrow`, in their own."""

        def zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
            if like is None or not wanted:
                return None
            return torch.zeros_like(like, dtype=like.dtype if narrow else wide_dtype(like.dtype))

        return cls(
            weight=zeros(head.weight, wants.weight),
            bias=zeros(head.bias, wants.bias),
            lora_b=zeros(head.lora_b, wants.lora_b),
        )

    def with_rows(self, batch: Batch, wants: GradientWants) -> Totals:
        """The same sums, and zeros in the wide dtype for the rows of a batch."""

        def zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
            return None if like is None or not wanted else torch.zeros_like(like, dtype=wide_dtype(like.dtype))

        return replace(self, hidden=zeros(batch.hidden, wants.hidden), extra=zeros(batch.extra, wants.extra))

    def of_rows(self, rows: slice) -> Totals:
        """The same sums, for some of the rows."""
        return replace(
            self,
            hidden=None if self.hidden is None else self.hidden[rows],
            extra=None if self.extra is None else self.extra[rows],
        )

    def gradients(self, head: Head) -> Gradients:
        """The sums in the dtypes of what they are gradients of."""

        def cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if gradient is None or like is None else gradient.to(like.dtype)

        return Gradients(
            cast(self.hidden, head.weight),
            cast(self.weight, head.weight),
            cast(self.bias, head.bias),
            cast(self.extra, head.weight),
            cast(self.lora_b, head.lora_b),
        )


def first_entries(target_rows: Tensor, count: int) -> Tensor:
    """(N + 1,): the entries of row t are those from [t] to [t + 1] of the ascending target_rows (K,)."""
    edges = torch.arange(count + 1, device=target_rows.device)
    return torch.searchsorted(target_rows.contiguous(), edges)


def row_sums(values: Tensor, first: Tensor) -> Tensor:
    """(K,) -> (N,): sums over each row's entries, in their order on every device."""
    return torch.segment_reduce(values, "sum", offsets=first, initial=0.0)


def target_shares(rows: Rows, target_rows: Tensor, output_gradients: OutputGradients, row_gradients: Tensor) -> Tensor:
    """d loss / d raw logit at each target (K,), given the sum of each row's logprob gradients (N,)."""
    logprobs = rows.target_logits - rows.lse[target_rows]
    prob = torch.exp(logprobs)
    share = output_gradients.logprobs - row_gradients[target_rows] * prob
    if output_gradients.entropy is not None:
        centred = (logprobs + rows.entropy[target_rows]).nan_to_num(neginf=0.0)
        share = share - output_gradients.entropy[target_rows] * prob * centred
    return share * rows.target_slopes
