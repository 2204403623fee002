"""Data parallelism: what the processes of a run tell each other. A process alone has nobody to ask.

A process samples, searches and trains on prompts of its own, so its number of forward passes is its own too. That is
why gradients are added up once, after the last of them, and not layer by layer as DistributedDataParallel does: a
process without anything to train on then only adds zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

BUCKET_ELEMENTS = 1 << 24  # of gradients in one message
SUMMED = ("num_", "trained_rows")  # metrics that count something; all others are means

T = TypeVar("T")


class Ranks:
    """Process `index` of `count`. Every process must make the same calls in the same order."""

    def __init__(self, index: int, count: int, device: torch.device) -> None:
        self.index, self.count, self.device = index, count, device

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.add(total)
        return total.tolist()

    def add(self, tensor: torch.Tensor) -> None:
        """Adds a tensor up over the processes, in place."""
        if self.count > 1:
            with self._talking():
                dist.all_reduce(tensor)

    def gather(self, own: T) -> list[T]:
        """What every process passes, in their order."""
        if self.count == 1:
            return [own]
        with self._talking():
            everyone: list[T] = gather_object([own])
        return everyone

    def share(self, values: Sequence[T]) -> list[T]:
        """This process's part of what all of them hold: every `count`-th value."""
        return list(values[self.index :: self.count])

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds the gradients up; a parameter that has none in any process still has none.

        Those of parameters in shards are left alone: FSDP has added them up.
        """
        if self.count == 1:
            return
        wanted = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        reached = self.sum([float(p.grad is not None) for p in wanted])
        for bucket in _buckets([p for p, number in zip(wanted, reached) if number > 0]):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            self.add(flat)
            for p, gradient in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad = gradient.view_as(p)

    def merge_metrics(self, own: dict[str, float]) -> dict[str, float]:
        """Counts added up; everything else as the mean over the processes that have it."""
        everyone = self.gather(own)
        merged = {}
        for name in dict.fromkeys(name for metrics in everyone for name in metrics):
            values = [metrics[name] for metrics in everyone if name in metrics]
            merged[name] = sum(values) / (1 if name.startswith(SUMMED) else len(values))
        return merged

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Says what to do when a process has died; the backend says "Connection closed by peer" only."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.index} of {self.count} lost contact with the others, so one of them has probably "
                f"ended: its own output says why, and the same command goes on from the last checkpoint ({error})"
            ) from error


ALONE = Ranks(0, 1, torch.device("cpu"))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one type, each of about `BUCKET_ELEMENTS` elements."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_ELEMENTS
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def merge_pending(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The minibatches and forests of several processes as those of one: `pending` and `forest` of a checkpoint."""
    pending: list[list[dict[str, Any]]] = [[] for _ in range(max((len(s["pending"]) for s in states), default=0))]
    forest: list[tuple[int, int, list[int]]] = []
    pairs = 0
    for state in states:
        nodes, first_pair = len(forest), pairs
        forest += [(p if p == -1 else p + nodes, start, tokens) for p, start, tokens in state["forest"]]
        for place, batch in enumerate(state["pending"]):
            for row in batch:
                node = None if row["node"] is None else row["node"] + nodes
                pair = None if row["pair"] is None else row["pair"] + first_pair
                pairs = max(pairs, 0 if pair is None else pair + 1)
                pending[place].append({**row, "node": node, "pair": pair})
    return {"pending": pending, "forest": forest}
