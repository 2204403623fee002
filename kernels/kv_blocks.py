"""Moving keys and values into, within and out of the paged pool.

A pool holds the keys (and another the values) of all layers: [layers, slots, kv heads, head size], where
slot = page * block_size + offset. Every function handles keys and values in one launch and synchronises nothing, so
all of them can be captured in a CUDA graph. 64-bit offsets: a pool may have more than 2^31 elements.

    write_kv      keys[slots[n]] = new_keys[n]                          reads and writes N rows
    copy_blocks   pool[l, target + i] = pool[l, source + i], i < length  all layers, all jobs, one launch
    gather_kv     out[t] = keys[slot(pages, t)]                         one sequence's keys in order, for prefill

Not handled: quantised pools; jobs of one `copy_blocks` call whose targets overlap another job's source (the prefix
cache never makes such jobs: a source lives until its copy is acknowledged).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def write_kernel(
    new_keys,  # [N, kv heads, head size], any strides with unit stride in the last place
    new_values,
    keys,  # [slots, kv heads, head size], contiguous rows of WIDTH elements
    values,
    slots,  # int32 or int64 [N]; a negative slot is padding and is skipped
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # kv heads * head size
    BLOCK: tl.constexpr,
):
    """One program writes one token's key and value of one layer."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        head, dim = column // HEAD_DIM, column % HEAD_DIM
        key = tl.load(new_keys + row * key_row_stride + head * key_head_stride + dim, mask=inside)
        value = tl.load(new_values + row * value_row_stride + head * value_head_stride + dim, mask=inside)
        target = slot * WIDTH + column
        tl.store(keys + target, key.to(keys.dtype.element_ty), mask=inside)
        tl.store(values + target, value.to(values.dtype.element_ty), mask=inside)


@triton.jit
def copy_kernel(
    keys,  # [layers, slots, WIDTH]
    values,
    jobs,  # int32 [3, capacity]: source slot, target slot, length
    count,  # int32 [1]: jobs that are real; the rest is padding
    capacity,
    layer_stride,  # 64-bit: slots * WIDTH
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program copies one job in one layer."""
    job = tl.program_id(0)
    if job < tl.load(count):
        source = tl.load(jobs + job).to(tl.int64)
        target = tl.load(jobs + capacity + job).to(tl.int64)
        elements = tl.load(jobs + 2 * capacity + job) * WIDTH
        layer = tl.program_id(1).to(tl.int64) * layer_stride
        source, target = layer + source * WIDTH, layer + target * WIDTH
        for start in range(0, elements, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < elements
            tl.store(keys + target + column, tl.load(keys + source + column, mask=inside), mask=inside)
            tl.store(values + target + column, tl.load(values + source + column, mask=inside), mask=inside)


@triton.jit
def gather_kernel(
    keys,  # [slots, WIDTH]
    values,
    pages,  # int32
    out_keys,  # [length, WIDTH]
    out_values,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program copies one token's key and value."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(pages + token // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    source, target = slot * WIDTH + column, token * WIDTH + column
    tl.store(out_keys + target, tl.load(keys + source, mask=inside), mask=inside)
    tl.store(out_values + target, tl.load(values + source, mask=inside), mask=inside)


def write_kv(new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Writes one layer's new keys and values to their slots, in the pool's dtype.

    Args:
        new_keys, new_values: [N, kv heads, head size]; only the last dimension must be contiguous.
        keys, values: one layer of the pool, [slots, kv heads, head size], contiguous.
        slots: int32 or int64 [N]; negative: nothing is written for this row. No slot twice.
    """
    _check_pool(keys, values)
    if new_keys.stride(-1) != 1 or new_values.stride(-1) != 1:
        raise ValueError("new keys and values must be contiguous in the last dimension")
    rows, kv_heads, head_dim = new_keys.shape
    if rows == 0:
        return
    width = kv_heads * head_dim
    write_kernel[(rows,)](
        new_keys,
        new_values,
        keys,
        values,
        slots,
        new_keys.stride(0),
        new_keys.stride(1),
        new_values.stride(0),
        new_values.stride(1),
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )


def copy_blocks(keys: Tensor, values: Tensor, jobs: Tensor, count: Tensor) -> None:
    """Copies slots within the pool, in all layers: the copy-on-write jobs of a step.

    Args:
        keys, values: the whole pool, [layers, slots, kv heads, head size], contiguous.
        jobs: int32 [3, capacity] on the device: source slots, target slots, lengths.
        count: int32 [1] on the device: how many jobs are real.
    """
    _check_pool(keys, values)
    layers, slots, kv_heads, head_dim = keys.shape
    capacity = jobs.shape[1]
    if capacity == 0:
        return
    width = kv_heads * head_dim
    copy_kernel[(capacity, layers)](
        keys, values, jobs, count, capacity, slots * width, WIDTH=width, BLOCK=2048, num_warps=4
    )


def gather_kv(keys: Tensor, values: Tensor, pages: Tensor, length: int, block_size: int) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values of one sequence in order, each [length, kv heads, head size].

    Args:
        keys, values: one layer of the pool, [slots, kv heads, head size], contiguous.
        pages: int32, at least ceil(length / block_size) of them.
    """
    _check_pool(keys, values)
    if pages.numel() * block_size < length:
        raise ValueError(f"{length} tokens need {-(-length // block_size)} pages, got {pages.numel()}")
    shape = (length, *keys.shape[1:])
    out_keys = torch.empty(shape, dtype=keys.dtype, device=keys.device)
    out_values = torch.empty_like(out_keys)
    if length:
        width = keys.shape[1] * keys.shape[2]
        gather_kernel[(length,)](
            keys,
            values,
            pages,
            out_keys,
            out_values,
            BLOCK_SIZE=block_size,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            num_warps=4,
        )
    return out_keys, out_values


def _check_pool(keys: Tensor, values: Tensor) -> None:
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"keys and values must be alike, got {tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} "
            f"{values.dtype}"
        )
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError("the pool's keys and values must be contiguous")
