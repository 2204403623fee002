"""Decode attention over a forest of paged keys and values: a shared key is read once for all rows that see it.

    out[n, h] = sum_t softmax_t(f(scale * q[n, h] . K[t, g])) V[t, g]     over all keys t of row n,  g = h // (H / G)

with f the identity or cap * tanh(. / cap). The keys of a row are split, disjointly, over groups of rows that share
them and the row's private tail (`work_list.py`). Two kernels:

1. `partial_kernel`: one program takes one work item (a block of rows, a chunk of keys) and one kv head. It stacks the
   item's rows times the query heads of the kv head into a matrix, runs over the keys in tiles with an online softmax
   and writes, for each row and head, the chunk's output o (float32) and log-sum-exp s (float32, base 2).
2. `merge_kernel`: one program per row and head merges its parts: m = max s, w = exp2(s - m), out = sum w o / sum w.
   A part without keys has s = -inf and weighs nothing; a row without keys gives zeros, not NaN.

A plan without groups is plain paged attention, by the same kernels.

Shapes: queries and out [N, H, D]; keys and values [slots, G, D] (slot = page * block_size + offset); D up to 256, any
H / G up to 64, block size any power of two. float32, bfloat16, float16; products of float32 inputs are full float32.
Memory traffic: each shared key and value once from device memory (row blocks of one chunk are neighbours in the grid,
so the second block finds them in the L2 cache), each private one once, queries once per chunk, and 2 * 4 * (D + 1)
bytes per row, head and chunk for the parts. Nothing is synchronised and no grid depends on the device's data: a work
list padded to a fixed capacity can be captured in a CUDA graph and replayed with new contents.

Not handled: sliding windows, ALiBi, attention sinks, quantised pools, and more than one query token per row (a row is
one query that sees the first `lengths[n]` keys of its sequence).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gpo_fast.kernels.tl_utils import LOG2E, block_dim, dot, soft_cap
from gpo_fast.kernels.work_list import ITEM_FIELDS, LARGE_ROWS, SMALL_ROWS, DeviceWork
from torch import Tensor


class Tile(NamedTuple):
    """How `partial_kernel` is cut and launched."""

    rows: int  # stacked query rows of a program: at least 16, the least that a matrix instruction takes
    keys: int  # keys of an inner step
    num_warps: int
    num_stages: int


def tile_for(stacked_rows: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for work items of up to `stacked_rows` (rows * query heads per kv head) rows."""
    rows = SMALL_ROWS if stacked_rows <= SMALL_ROWS else LARGE_ROWS
    columns = block_dim(head_dim)
    if dtype == torch.float32:
        # Full float32 products use no matrix instructions: registers are the limit.
        if columns <= 64:
            return Tile(rows, 32, 4 if rows == SMALL_ROWS else 8, 2)
        return Tile(rows, 16, 4 if rows == SMALL_ROWS else 16, 2)
    if columns <= 128:
        return Tile(rows, 64, 4, 3)
    return Tile(rows, 32, 4 if rows == SMALL_ROWS else 8, 3 if rows == SMALL_ROWS else 2)


@triton.jit
def partial_kernel(
    queries,  # [N, H, D], contiguous
    keys,  # [slots, G, D], contiguous
    values,
    lengths,  # int32 [N]: keys of each row
    items,  # int32 [capacity, 8]: entry, rows, page, first position, first key, end key, chunk, unused
    count,  # int32 [1]: items that are real
    entry_rows,  # int32: the query row of each entry
    entry_parts,  # int32: the first part of each entry
    pages,  # int32
    out_parts,  # float32 [parts, H, D]
    lse_parts,  # float32 [parts, H], base 2
    scale,  # the softmax scale
    cap,  # the soft-cap, used if CAPPED
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIELDS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    if item < tl.load(count):
        PER_KV: tl.constexpr = HEADS // KV_HEADS
        record = items + item * FIELDS
        entry = tl.load(record)
        rows = tl.load(record + 1)
        page_list = pages + tl.load(record + 2)
        position = tl.load(record + 3)
        first = tl.load(record + 4)
        end = tl.load(record + 5)
        chunk = tl.load(record + 6)

        stacked = tl.arange(0, BLOCK_M)
        real = stacked < rows * PER_KV
        entries = entry + stacked // PER_KV
        row = tl.load(entry_rows + entries, mask=real, other=0)
        head = kv_head * PER_KV + stacked % PER_KV
        limit = tl.load(lengths + row, mask=real, other=0) - position  # keys of this list that the row sees
        end = tl.minimum(end, tl.max(limit, 0))
        dim = tl.arange(0, BLOCK_D)
        in_head = dim < HEAD_DIM
        query_at = (row.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
        q = tl.load(queries + query_at, mask=real[:, None] & in_head[None, :], other=0.0)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(first, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            in_list = key < end
            page = tl.load(page_list + key // BLOCK_SIZE, mask=in_list, other=0).to(tl.int64)
            key_at = ((page * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
            inside = in_list[:, None] & in_head[None, :]
            k = tl.load(keys + key_at, mask=inside, other=0.0)
            v = tl.load(values + key_at, mask=inside, other=0.0)
            scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), "ieee") * scale
            if CAPPED:
                scores = soft_cap(scores, cap)
            visible = in_list[None, :] & (key[None, :] < limit[:, None])
            scores = tl.where(visible, scores * LOG2E, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
            shrink = tl.exp2(top - shift)
            weights = tl.exp2(scores - shift[:, None])
            total = total * shrink + tl.sum(weights, 1)
            out = dot(weights.to(v.dtype), v, out * shrink[:, None], "ieee")
            top = new_top

        seen = total > 0
        out = out / tl.where(seen, total, 1.0)[:, None]
        lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        part = tl.load(entry_parts + entries, mask=real, other=0) + chunk
        part_at = part.to(tl.int64) * HEADS + head
        tl.store(lse_parts + part_at, lse, mask=real)
        tl.store(out_parts + part_at[:, None] * HEAD_DIM + dim[None, :], out, mask=real[:, None] & in_head[None, :])


@triton.jit
def merge_kernel(
    out_parts,  # float32 [parts, H, D]
    lse_parts,  # float32 [parts, H], base 2
    part_offsets,  # int32 [N + 1]: row n's parts
    out,  # [N, H, D]
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(part_offsets + row)
    end = tl.load(part_offsets + row + 1)
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < HEAD_DIM
    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for start in range(first, end, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        top = tl.maximum(top, tl.load(lse_parts + part * HEADS + head, mask=part < end, other=float("-inf")))
    best = tl.max(top, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    total = tl.zeros([BLOCK_P], tl.float32)
    merged = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        weight = tl.exp2(tl.load(lse_parts + part * HEADS + head, mask=part < end, other=float("-inf")) - best)
        at = (part.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
        parts = tl.load(out_parts + at, mask=(part < end)[:, None] & in_head[None, :], other=0.0)
        merged += tl.sum(weight[:, None] * parts, 0)
        total += weight
    whole = tl.sum(total, 0)
    merged = merged / tl.where(whole > 0, whole, 1.0)
    row_at = (row.to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(out + row_at + dim, merged.to(out.dtype.element_ty), mask=in_head)


def shared_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    work: DeviceWork,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of one query token per row over the paged keys that `work` lists for it.

    Args:
        queries: [N, H, D]; N may be less than the rows of `work`.
        keys, values: one layer of the pool, [slots, G, D], contiguous, the dtype of the queries.
        work: the work list on the device (`DeviceWork`), made for this H, G and block size.
        lengths: int32 [N] on the device: the keys of each row. A row of a padded batch has length 0 and gives zeros.
        softcap: 0 is none.

    Returns: [N, H, D] in the queries' dtype.
    """
    rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    _check(queries, keys, values, work)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if rows == 0:
        return out
    out_parts = torch.empty((work.capacity.parts, heads, head_dim), dtype=torch.float32, device=queries.device)
    lse_parts = torch.empty((work.capacity.parts, heads), dtype=torch.float32, device=queries.device)
    queries = queries.contiguous()
    block_d = block_dim(head_dim)
    for items, count, stacked_rows in work.launches():
        if items.shape[0] == 0:
            continue
        tile = tile_for(stacked_rows, head_dim, queries.dtype)
        partial_kernel[(items.shape[0], kv_heads)](
            queries,
            keys,
            values,
            lengths,
            items,
            count,
            work.entry_rows,
            work.entry_parts,
            work.pages,
            out_parts,
            lse_parts,
            scale,
            softcap,
            BLOCK_SIZE=work.block_size,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.keys,
            FIELDS=ITEM_FIELDS,
            CAPPED=softcap > 0,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    merge_kernel[(rows, heads)](
        out_parts,
        lse_parts,
        work.part_offsets,
        out,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_P=8,
        num_warps=2,
    )
    return out


def _check(queries: Tensor, keys: Tensor, values: Tensor, work: DeviceWork) -> None:
    rows, heads, head_dim = queries.shape
    if keys.shape != values.shape or keys.shape[2] != head_dim:
        raise ValueError(
            f"keys and values must be [slots, kv heads, {head_dim}], got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if not queries.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"queries, keys and values must have one dtype, got {queries.dtype}, {keys.dtype} and {values.dtype}"
        )
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError("keys and values must be contiguous")
    if heads != work.heads_per_kv * keys.shape[1]:
        raise ValueError(
            f"the work list is for {work.heads_per_kv} query heads per kv head, got {heads} and {keys.shape[1]} heads"
        )
    if rows > work.capacity.rows:
        raise ValueError(f"the work list has room for {work.capacity.rows} rows, got {rows} queries")
