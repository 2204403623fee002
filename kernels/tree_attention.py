"""Training attention over a packed forest, forward and backward: a token sees its ancestors and itself.

The tokens of one or more trees stand in depth-first order in one packed row. In that order the mask is one integer
per token: key j is visible to query i exactly when j <= i < subtree_end[j].

    out[i, h] = sum_j P[i, j] V[j, g],   P[i, :] = softmax over visible j of scale * q[i, h] . K[j, g],   g = h // (H/G)

    D_i = sum_d dout_id out_id;   dS = P * (dout V^T - D);   dV = P^T dout;   dQ = scale dS K;   dK = scale dS^T Q

What is skipped. A block of keys is visited by a block of queries only if some query comes before the largest
subtree_end of the keys; it is computed without a mask if every query comes before the smallest one. Which blocks those
are is worked out once a batch (`tree_blocks`) and used by all layers and by the backward pass. For one block of keys
the visiting queries are one contiguous range, since every visible range [j, subtree_end[j]) begins in the block.

Shapes: q, out [N, H, D]; k, v [N, G, D]; any strides with unit stride in D; D up to 256; float32, bfloat16, float16
(float32 products are full float32 and slow; P and dS are rounded to the inputs' type before a product, as in
FlashAttention); the log-sum-exp is float32 [H, N], base 2. A query that sees no key (padding: give padding tokens
subtree_end 0) has output 0 and no gradient.
Gradients are deterministic: the three backward kernels use no atomics, a program owns what it writes.
Memory traffic: forward reads q once and, for each block of queries, the visible keys and values (mostly from the L2
cache); writes out and 4 bytes per row and head. Backward reads q, k, v, out, dout, writes dq, dk, dv and 4 bytes per
row and head (D). No buffer grows with N^2; the block lists take 4 N^2 / (block_m block_n) bytes a batch.
Not handled: dropout, soft-caps, sliding windows, attention sinks, second derivatives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from gpo_fast.kernels.tl_utils import LOG2E, block_dim, dot
from torch import Tensor


class TreeTile(NamedTuple):
    """How the kernels are cut: queries x keys of a tile, warps, pipeline stages."""

    block_m: int  # queries of a program of forward and dq
    block_n: int  # keys of a list entry, and of an inner step of forward
    dq_n: int  # keys of an inner step of dq: block_n or a part of it
    keys_m: int  # queries of an inner step of dk, dv
    keys_n: int  # keys of a program of dk, dv
    forward: tuple[int, int]  # warps, stages
    dq: tuple[int, int]
    dkdv: tuple[int, int]


def tile_for(head_dim: int, dtype: torch.dtype, major: int) -> TreeTile:
    """The tile for a head size on GPUs of compute capability `major`.x, by what compiles without spilled registers
    (float32 dk, dv of head size 128 excepted, on 9.0).

    Capabilities 9 and 10 have 227 KB of shared memory and matrix instructions that read from it; for all others the
    operands take registers, and the tiles keep to the 99 KB of the smallest of them.
    """
    columns, roomy = block_dim(head_dim), major in (9, 10)
    if dtype == torch.float32:
        if columns <= 64:
            return TreeTile(32, 32, 32, 32, 32, (4, 2), (4, 2), (8, 2))
        if columns <= 128:
            return TreeTile(32, 16, 16, 32, 32, (4, 2), (4, 2), (8, 2))
        return TreeTile(16, 16, 16, 16, 16, (4, 2), (8, 2), (8, 2))
    if columns <= 64:
        return TreeTile(128, 64, 64, 64, 128, (8, 3), (8, 3), (8, 2))
    if columns <= 128:
        if roomy:
            return TreeTile(128, 64, 64, 64, 64, (8, 3), (8, 2), (8, 2))
        return TreeTile(128, 64, 32, 32, 64, (8, 3), (8, 2), (8, 2))
    return TreeTile(64, 32, 32 if roomy else 16, 16, 64, (8, 2), (8, 2), (8, 2))


def _tile_on(device: torch.device, head_dim: int, dtype: torch.dtype) -> TreeTile:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return tile_for(head_dim, dtype, major)


class TreeBlocks(NamedTuple):
    """Which blocks of keys a block of queries visits, and the key blocks' summaries. Made once for a batch."""

    subtree_end: Tensor  # int32 [N]
    lists: Tensor  # int32 [query blocks, key blocks]: first those without a mask, then those with one
    counts: Tensor  # int32 [query blocks, 2]: how many need no mask, how many are visited
    key_ends: Tensor  # int32 [key blocks of dk/dv, 2]: smallest and largest subtree_end
    tile: TreeTile


def tree_blocks(subtree_end: Tensor, head_dim: int, dtype: torch.dtype) -> TreeBlocks:
    """The block lists of a packed row, computed on its device without waiting for it.

    Args:
        subtree_end: int32 [N]: one past the last token of the subtree that begins at each token; at most N.
    """
    if subtree_end.dtype != torch.int32 or subtree_end.dim() != 1:
        raise ValueError(f"subtree_end must be int32 [N], got {subtree_end.dtype} of shape {tuple(subtree_end.shape)}")
    count, device = subtree_end.numel(), subtree_end.device
    tile = _tile_on(device, head_dim, dtype)
    smallest, largest = _block_ends(subtree_end, tile.block_n)
    first_query = torch.arange(-(-count // tile.block_m), device=device, dtype=torch.int32)[:, None] * tile.block_m
    last_query = first_query + tile.block_m - 1
    first_key = torch.arange(smallest.numel(), device=device, dtype=torch.int32) * tile.block_n
    visited = (largest > first_query) & (first_key <= last_query)
    whole = (smallest > last_query) & (first_key + tile.block_n - 1 <= first_query)
    kind = torch.where(visited, torch.where(whole, 0, 1), 2)
    lists = kind.argsort(dim=1, stable=True).to(torch.int32)
    counts = torch.stack([whole.sum(1), visited.sum(1)], dim=1).to(torch.int32)
    key_ends = torch.stack(_block_ends(subtree_end, tile.keys_n), dim=1).contiguous()
    return TreeBlocks(subtree_end.contiguous(), lists, counts, key_ends, tile)


def _block_ends(subtree_end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest subtree_end of each block of `size` keys; missing keys count as invisible (0)."""
    missing = -subtree_end.numel() % size
    blocks = torch.nn.functional.pad(subtree_end, (0, missing)).view(-1, size)
    return blocks.amin(1), blocks.amax(1)


@triton.jit
def _load_rows(base, start, count, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start .. start + ROWS of one head, [ROWS, BLOCK_D]; 0 beyond the row's end or the head's size."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    inside = (start + row < count)[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (dim < HEAD_DIM)[None, :]
    base += tl.cast(start, tl.int64) * stride
    return tl.load(base + row[:, None] * stride + dim[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(base, start, count, stride, tile, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    inside = (start + row < count)[:, None] & (dim < HEAD_DIM)[None, :]
    base += tl.cast(start, tl.int64) * stride
    tl.store(base + row[:, None] * stride + dim[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _visible(query, key, end):
    """[queries, keys] of j <= i < subtree_end[j]."""
    return (key[None, :] <= query[:, None]) & (query[:, None] < end[None, :])


@triton.jit
def _forward_blocks(
    out,
    top,
    total,
    q,
    query,
    keys,
    values,
    ends,
    blocks,
    first,
    last,
    count,
    key_stride,
    value_stride,
    scale,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the key blocks blocks[first:last]."""
    for index in range(first, last):
        start = tl.load(blocks + index) * BLOCK_N
        k = _load_rows(keys, start, count, key_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
        v = _load_rows(values, start, count, value_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), "ieee") * scale
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            end = tl.load(ends + key, mask=key < count, other=0)
            scores = tl.where(_visible(query, key, end), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = new_top
        if MASKED:
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a query that has seen no key yet
        shrink = tl.exp2(top - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = dot(weights.to(v.dtype), v, out * shrink[:, None], "ieee")
        top = new_top
    return out, top, total


@triton.jit
def forward_kernel(
    q,  # [N, H, D]
    k,  # [N, G, D]
    v,
    out,  # [N, H, D], contiguous
    lse,  # float32 [H, N], base 2
    ends,  # int32 [N]: subtree_end
    lists,  # int32 [query blocks, key_blocks]
    counts,  # int32 [query blocks, 2]
    count,  # N
    key_blocks,
    scale,  # the softmax scale * log2(e)
    q_stride,  # of a token
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a block of queries of one head. The last blocks, which tend to see most, go first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    start = block * BLOCK_M
    query = start + tl.arange(0, BLOCK_M)
    blocks = lists + block.to(tl.int64) * key_blocks
    whole = tl.load(counts + 2 * block)
    visited = tl.load(counts + 2 * block + 1)
    keys = k + (head // PER_KV) * k_head_stride
    values = v + (head // PER_KV) * v_head_stride
    tile = _load_rows(q + head * q_head_stride, start, count, q_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums, top, total = _forward_blocks(
        sums, top, total, tile, query, keys, values, ends, blocks, 0, whole, count, k_stride, v_stride, scale,
        BLOCK_N, HEAD_DIM, BLOCK_D, False,
    )  # fmt: skip
    sums, top, total = _forward_blocks(
        sums, top, total, tile, query, keys, values, ends, blocks, whole, visited, count, k_stride, v_stride, scale,
        BLOCK_N, HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    tl.store(lse + head * count + query, tl.where(seen, top + tl.log2(safe), float("-inf")), mask=query < count)
    _store_rows(out + head * HEAD_DIM, start, count, HEADS * HEAD_DIM, sums / safe[:, None], BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def delta_kernel(
    out,  # [N, H, D], contiguous
    grad_out,
    delta,  # float32 [H, N]: sum over D of out * grad_out
    count,
    grad_stride,
    grad_head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    query = start + tl.arange(0, BLOCK_M)
    o = _load_rows(out + head * HEAD_DIM, start, count, HEADS * HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_D)
    g = _load_rows(grad_out + head * grad_head_stride, start, count, grad_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(delta + head * count + query, tl.sum(o.to(tl.float32) * g.to(tl.float32), 1), mask=query < count)


@triton.jit
def _dq_blocks(
    dq,
    q,
    grad,
    lse,
    delta,
    query,
    keys,
    values,
    ends,
    blocks,
    first,
    last,
    count,
    key_stride,
    value_stride,
    scale,
    BLOCK_N: tl.constexpr,
    LIST_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what the key blocks blocks[first:last] give, each in LIST_N // BLOCK_N steps."""
    STEPS: tl.constexpr = LIST_N // BLOCK_N
    for index in range(first * STEPS, last * STEPS):
        start = tl.load(blocks + index // STEPS) * LIST_N + index % STEPS * BLOCK_N
        k = _load_rows(keys, start, count, key_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
        v = _load_rows(values, start, count, value_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
        zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        p = tl.exp2(dot(q, tl.trans(k), zeros, "ieee") * scale - lse[:, None])
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            end = tl.load(ends + key, mask=key < count, other=0)
            p = tl.where(_visible(query, key, end), p, 0.0)
        ds = p * (dot(grad, tl.trans(v), zeros, "ieee") - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq, "ieee")
    return dq


@triton.jit
def dq_kernel(
    q,
    k,
    v,
    grad_out,  # [N, H, D]
    lse,
    delta,
    dq,  # [N, H, D], contiguous
    ends,
    lists,
    counts,
    count,
    key_blocks,
    scale,  # the softmax scale * log2(e)
    grad_scale,  # the softmax scale
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    grad_stride,
    grad_head_stride,
    HEADS: tl.constexpr,
    PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LIST_N: tl.constexpr,
):
    """One program: dq of a block of queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    start = block * BLOCK_M
    query = start + tl.arange(0, BLOCK_M)
    inside = query < count
    blocks = lists + block.to(tl.int64) * key_blocks
    whole = tl.load(counts + 2 * block)
    visited = tl.load(counts + 2 * block + 1)
    keys = k + (head // PER_KV) * k_head_stride
    values = v + (head // PER_KV) * v_head_stride
    tile = _load_rows(q + head * q_head_stride, start, count, q_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
    grad = _load_rows(grad_out + head * grad_head_stride, start, count, grad_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
    row_lse = tl.load(lse + head * count + query, mask=inside, other=0.0)
    row_delta = tl.load(delta + head * count + query, mask=inside, other=0.0)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = _dq_blocks(
        sums, tile, grad, row_lse, row_delta, query, keys, values, ends, blocks, 0, whole, count, k_stride, v_stride,
        scale, BLOCK_N, LIST_N, HEAD_DIM, BLOCK_D, False,
    )  # fmt: skip
    sums = _dq_blocks(
        sums, tile, grad, row_lse, row_delta, query, keys, values, ends, blocks, whole, visited, count, k_stride,
        v_stride, scale, BLOCK_N, LIST_N, HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    _store_rows(dq + head * HEAD_DIM, start, count, HEADS * HEAD_DIM, sums * grad_scale, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_blocks(
    dk,
    dv,
    k,
    v,
    key,
    end,
    q,
    grad_out,
    lse,
    delta,
    first_head,
    first,
    gap,
    gap_end,
    last,
    count,
    q_stride,
    q_head_stride,
    grad_stride,
    grad_head_stride,
    scale,
    PER_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what the query blocks first .. gap and gap_end .. last of all heads give; scores are [keys, queries]."""
    span = last - first - (gap_end - gap)
    # One loop over heads and blocks: the loads of the next head start while this one ends, and registers suffice.
    for index in range(0, PER_KV * span):
        head = first_head + index // span
        block = first + index % span
        if MASKED:
            block = tl.where(block < gap, block, block + (gap_end - gap))
        start = block * BLOCK_M
        query = start + tl.arange(0, BLOCK_M)
        inside = query < count
        rows = _load_rows(q + head * q_head_stride, start, count, q_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
        grad = _load_rows(grad_out + head * grad_head_stride, start, count, grad_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
        row_lse = tl.load(lse + head * count + query, mask=inside, other=0.0)
        row_delta = tl.load(delta + head * count + query, mask=inside, other=0.0)
        zeros = tl.zeros([k.shape[0], BLOCK_M], tl.float32)
        p = tl.exp2(dot(k, tl.trans(rows), zeros, "ieee") * scale - row_lse[None, :])
        if MASKED:
            p = tl.where((key[:, None] <= query[None, :]) & (query[None, :] < end[:, None]), p, 0.0)
        dv = dot(p.to(grad.dtype), grad, dv, "ieee")
        ds = p * (dot(v, tl.trans(grad), zeros, "ieee") - row_delta[None, :])
        dk = dot(ds.to(rows.dtype), rows, dk, "ieee")
    return dk, dv


@triton.jit
def dkdv_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    dk,  # [N, G, D], contiguous
    dv,
    ends,
    key_ends,  # int32 [key blocks, 2]: smallest and largest subtree_end of the block
    count,
    scale,
    grad_scale,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    grad_stride,
    grad_head_stride,
    KV_HEADS: tl.constexpr,
    PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: dk and dv of a block of keys of one kv head, over its query heads and the queries in its range."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    start = block * BLOCK_N
    key = start + tl.arange(0, BLOCK_N)
    end = tl.load(ends + key, mask=key < count, other=0)
    smallest = tl.load(key_ends + 2 * block)
    largest = tl.load(key_ends + 2 * block + 1)
    # Query blocks: [first, whole) and [whole_end, last) need the mask, [whole, whole_end) do not.
    first = start // BLOCK_M
    last = tl.maximum(tl.cdiv(largest, BLOCK_M), first)
    whole = tl.minimum(tl.cdiv(start + BLOCK_N - 1, BLOCK_M), last)
    whole_end = tl.minimum(tl.maximum(smallest // BLOCK_M, whole), last)

    key_tile = _load_rows(k + kv_head * k_head_stride, start, count, k_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
    value_tile = _load_rows(v + kv_head * v_head_stride, start, count, v_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
    dk_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_head = kv_head * PER_KV
    dk_sums, dv_sums = _dkdv_blocks(
        dk_sums, dv_sums, key_tile, value_tile, key, end, q, grad_out, lse, delta, first_head,
        whole, whole_end, whole_end, whole_end, count, q_stride, q_head_stride, grad_stride, grad_head_stride, scale,
        PER_KV, BLOCK_M, HEAD_DIM, BLOCK_D, False,
    )  # fmt: skip
    dk_sums, dv_sums = _dkdv_blocks(
        dk_sums, dv_sums, key_tile, value_tile, key, end, q, grad_out, lse, delta, first_head,
        first, whole, whole_end, last, count, q_stride, q_head_stride, grad_stride, grad_head_stride, scale,
        PER_KV, BLOCK_M, HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    stride = KV_HEADS * HEAD_DIM
    _store_rows(dk + kv_head * HEAD_DIM, start, count, stride, dk_sums * grad_scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store_rows(dv + kv_head * HEAD_DIM, start, count, stride, dv_sums, BLOCK_N, HEAD_DIM, BLOCK_D)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: TreeBlocks, scale: float) -> Tensor:
        q, k, v = (_unit_stride(t) for t in (q, k, v))
        count, heads, head_dim = q.shape
        tile = blocks.tile
        out = torch.empty((count, heads, head_dim), dtype=q.dtype, device=q.device)
        lse = torch.empty((heads, count), dtype=torch.float32, device=q.device)
        forward_kernel[(blocks.lists.shape[0], heads)](
            q,
            k,
            v,
            out,
            lse,
            blocks.subtree_end,
            blocks.lists,
            blocks.counts,
            count,
            blocks.lists.shape[1],
            scale * LOG2E.value,
            *_strides(q, k, v),
            HEADS=heads,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **_shape(q, k),
            num_warps=tile.forward[0],
            num_stages=tile.forward[1],
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        blocks: TreeBlocks = ctx.blocks
        tile, scale = blocks.tile, ctx.scale
        grad_out = _unit_stride(grad_out)
        count, heads, head_dim = q.shape
        kv_heads = k.shape[1]
        delta = torch.empty_like(lse)
        shape, strides = _shape(q, k), _strides(q, k, v, grad_out)
        delta_kernel[(-(-count // 64), heads)](
            out,
            grad_out,
            delta,
            count,
            *_strides(grad_out),
            HEADS=heads,
            HEAD_DIM=head_dim,
            BLOCK_D=shape["BLOCK_D"],
            BLOCK_M=64,
            num_warps=4,
        )
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        dq_kernel[(blocks.lists.shape[0], heads)](
            q,
            k,
            v,
            grad_out,
            lse,
            delta,
            dq,
            blocks.subtree_end,
            blocks.lists,
            blocks.counts,
            count,
            blocks.lists.shape[1],
            scale * LOG2E.value,
            scale,
            *strides,
            HEADS=heads,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.dq_n,
            LIST_N=tile.block_n,
            **shape,
            num_warps=tile.dq[0],
            num_stages=tile.dq[1],
        )
        dkdv_kernel[(blocks.key_ends.shape[0], kv_heads)](
            q,
            k,
            v,
            grad_out,
            lse,
            delta,
            dk,
            dv,
            blocks.subtree_end,
            blocks.key_ends,
            count,
            scale * LOG2E.value,
            scale,
            *strides,
            KV_HEADS=kv_heads,
            BLOCK_M=tile.keys_m,
            BLOCK_N=tile.keys_n,
            **shape,
            num_warps=tile.dkdv[0],
            num_stages=tile.dkdv[1],
        )
        return dq, dk, dv, None, None


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, blocks: TreeBlocks | None = None
) -> Tensor:
    """Attention of every token of a packed forest over its ancestors and itself, differentiable in q, k and v.

    Args:
        q: [N, H, D]. k, v: [N, G, D], H a multiple of G, all of one dtype (float32, bfloat16, float16).
        subtree_end: int32 [N], depth-first order: one past the last token of each token's subtree, at most N.
            0 makes a token invisible (padding).
        blocks: `tree_blocks(subtree_end, D, dtype)`, to compute them once for all layers of a batch.

    Returns: [N, H, D].
    """
    _check(q, k, v, subtree_end)
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    if blocks is None:
        blocks = tree_blocks(subtree_end, q.shape[2], q.dtype)
    elif blocks.tile != _tile_on(q.device, q.shape[2], q.dtype) or blocks.subtree_end.shape != subtree_end.shape:
        raise ValueError(
            f"the block lists are for {blocks.subtree_end.numel()} tokens and tiles {blocks.tile}, got {q.shape[0]} "
            f"tokens of head size {q.shape[2]} in {q.dtype}: make them with tree_blocks for this batch"
        )
    return _TreeAttention.apply(q, k, v, blocks, float(scale))


def _check(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor) -> None:
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or q.shape[::2] != k.shape[::2]:
        raise ValueError(
            f"q must be [N, H, D], k and v [N, G, D], got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of kv heads, got {q.shape[1]} and {k.shape[1]}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"q, k and v must all be float32, bfloat16 or float16, got {q.dtype}, {k.dtype} and {v.dtype}")
    if subtree_end.shape != q.shape[:1]:
        raise ValueError(f"subtree_end must be of shape ({q.shape[0]},), got {tuple(subtree_end.shape)}")


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Token and head stride of each."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    head_dim = q.shape[2]
    return {"PER_KV": q.shape[1] // k.shape[1], "HEAD_DIM": head_dim, "BLOCK_D": block_dim(head_dim)}
