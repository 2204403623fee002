"""Which keys each row of a step sees, with shared ones named once: the input of the attention kernels.

A segment is a list of pages and the rows that see its first `visible` keys. A running sequence sees the groups that
it is in (the prompt, the trajectory up to a cut, ...) and its private tail; a row of a prompt that is being prefilled
sees the keys up to its own position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# A group is read once instead of once for each of its rows: (rows - 1) * tokens reads are saved, and each row's parts
# must be merged. Below this many, sharing was measured to cost more than it saves.
LEAST_SAVED_KEYS = 64


@dataclass
class Segments:
    """int32 arrays in compressed-row form: S segments of pages, of rows, and of keys that each row sees."""

    page_offsets: np.ndarray  # [S + 1]
    pages: np.ndarray
    row_offsets: np.ndarray  # [S + 1]
    rows: np.ndarray
    visible: np.ndarray


@dataclass
class SharedGroups:
    """Groups of sequences with equal leading pages, at all levels, and where each sequence's private tail starts."""

    lengths: list[int]  # tokens of each group, whole pages
    pages: list[np.ndarray]
    rows: list[np.ndarray]
    tail_starts: np.ndarray  # int64 [sequences], tokens

    @property
    def saved_keys(self) -> int:
        """Keys that a step does not read because they are shared."""
        return sum((len(rows) - 1) * length for rows, length in zip(self.rows, self.lengths))


def shared_groups(
    tables: np.ndarray, lengths: np.ndarray, block_size: int, least_saved: int = LEAST_SAVED_KEYS
) -> SharedGroups:
    """Finds the groups in block tables [sequences, pages]; only whole pages are shared.

    A run of pages that saves fewer than `least_saved` reads is left to the runs below it, and in the end to the
    tails.
    """
    found = SharedGroups([], [], [], np.zeros(len(tables), dtype=np.int64))
    whole = lengths // block_size  # pages that no one writes any more
    order = np.lexsort(tables.T[::-1]) if len(tables) else np.zeros(0, dtype=np.int64)
    work = [(order, 0)]  # rows that agree in their first pages, of which `taken` are in groups
    while work:
        rows, taken = work.pop()
        if len(rows) < 2:
            continue
        common = int(whole[rows].min())
        table = tables[rows, :common]
        differ = np.flatnonzero((table != table[0]).any(axis=0))
        stop = int(differ[0]) if len(differ) else common
        tokens = (stop - taken) * block_size
        if tokens and (len(rows) - 1) * tokens >= least_saved:
            found.lengths.append(tokens)
            found.pages.append(tables[rows[0], taken:stop])
            found.rows.append(rows)
            found.tail_starts[rows] = stop * block_size
            taken = stop
        longer = rows[whole[rows] > stop]
        if len(longer) > 1:
            heads = tables[longer, stop]
            cuts = np.flatnonzero(heads[1:] != heads[:-1]) + 1
            work += [(part, taken) for part in np.split(longer, cuts)]
    return found


def decode_segments(groups: SharedGroups, tables: np.ndarray, lengths: np.ndarray, block_size: int) -> list[Any]:
    """(pages, rows, visible) of the groups and tails of running sequences; rows count the sequences."""
    parts: list[Any] = [
        (pages, rows, np.full(len(rows), length))
        for pages, rows, length in zip(groups.pages, groups.rows, groups.lengths)
    ]
    first, last = groups.tail_starts // block_size, -(-lengths // block_size)
    parts += [
        (tables[i, a:b], [i], [seen])
        for i, (a, b, seen) in enumerate(zip(first.tolist(), last.tolist(), (lengths - groups.tail_starts).tolist()))
        if seen > 0
    ]
    return parts


def concatenate(parts: list[Any]) -> Segments:
    """Segments from a list of (pages, rows, visible)."""

    def offsets(sizes: list[int]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)

    def joined(arrays: list[Any]) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=np.int32), *arrays]).astype(np.int32)

    return Segments(
        offsets([len(p) for p, _, _ in parts]),
        joined([p for p, _, _ in parts]),
        offsets([len(r) for _, r, _ in parts]),
        joined([r for _, r, _ in parts]),
        joined([v for _, _, v in parts]),
    )
