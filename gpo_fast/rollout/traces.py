"""Marks of finished branches, from which later requests fork without looking their prefix up."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gpo_fast._C import PrefixCache


class Trace(NamedTuple):
    """A finished branch: a mark at the end of what was computed of it, and those tokens (int32)."""

    mark: int
    tokens: np.ndarray


class Traces:
    """The kept branches of an engine. Their pages are held until they are dropped: the oldest first, or all."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._kept: dict[int, Trace] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, sequences: list[int], tokens: list[np.ndarray]) -> list[int]:
        """Marks each sequence at the end of its computed tokens; returns their handles."""
        marks = self._cache.mark(sequences, [len(t) for t in tokens]).tolist() if sequences else []
        handles = list(range(self._next, self._next + len(marks)))
        self._kept.update(zip(handles, map(Trace, marks, tokens)))
        self._next += len(marks)
        return handles

    def mark_of(self, handle: int | None, tokens: np.ndarray) -> int | None:
        """The mark to fork tokens[:-1] from; None if the trace is gone or does not start with them."""
        trace = self._kept.get(handle) if handle is not None else None
        shared = len(tokens) - 1
        if trace is None or len(trace.tokens) < shared or not np.array_equal(trace.tokens[:shared], tokens[:shared]):
            return None
        return trace.mark

    def drop_oldest(self) -> bool:
        """Gives back the pages of the trace that was kept first; False if there is none."""
        if not self._kept:
            return False
        self._cache.release([self._kept.pop(next(iter(self._kept))).mark])
        return True

    def clear(self) -> None:
        """Drops all."""
        self._cache.release([trace.mark for trace in self._kept.values()])
        self._kept.clear()
