"""From a plan of shared prefixes to the work items of the decode attention kernel.

A plan says which keys a group of rows shares and what each row keeps for itself; a work item is what one program
computes: a block of rows against a chunk of keys. A private tail is a unit like a group, with one row:

    unit     = a group, or a tail
    entry    = a (unit, row) pair; the entries of a unit are neighbours
    item     = (unit, block of its entries, chunk of its keys)
    part     = (entry, chunk): a partial result; the parts of a row are neighbours

Items come in two lists, cut for tiles of 16 and of 64 stacked rows (rows * query heads per kv head). The chunk is
chosen so that the whole batch makes about `programs` programs of equal length, and is never shorter than MIN_CHUNK.

The list of a tail covers all its pages, filled or not (the kernel stops at the row's length, which it reads on the
device), so a list stays valid while the rows grow within their pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

ITEM_FIELDS = 8  # int32 numbers of an item; the last one is unused and keeps items 32 bytes apart
MIN_CHUNK = 128  # keys: fewer do not pay for writing and merging a part
SMALL_ROWS = 16  # stacked rows of the small tile
LARGE_ROWS = 64


class Plan(Protocol):
    """Which keys are shared by which rows; int32 arrays. Each key of a row is in one of its groups or in its tail."""

    @property
    def group_starts(self) -> np.ndarray: ...  # [groups]: position of the group's first key in its rows

    @property
    def group_lengths(self) -> np.ndarray: ...  # [groups]: keys of the group, a multiple of the block size

    @property
    def page_offsets(self) -> np.ndarray: ...  # [groups + 1]: the group's pages

    @property
    def pages(self) -> np.ndarray: ...

    @property
    def row_offsets(self) -> np.ndarray: ...  # [groups + 1]: the group's rows

    @property
    def rows(self) -> np.ndarray: ...

    @property
    def tail_starts(self) -> np.ndarray: ...  # [N]: position of the row's first private key, a page's beginning

    @property
    def tail_offsets(self) -> np.ndarray: ...  # [N + 1]: the row's private pages

    @property
    def tail_pages(self) -> np.ndarray: ...


class PlanArrays(NamedTuple):
    """A plan as bare arrays; see `Plan`."""

    group_starts: np.ndarray
    group_lengths: np.ndarray
    page_offsets: np.ndarray
    pages: np.ndarray
    row_offsets: np.ndarray
    rows: np.ndarray
    tail_starts: np.ndarray
    tail_offsets: np.ndarray
    tail_pages: np.ndarray


def plain_plan(tables: np.ndarray, lengths: np.ndarray, block_size: int) -> PlanArrays:
    """The plan in which nothing is shared: row n keeps its first lengths[n] keys in the pages tables[n] (int32)."""
    used = -(-lengths.astype(np.int64) // block_size)
    none, zero = np.zeros(0, np.int32), np.zeros(1, np.int32)
    pages = tables[np.arange(tables.shape[1])[None, :] < used[:, None]].astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
    return PlanArrays(none, none, zero, none, zero, none, np.zeros(len(used), np.int32), offsets, pages)


@dataclass(frozen=True)
class WorkCapacity:
    """The room of a work list on the device."""

    rows: int
    entries: int
    pages: int
    small_items: int
    large_items: int
    parts: int

    @classmethod
    def bound(
        cls,
        rows: int,
        keys_per_row: int,
        levels: int,
        *,
        block_size: int,
        heads_per_kv: int,
        kv_heads: int,
        programs: int,
    ) -> WorkCapacity:
        """Enough for every plan of up to `rows` rows of up to `keys_per_row` keys in `levels` groups each on average.

        An item that is not there costs an empty program in every launch, so their numbers are kept near the truth: a
        unit has one item for each of its row blocks, and the chunks of all units together make at most `programs` more.
        """
        entries = rows * (levels + 1)
        more = -(-programs // kv_heads)
        large_rows = LARGE_ROWS // heads_per_kv  # of a row block
        large_units = min(entries, entries * heads_per_kv // SMALL_ROWS)
        parts = entries + min(rows * (keys_per_row // MIN_CHUNK), more * large_rows)
        # A row's pages and, for each of its lists, at most one page that is not full.
        pages = rows * (-(-keys_per_row // block_size) + levels + 1)
        return cls(rows, entries, pages, entries + more, large_units + entries // large_rows + more, parts)

    def holds(self, other: WorkCapacity) -> bool:
        return all(own >= needed for own, needed in zip(astuple(self), astuple(other)))


@dataclass(frozen=True)
class WorkList:
    """The work of one step, on the host. All arrays are int32."""

    small_items: np.ndarray  # [items, ITEM_FIELDS]
    large_items: np.ndarray
    entry_rows: np.ndarray  # [entries]: the row of each entry
    entry_parts: np.ndarray  # [entries]: the first part of each entry
    part_offsets: np.ndarray  # [N + 1]: the parts of each row
    pages: np.ndarray  # the groups' pages, then the tails'
    heads_per_kv: int
    block_size: int

    def size(self) -> WorkCapacity:
        """The capacity that just holds this list."""
        return WorkCapacity(
            len(self.part_offsets) - 1,
            len(self.entry_rows),
            len(self.pages),
            len(self.small_items),
            len(self.large_items),
            int(self.part_offsets[-1]),
        )


def build_work(plan: Plan, *, block_size: int, heads_per_kv: int, kv_heads: int, programs: int) -> WorkList:
    """The work list of a plan.

    Args:
        heads_per_kv: query heads per kv head, at most 64.
        programs: how many programs keep the device busy: a small multiple of its multiprocessors.
    """
    if not 1 <= heads_per_kv <= LARGE_ROWS:
        raise ValueError(f"heads_per_kv must be from 1 to {LARGE_ROWS}, got {heads_per_kv}")
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two, got {block_size}")
    num_rows, tail_pages = len(plan.tail_starts), np.diff(plan.tail_offsets)
    # Units: the groups, then one tail for each row.
    entries = np.concatenate([np.diff(plan.row_offsets), np.ones(num_rows, np.int64)])
    first_entry = np.concatenate([plan.row_offsets[:-1], len(plan.rows) + np.arange(num_rows)])
    first_page = np.concatenate([plan.page_offsets[:-1], len(plan.pages) + plan.tail_offsets[:-1]])
    position = np.concatenate([plan.group_starts, plan.tail_starts])
    keys = np.concatenate([plan.group_lengths, tail_pages * block_size]).astype(np.int64)
    entry_rows = np.concatenate([plan.rows, np.arange(num_rows)])

    small = entries * heads_per_kv <= SMALL_ROWS
    block_rows = np.where(small, np.maximum(entries, 1), LARGE_ROWS // heads_per_kv)
    blocks = -(-entries // block_rows)
    share = -(-int((blocks * keys).sum()) * kv_heads // programs)
    chunk = max(MIN_CHUNK, -(-share // MIN_CHUNK) * MIN_CHUNK)
    chunks = -(-keys // chunk)

    # Items: the row blocks of one chunk are neighbours, so that they find its keys in the cache.
    counts = blocks * chunks
    unit = np.repeat(np.arange(len(entries)), counts)
    within = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts)
    block, piece = within % blocks[unit], within // blocks[unit]
    skipped = block * block_rows[unit]
    items = np.zeros((len(unit), ITEM_FIELDS), np.int32)
    items[:, 0] = first_entry[unit] + skipped
    items[:, 1] = np.minimum(entries[unit] - skipped, block_rows[unit])
    items[:, 2] = first_page[unit]
    items[:, 3] = position[unit]
    items[:, 4] = piece * chunk
    items[:, 5] = np.minimum((piece + 1) * chunk, keys[unit])
    items[:, 6] = piece

    # Parts: those of a row are neighbours, whatever the order of its units.
    entry_chunks = np.repeat(chunks, entries)
    order = np.argsort(entry_rows, kind="stable")
    entry_parts = np.empty(len(entry_rows), np.int64)
    entry_parts[order] = np.cumsum(entry_chunks[order]) - entry_chunks[order]
    row_parts = np.bincount(entry_rows, weights=entry_chunks, minlength=num_rows)
    part_offsets = np.concatenate([[0], np.cumsum(row_parts)])
    return WorkList(
        np.ascontiguousarray(items[small[unit]]),
        np.ascontiguousarray(items[~small[unit]]),
        entry_rows.astype(np.int32),
        entry_parts.astype(np.int32),
        part_offsets.astype(np.int32),
        np.concatenate([plan.pages, plan.tail_pages]).astype(np.int32),
        heads_per_kv,
        block_size,
    )


class DeviceWork:
    """A work list in device memory: one int32 buffer, filled by one copy and never moved, as a CUDA graph needs it."""

    def __init__(self, capacity: WorkCapacity, *, heads_per_kv: int, block_size: int, device: torch.device) -> None:
        self.capacity = capacity
        self.heads_per_kv = heads_per_kv
        self.block_size = block_size
        # Items first: they stay 32 bytes apart from an aligned beginning.
        sizes = {
            "small_items": capacity.small_items * ITEM_FIELDS,
            "large_items": capacity.large_items * ITEM_FIELDS,
            "counts": 2,
            "entry_rows": capacity.entries,
            "entry_parts": capacity.entries,
            "part_offsets": capacity.rows + 1,
            "pages": capacity.pages,
        }
        self._at: dict[str, tuple[int, int]] = {}
        size = 0
        for name, length in sizes.items():
            self._at[name] = (size, length)
            size += -(-length // ITEM_FIELDS) * ITEM_FIELDS
        self._buffer = torch.zeros(max(1, size), dtype=torch.int32, device=device)
        self.small_items = self._view("small_items").view(-1, ITEM_FIELDS)
        self.large_items = self._view("large_items").view(-1, ITEM_FIELDS)
        self.counts = self._view("counts")
        self.entry_rows = self._view("entry_rows")
        self.entry_parts = self._view("entry_parts")
        self.part_offsets = self._view("part_offsets")
        self.pages = self._view("pages")

    @classmethod
    def of(cls, work: WorkList, device: torch.device) -> DeviceWork:
        """A list of its own on the device, with no room to spare."""
        own = cls(work.size(), heads_per_kv=work.heads_per_kv, block_size=work.block_size, device=device)
        own.load(work)
        return own

    def load(self, work: WorkList) -> None:
        """Replaces the contents: one host-to-device copy, on the current stream, without waiting for it.

        Raises:
            ValueError: a list that does not fit, or that is for other heads or another block size.
        """
        if not self.capacity.holds(work.size()):
            raise ValueError(f"the work list needs {work.size()}, but there is room for {self.capacity}")
        if (work.heads_per_kv, work.block_size) != (self.heads_per_kv, self.block_size):
            raise ValueError(
                f"the buffer is for {self.heads_per_kv} heads per kv head and pages of {self.block_size} tokens, "
                f"got a list for {work.heads_per_kv} and {work.block_size}"
            )
        # The pages are the last array: what is not used of their room is not copied. A fresh pinned buffer for each
        # step: the one of the last step may still be read by the device.
        size = self._at["pages"][0] + len(work.pages)
        host = torch.empty(size, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        flat = host.numpy()
        counts = np.array([len(work.small_items), len(work.large_items)], np.int32)
        # Rows beyond the list's have no parts.
        offsets = np.full(self.capacity.rows + 1, work.part_offsets[-1], np.int32)
        offsets[: len(work.part_offsets)] = work.part_offsets
        contents = {
            "small_items": work.small_items,
            "large_items": work.large_items,
            "counts": counts,
            "entry_rows": work.entry_rows,
            "entry_parts": work.entry_parts,
            "part_offsets": offsets,
            "pages": work.pages,
        }
        for name, array in contents.items():
            start, _ = self._at[name]
            flat[start : start + array.size] = array.reshape(-1)
        self._buffer[:size].copy_(host, non_blocking=True)

    def launches(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(items, their count, stacked rows of an item at most) for each of the two lists."""
        yield self.small_items, self.counts[:1], SMALL_ROWS
        yield self.large_items, self.counts[1:], LARGE_ROWS

    def _view(self, name: str) -> Tensor:
        start, length = self._at[name]
        return self._buffer[start : start + length]
