"""Which keys each row of a step sees, with shared ones named once: the input of the attention kernels.

A segment is a list of pages and the rows that see its first `visible` keys. A running sequence sees the groups of the
prefix cache's plan that it is in (the prompt, the trajectory up to a cut, ...) and its private tail; a row of a prompt
that is being prefilled sees the keys up to its own position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Segments:
    """int32 arrays in compressed-row form: S segments of pages, of rows, and of keys that each row sees."""

    page_offsets: np.ndarray  # [S + 1]
    pages: np.ndarray
    row_offsets: np.ndarray  # [S + 1]
    rows: np.ndarray
    visible: np.ndarray

    @property
    def saved_keys(self) -> int:
        """Keys that need not be read because a segment holds them for several rows."""
        counts = np.diff(self.row_offsets)
        starts = self.row_offsets[:-1][counts > 0]
        return int(self.visible.sum() - np.maximum.reduceat(self.visible, starts).sum()) if len(starts) else 0


def shared_segments(plan: Any, lengths: np.ndarray) -> Segments:
    """The groups of a SharedPlan, each read once for all its rows, then the tails of its sequences."""
    rows = np.arange(len(lengths), dtype=np.int32)
    return Segments(
        np.concatenate([plan.page_offsets, plan.tail_offsets[1:] + plan.page_offsets[-1]]),
        np.concatenate([plan.pages, plan.tail_pages]),
        np.concatenate([plan.row_offsets, rows + (plan.row_offsets[-1] + 1)]),
        np.concatenate([plan.rows, rows]),
        np.concatenate([np.repeat(plan.group_lengths, np.diff(plan.row_offsets)), lengths - plan.tail_starts]),
    )


def private_segments(tables: np.ndarray, lengths: np.ndarray, block_size: int) -> Segments:
    """One segment for each sequence, from block tables [sequences, pages]: nothing is read for several rows."""
    counts = -(-lengths // block_size)
    rows = np.arange(len(lengths) + 1)
    return Segments(
        np.concatenate([[0], np.cumsum(counts)]),
        tables[np.arange(tables.shape[1]) < counts[:, None]],
        rows,
        rows[:-1],
        lengths,
    )


def chunk_segment(pages: np.ndarray, first_row: int, first: int, stop: int) -> Segments:
    """The tokens [first, stop) of one prompt: row i sees the keys up to its own position."""
    count = stop - first
    return Segments(
        np.array([0, len(pages)]),
        pages,
        np.array([0, count]),
        np.arange(first_row, first_row + count),
        np.arange(first + 1, stop + 1),
    )


def concatenate(parts: list[Segments]) -> Segments:
    """All segments of the parts, in order."""

    def offsets(arrays: list[np.ndarray]) -> np.ndarray:
        starts = np.cumsum([0, *(int(a[-1]) for a in arrays)])
        return np.concatenate([[0], *(a[1:] + start for a, start in zip(arrays, starts))]).astype(np.int32)

    def joined(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays).astype(np.int32)

    return Segments(
        offsets([p.page_offsets for p in parts]),
        joined([p.pages for p in parts]),
        offsets([p.row_offsets for p in parts]),
        joined([p.rows for p in parts]),
        joined([p.visible for p in parts]),
    )
