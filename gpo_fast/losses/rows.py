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

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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
