"""Logits of a linear head in tiles that never leave the chip: their softmax sums, or their gradients.

    z = softcap(x W^T + u B^T + b) / temperature        x (N, H), W (V, H), u (N, r), B (V, r), b (V)

Two kernels share the matrix product (tensor cores, float32 accumulation, no rounding of a logit):

`softmax_tiles`   per row and tile of columns: top = max z, mass = sum exp(z - top) and moment = sum exp(z - top)
                  (z - top). No program sees another one's tile; `linear_logprob_merge.py` joins them in the order of
                  the vocabulary, so results do not depend on which program ran first. On request it stores
                  exp(z - top) c, c = d z / d raw * temperature, rounded to the dtype of x: the left operand of the
                  product with W that a frozen head's backward needs.
`logit_gradients` d loss / d raw logit in the dtype of x, the left operand of the products that give dHidden and
                  dWeight.

Those second products are plain ones and go to cuBLAS: their results are H wide, for H = 3584 far beyond the
registers of a program, and there is no epilogue that a kernel of ours could fuse.

Columns are a contiguous range of the vocabulary (pass a slice of the weight). Not handled: float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class TileShape:
    """Rows and columns of a tile, the depth of one step of the product, and how many threads work on it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Row blocks that share a weight tile while it is in the second-level cache.
ROW_BLOCKS_PER_GROUP = 16


def tile_shape(
    dtype: torch.dtype, capability: tuple[int, int], *, softcap: bool = False, store_weighted: bool = False
) -> TileShape:
    """The tile for inputs of `dtype` on a GPU of this compute capability; none of them spills registers."""
    if dtype == torch.float32:
        # Three tf32 products per step: the operands' parts take registers.
        return TileShape(rows=64, columns=64, depth=32, warps=4, stages=2)
    # Hopper's and Blackwell's data-centre chips feed the tensor cores from shared memory: up to 144 KiB of their 227.
    columns = 256 if capability[0] in (9, 10) else 128
    # The slope of a soft-cap is alive beside the logits, and so are the products that are stored with the exponentials.
    columns = max(64, columns >> (softcap + store_weighted))
    return TileShape(rows=128, columns=columns, depth=64, warps=8, stages=3)


class HeadColumns(NamedTuple):
    """A range of the vocabulary: weight (C, H), bias (C,) float32 or None, lora_b (C, r) or None."""

    weight: Tensor
    bias: Tensor | None
    lora_b: Tensor | None
    temperature: float
    softcap: float | None


class Tiles(NamedTuple):
    """Softmax sums of each tile, (tiles, N) float32, and the stored exponentials (N, C) or None."""

    width: int  # columns of a tile

    top: Tensor
    mass: Tensor
    moment: Tensor
    sloped: Tensor | None  # exp(z - top) c
    weighted: Tensor | None  # exp(z - top) (z - top) c


class RowGradients(NamedTuple):
    """What the gradient of a row's logits needs, each (N,) float32; entropy_grad may be None."""

    lse: Tensor
    entropy: Tensor
    logprob_grad: Tensor  # the sum over the row's targets
    entropy_grad: Tensor | None


def softmax_tiles(
    hidden: Tensor,
    extra: Tensor | None,
    head: HeadColumns,
    *,
    store_sloped: bool = False,
    store_weighted: bool = False,
) -> Tiles:
    """The sums of every tile of hidden (N, H), extra (N, r) against the columns of `head`."""
    shape, common = _launch(hidden, extra, head, store_weighted=store_weighted)
    rows, columns = hidden.shape[0], head.weight.shape[0]
    tiles = triton.cdiv(columns, shape.columns)
    top, mass, moment = (hidden.new_empty((tiles, rows), dtype=torch.float32) for _ in range(3))
    sloped = hidden.new_empty((rows, columns)) if store_sloped else None
    weighted = hidden.new_empty((rows, columns)) if store_weighted else None
    softmax_tiles_kernel[(triton.cdiv(rows, shape.rows) * tiles,)](
        top, mass, moment, sloped, weighted, STORE_SLOPED=store_sloped, STORE_WEIGHTED=store_weighted, **common
    )
    return Tiles(shape.columns, top, mass, moment, sloped, weighted)


def logit_gradients(hidden: Tensor, extra: Tensor | None, head: HeadColumns, rows: RowGradients) -> Tensor:
    """-p (logprob_grad + entropy_grad (log p + entropy)) c / temperature, (N, C); the targets' share is not in it."""
    shape, common = _launch(hidden, extra, head)
    count, columns = hidden.shape[0], head.weight.shape[0]
    gradient = hidden.new_empty((count, columns))
    logit_gradients_kernel[(triton.cdiv(count, shape.rows) * triton.cdiv(columns, shape.columns),)](
        rows.lse,
        rows.entropy,
        rows.logprob_grad,
        rows.entropy_grad,
        gradient,
        HAS_ENTROPY_GRAD=rows.entropy_grad is not None,
        **common,
    )
    return gradient


def _launch(
    hidden: Tensor, extra: Tensor | None, head: HeadColumns, *, store_weighted: bool = False
) -> tuple[TileShape, dict]:
    """The tile, and the arguments that both kernels share."""
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (8, 0)
    shape = tile_shape(hidden.dtype, capability, softcap=head.softcap is not None, store_weighted=store_weighted)
    rank = 0 if head.lora_b is None or extra is None else head.lora_b.shape[1]
    width = hidden.shape[1]
    # The interpreter multiplies bfloat16 as if it were an integer; there, and only there, operands are widened.
    interpreted = not isinstance(softmax_tiles_kernel, triton.JITFunction)
    return shape, {
        "hidden": hidden,
        "weight": head.weight,
        "bias": head.bias,
        "extra": extra,
        "lora_b": head.lora_b,
        "rows": hidden.shape[0],
        "columns": head.weight.shape[0],
        "width": width,
        "hidden_stride": hidden.stride(0),
        "weight_stride": head.weight.stride(0),
        "extra_stride": 0 if extra is None else extra.stride(0),
        "lora_b_stride": 0 if head.lora_b is None else head.lora_b.stride(0),
        "inverse_temperature": 1.0 / head.temperature,
        "softcap": head.softcap or 0.0,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "RANK": rank,
        "EVEN_WIDTH": width % shape.depth == 0,
        "WIDEN": interpreted,
        "GROUP": ROW_BLOCKS_PER_GROUP,
        "BLOCK_ROWS": shape.rows,
        "BLOCK_COLUMNS": shape.columns,
        "BLOCK_DEPTH": shape.depth,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


@triton.jit
def softmax_tiles_kernel(
    top,  # out (tiles, rows) float32
    mass,  # out (tiles, rows) float32
    moment,  # out (tiles, rows) float32
    sloped,  # out (rows, columns), dtype of hidden, if STORE_SLOPED
    weighted,  # out (rows, columns), dtype of hidden, if STORE_WEIGHTED
    hidden,
    weight,
    bias,
    extra,
    lora_b,
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    extra_stride,
    lora_b_stride,
    inverse_temperature,
    softcap,
    STORE_SLOPED: tl.constexpr,
    STORE_WEIGHTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile: reads (BLOCK_ROWS + BLOCK_COLUMNS) H inputs, writes three numbers per row (and the tile on request)."""
    row_block, column_block = _tile_of_program(rows, columns, GROUP, BLOCK_ROWS, BLOCK_COLUMNS)
    raw = _raw_logits(
        hidden, weight, extra, lora_b, row_block, column_block, rows, columns, width, hidden_stride, weight_stride,
        extra_stride, lora_b_stride, RANK, EVEN_WIDTH, WIDEN, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
    )  # fmt: skip
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    z, slope = _scaled(raw, bias, column, columns, inverse_temperature, softcap, HAS_BIAS, HAS_SOFTCAP)
    z = tl.where((column < columns)[None, :], z, float("-inf"))

    tile_top = tl.max(z, axis=1)
    # A tile may hold nothing but -inf (a bias can forbid tokens): any finite origin will do then.
    origin = tl.where(tile_top == float("-inf"), 0.0, tile_top)
    # Below -200 the exponential is 0 in float32 anyway, and 0 times a finite number is 0.
    centred = tl.maximum(z - origin[:, None], -200.0, propagate_nan=tl.PropagateNan.ALL)
    exponential = tl.exp(centred)
    out = column_block.to(tl.int64) * rows + row
    tl.store(top + out, tile_top, mask=row < rows)
    tl.store(mass + out, tl.sum(exponential, axis=1), mask=row < rows)
    tl.store(moment + out, tl.sum(exponential * centred, axis=1), mask=row < rows)
    if STORE_SLOPED:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = exponential * slope
        tl.store(sloped + place, value.to(sloped.dtype.element_ty), mask=inside)
        if STORE_WEIGHTED:
            tl.store(weighted + place, (value * centred).to(weighted.dtype.element_ty), mask=inside)


@triton.jit
def logit_gradients_kernel(
    lse,  # (rows,) float32
    entropy,  # (rows,) float32
    logprob_grad,  # (rows,) float32
    entropy_grad,  # (rows,) float32, if HAS_ENTROPY_GRAD
    gradient,  # out (rows, columns), dtype of hidden
    hidden,
    weight,
    bias,
    extra,
    lora_b,
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    extra_stride,
    lora_b_stride,
    inverse_temperature,
    softcap,
    HAS_ENTROPY_GRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile of gradients from recomputed logits: reads (BLOCK_ROWS + BLOCK_COLUMNS) H inputs, writes the tile."""
    row_block, column_block = _tile_of_program(rows, columns, GROUP, BLOCK_ROWS, BLOCK_COLUMNS)
    raw = _raw_logits(
        hidden, weight, extra, lora_b, row_block, column_block, rows, columns, width, hidden_stride, weight_stride,
        extra_stride, lora_b_stride, RANK, EVEN_WIDTH, WIDEN, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
    )  # fmt: skip
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    z, slope = _scaled(raw, bias, column, columns, inverse_temperature, softcap, HAS_BIAS, HAS_SOFTCAP)

    logprob = z - tl.load(lse + row, mask=row < rows, other=0.0)[:, None]
    logprob = tl.maximum(logprob, -200.0, propagate_nan=tl.PropagateNan.ALL)
    factor = -tl.load(logprob_grad + row, mask=row < rows, other=0.0)[:, None]
    if HAS_ENTROPY_GRAD:
        row_entropy = tl.load(entropy + row, mask=row < rows, other=0.0)[:, None]
        row_entropy_grad = tl.load(entropy_grad + row, mask=row < rows, other=0.0)[:, None]
        factor = factor - row_entropy_grad * (logprob + row_entropy)
    value = tl.exp(logprob) * factor * slope * inverse_temperature
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(gradient + place, value.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _tile_of_program(rows, columns, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Groups of row blocks walk the vocabulary together: a weight tile is read once per group, not once per block."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    group = program // (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = program % (GROUP * column_blocks)
    return group * GROUP + within % height, within // height


@triton.jit
def _raw_logits(
    hidden,
    weight,
    extra,
    lora_b,
    row_block,
    column_block,
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    extra_stride,
    lora_b_stride,
    RANK: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """x W^T + u B^T of one tile, float32. Rows and columns beyond the end repeat the last one: no masks in the loop."""
    row = tl.minimum(row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), rows - 1).to(tl.int64)
    column = tl.minimum(column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS), columns - 1).to(tl.int64)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    total = _add_product(
        total, hidden + row * hidden_stride, weight + column * weight_stride, width, EVEN_WIDTH, WIDEN, BLOCK_DEPTH
    )
    if RANK > 0:
        # An adapter's rank is small: one or two steps more.
        total = _add_product(
            total, extra + row * extra_stride, lora_b + column * lora_b_stride, RANK, False, WIDEN, BLOCK_DEPTH
        )
    return total


@triton.jit
def _add_product(
    total, left_rows, right_rows, depth, EVEN: tl.constexpr, WIDEN: tl.constexpr, BLOCK_DEPTH: tl.constexpr
):
    """total + left right^T; the pointers are to the rows of both, whose elements lie together."""
    step = tl.arange(0, BLOCK_DEPTH)
    for start in range(0, depth, BLOCK_DEPTH):
        if EVEN:
            left = tl.load(left_rows[:, None] + (start + step)[None, :])
            right = tl.load(right_rows[None, :] + (start + step)[:, None])
        else:
            left = tl.load(
                left_rows[:, None] + (start + step)[None, :], mask=(start + step < depth)[None, :], other=0.0
            )
            right = tl.load(
                right_rows[None, :] + (start + step)[:, None], mask=(start + step < depth)[:, None], other=0.0
            )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        # For float32 inputs: three tf32 products per step, exact to about 2**-21. Ignored for 16-bit inputs.
        total = tl.dot(left, right, total, input_precision="tf32x3")
    return total


@triton.jit
def _scaled(
    raw,
    bias,
    column,
    columns,
    inverse_temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """z, and d z / d raw times the temperature (1 without a soft-cap)."""
    slope = 1.0
    if HAS_BIAS:
        raw += tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    if HAS_SOFTCAP:
        # tanh(a) = sign(a) (1 - e) / (1 + e) with e = exp(-2 |a|); its derivative is 4 e / (1 + e)^2.
        ratio = raw / softcap
        decay = tl.exp(-2.0 * tl.abs(ratio))
        size = (1.0 - decay) / (1.0 + decay)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        raw = softcap * tl.where(ratio < 0.0, -size, size)
    return raw * inverse_temperature, slope
