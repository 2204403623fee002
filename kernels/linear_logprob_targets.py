"""The columns of the targets: their logits, their place in a block of gradients, and a frozen head's backward.

Rows may have several targets (the branch points of a packed forest) or none; entry k asks for column targets[k] in
row target_rows[k], which ascends, and first[t] : first[t + 1] are the entries of row t.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gpo_fast.kernels.linear_logprob import HeadColumns
from torch import Tensor


def target_logits(
    hidden: Tensor, extra: Tensor | None, head: HeadColumns, targets: Tensor, target_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """z and d z / d raw of each entry, (K,) float32; -inf and 0 where the target is not a column of `head`."""
    entries = targets.shape[0]
    logits, slopes = (hidden.new_empty((entries,), dtype=torch.float32) for _ in range(2))
    rank = 0 if extra is None or head.lora_b is None else extra.shape[1]
    if entries:
        target_logits_kernel[(entries,)](
            logits,
            slopes,
            hidden,
            head.weight,
            head.bias,
            extra,
            head.lora_b,
            targets,
            target_rows,
            hidden.shape[1],
            rank,
            head.weight.shape[0],
            hidden.stride(0),
            head.weight.stride(0),
            0 if extra is None else extra.stride(0),
            0 if head.lora_b is None else head.lora_b.stride(0),
            1.0 / head.temperature,
            head.softcap or 0.0,
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None,
            HAS_LORA=rank > 0,
            BLOCK=512,
        )
    return logits, slopes


def write_targets(
    block: Tensor, values: Tensor | None, targets: Tensor, target_rows: Tensor, row_start: int, column_start: int
) -> None:
    """block[row - row_start, target - column_start] = values (or 0) for the entries that lie in the block."""
    entries = targets.shape[0]
    if entries:
        size = 256
        write_targets_kernel[(triton.cdiv(entries, size),)](
            block,
            values,
            targets,
            target_rows,
            entries,
            row_start,
            column_start,
            block.shape[0],
            block.shape[1],
            HAS_VALUES=values is not None,
            BLOCK=size,
        )


def frozen_backward(
    expected: Tensor,
    entropy_row: Tensor | None,
    weight: Tensor,
    first: Tensor,
    targets: Tensor,
    share: Tensor,
    row_grad: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient (N, H) of the hidden states from the kept rows:

    dx_t = sum over the row's entries of share_k W[targets_k] - row_grad_t expected_t - grad_entropy_t entropy_row_t

    One program adds a row's entries in their order. Targets outside of the weight add nothing.
    """
    rows, width = expected.shape
    gradient = torch.empty_like(expected)
    has_entropy = entropy_row is not None and grad_entropy is not None
    block = 1024
    if rows:
        frozen_backward_kernel[(rows, triton.cdiv(width, block))](
            gradient,
            expected,
            entropy_row,
            weight,
            first,
            targets,
            share,
            row_grad,
            grad_entropy,
            width,
            weight.shape[0],
            weight.stride(0),
            HAS_ENTROPY=has_entropy,
            BLOCK=block,
        )
    return gradient


@triton.jit
def target_logits_kernel(
    logits,  # out (entries,) float32
    slopes,  # out (entries,) float32
    hidden,
    weight,
    bias,
    extra,
    lora_b,
    targets,  # (entries,) int64
    target_rows,  # (entries,) int64
    width,
    rank,
    columns,
    hidden_stride,
    weight_stride,
    extra_stride,
    lora_b_stride,
    inverse_temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LORA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One entry: a dot product of length H in float32."""
    entry = tl.program_id(0)
    row = tl.load(target_rows + entry)
    target = tl.load(targets + entry)
    present = (target >= 0) & (target < columns)
    safe = tl.where(present, target, 0)
    raw = _dot(hidden + row * hidden_stride, weight + safe * weight_stride, width, BLOCK)
    if HAS_LORA:
        raw += _dot(extra + row * extra_stride, lora_b + safe * lora_b_stride, rank, BLOCK)
    if HAS_BIAS:
        raw += tl.load(bias + safe)
    slope = raw * 0.0 + 1.0
    if HAS_SOFTCAP:
        ratio = raw / softcap
        decay = tl.exp(-2.0 * tl.abs(ratio))
        size = (1.0 - decay) / (1.0 + decay)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        raw = softcap * tl.where(ratio < 0.0, -size, size)
    tl.store(logits + entry, tl.where(present, raw * inverse_temperature, float("-inf")))
    tl.store(slopes + entry, tl.where(present, slope * inverse_temperature, 0.0))


@triton.jit
def _dot(left, right, length, BLOCK: tl.constexpr):
    """The sum over BLOCK lanes comes last: a fixed order."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tl.load(left + at, mask=at < length, other=0.0).to(tl.float32)
        b = tl.load(right + at, mask=at < length, other=0.0).to(tl.float32)
        total += a * b
    return tl.sum(total)


@triton.jit
def write_targets_kernel(
    block,  # out (height, width)
    values,  # (entries,) float32, if HAS_VALUES
    targets,
    target_rows,
    entries,
    row_start,
    column_start,
    height,
    width,
    HAS_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entries of a row are distinct, so no two lanes write to one place."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    row = tl.load(target_rows + entry, mask=inside, other=-1) - row_start
    column = tl.load(targets + entry, mask=inside, other=-1) - column_start
    here = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = row * width + column
    if HAS_VALUES:
        value = tl.load(values + entry, mask=here, other=0.0)
        tl.store(block + place, value.to(block.dtype.element_ty), mask=here)
    else:
        tl.store(block + place, tl.zeros((BLOCK,), dtype=block.dtype.element_ty), mask=here)


@triton.jit
def frozen_backward_kernel(
    gradient,  # out (rows, width)
    expected,  # (rows, width)
    entropy_row,  # (rows, width), if HAS_ENTROPY
    weight,
    first,  # (rows + 1,) int64
    targets,
    share,  # (entries,) float32
    row_grad,  # (rows,) float32
    grad_entropy,  # (rows,) float32, if HAS_ENTROPY
    width,
    columns,
    weight_stride,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of a row: reads the kept rows and one weight row per entry, writes the gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    total = -tl.load(row_grad + row) * tl.load(expected + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ENTROPY:
        total -= tl.load(grad_entropy + row) * tl.load(entropy_row + place, mask=inside, other=0.0).to(tl.float32)
    for entry in range(tl.load(first + row), tl.load(first + row + 1)):
        target = tl.load(targets + entry)
        here = inside & (target >= 0) & (target < columns)
        total += tl.load(share + entry) * tl.load(weight + target * weight_stride + column, mask=here, other=0.0).to(
            tl.float32
        )
    tl.store(gradient + place, total.to(gradient.dtype.element_ty), mask=inside)
