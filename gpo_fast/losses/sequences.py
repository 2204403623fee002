"""What the losses share: their result, sums over sequences, counts and means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LossOutput:
    """A loss and what was seen on the way. Everything but `loss` is detached."""

    loss: Tensor  # scalar
    logprobs: Tensor  # the shape of targets, float32, 0 where ignored
    entropy: Tensor | None  # the shape of targets, nats, 0 where ignored
    metrics: dict[str, Tensor]  # scalars


@dataclass(frozen=True)
class Sequences:
    """Which sequence each of T rows belongs to. Sums over sequences are deterministic on every device."""

    ids: Tensor  # (T,) ascending
    offsets: Tensor  # (S + 1,)

    @property
    def count(self) -> int:
        return self.offsets.shape[0] - 1

    def sum(self, values: Tensor) -> Tensor:
        """(T,) -> (S,)."""
        return torch.segment_reduce(values, "sum", offsets=self.offsets, initial=0.0)

    def at(self, index: Tensor) -> Sequences:
        """The sequences of some rows, numbered anew: those that have none of the rows are left out."""
        ids, counts = torch.unique_consecutive(self.ids[index], return_inverse=True, return_counts=True)[1:]
        return Sequences(ids, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def sequences_of(targets: Tensor, sequence_ids: Tensor | None) -> Sequences:
    """The sequences of targets (B, T), or of flat targets (T,) with `sequence_ids` (default: one sequence)."""
    if targets.dim() == 2:
        if sequence_ids is not None:
            raise ValueError("sequence_ids belong to flat rows: with targets (B, T) each row is a sequence")
        count, length = targets.shape
        ids = torch.arange(count, device=targets.device).repeat_interleave(length)
        return Sequences(ids, torch.arange(count + 1, device=targets.device) * length)
    if sequence_ids is None:
        return Sequences(torch.zeros_like(targets), torch.tensor([0, targets.shape[0]], device=targets.device))
    if sequence_ids.shape != targets.shape or sequence_ids.dtype != torch.int64:
        raise ValueError(
            f"sequence_ids must be int64 of the shape {tuple(targets.shape)} of targets, got "
            f"{sequence_ids.dtype} {tuple(sequence_ids.shape)}"
        )
    if targets.shape[0] == 0:
        return Sequences(sequence_ids, torch.zeros(1, dtype=torch.int64, device=targets.device))
    if int(sequence_ids[0]) < 0 or bool((sequence_ids.diff() < 0).any()):
        raise ValueError("sequence_ids must be ascending and not negative: sort the rows by sequence")
    count = int(sequence_ids[-1]) + 1
    edges = torch.arange(count + 1, device=targets.device)
    return Sequences(sequence_ids, torch.searchsorted(sequence_ids.contiguous(), edges))


def count_or(given: float | Tensor | None, counted: Tensor, like: Tensor, name: str) -> Tensor:
    """A normaliser as a scalar tensor; a batch without tokens has the loss 0, not NaN."""
    if given is None:
        return counted.to(device=like.device, dtype=like.dtype).clamp(min=1.0)
    value = torch.as_tensor(given, device=like.device, dtype=like.dtype)
    if value.dim() != 0 or not bool(value > 0):
        raise ValueError(f"{name} must be one positive number, got {given}")
    return value


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
