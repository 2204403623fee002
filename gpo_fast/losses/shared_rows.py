"""Loss tokens that share rows of hidden states, as the branches of a packed forest do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpo_fast.losses.head import IGNORED
from gpo_fast.losses.linear_logprob import HeadInputs, Prepared, prepare, two_passes


class SharedRows(NamedTuple):
    """Which distinct (row, target) pair each of T loss tokens is.

    Row r of hidden (R, H) has the targets[row_offsets[r]:row_offsets[r + 1]], distinct within the row.
    """

    targets: Tensor  # int64 (K,)
    row_offsets: Tensor  # int64 (R + 1,)
    pair_of_token: Tensor  # int64 (T,)

    def row_of_token(self) -> Tensor:
        """int64 (T,): the row of hidden that each loss token belongs to."""
        rows = torch.arange(len(self.row_offsets) - 1, device=self.row_offsets.device)
        row_of_pair = torch.repeat_interleave(rows, self.row_offsets.diff(), output_size=self.targets.shape[0])
        return row_of_pair[self.pair_of_token]


def prepare_tokens(hidden: Tensor, targets: Tensor, head: HeadInputs, shared: SharedRows | None) -> Prepared:
    """The rows and the distinct targets of loss tokens.

    Args:
        hidden: (R, H) with `shared`, where `targets` is (T,); otherwise as `linear_logprob` takes it.
        targets: -100 where ignored.

    Raises:
        ValueError: `shared` does not fit `targets`.
    """
    if shared is None:
        return prepare(hidden, targets, head)
    if shared.pair_of_token.shape != targets.shape:
        raise ValueError(
            f"shared.pair_of_token must have the shape {tuple(targets.shape)} of targets, got "
            f"{tuple(shared.pair_of_token.shape)}"
        )
    return prepare(hidden, shared.targets, head, row_offsets=shared.row_offsets)


def token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: HeadInputs,
    shared: SharedRows | None,
    *,
    want_entropy: bool,
    entropy_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the shape of `targets`; each pair is computed once.

    Args:
        hidden, targets, head, shared: as in `prepare_tokens`, which may raise.
        want_entropy, entropy_needs_grad: of `logprobs_and_entropy`.
    """
    logprobs, entropy = tokens_in_two_passes(
        prepare_tokens(hidden, targets, head, shared),
        targets,
        shared,
        want_entropy=want_entropy,
        entropy_needs_grad=entropy_needs_grad,
    )
    return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)


def tokens_in_two_passes(
    prepared: Prepared, targets: Tensor, shared: SharedRows | None, *, want_entropy: bool, entropy_needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` (T,) of what `prepare_tokens` gave."""
    logprobs, entropies = two_passes(prepared, want_entropy=want_entropy, entropy_needs_grad=entropy_needs_grad)
    if shared is None:
        return logprobs, entropies
    kept = targets != IGNORED
    return (
        torch.where(kept, logprobs[shared.pair_of_token], 0.0),
        torch.where(kept, entropies[shared.row_of_token()], 0.0),
    )
