"""Joins the tiles of `linear_logprob.softmax_tiles` into one softmax per row, in the order of the vocabulary.

A row's state over the vocabulary so far is (top, mass, moment), as of a tile, starting from (-inf, 0, 0). With
m = max(top, top') the sums of the union of two disjoint ranges are

    mass   = e^(top - m) mass + e^(top' - m) mass'
    moment = e^(top - m) (moment + (top - m) mass) + e^(top' - m) (moment' + (top' - m) mass')

`merge` folds the tiles of a range of the vocabulary into the state. `recentre` brings what the tiles stored from
their own maxima to the new common one, so that it can be multiplied by W; `accumulate` adds that product to the
sums kept so far, which first move to the new maximum themselves. `tile_gradients` turns what the tiles stored into the
gradient of their logits instead, once the log-sum-exp of the whole row is known and the loss has been derived.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gpo_fast.kernels.linear_logprob import RowGradients, Tiles
from torch import Tensor


class SoftmaxState(NamedTuple):
    """Sums over the vocabulary so far, (N,) float32 each; updated in place."""

    top: Tensor
    mass: Tensor
    moment: Tensor
    rise: Tensor  # by how much the last merge raised the maximum; 0 where there was none before

    @classmethod
    def empty(cls, like: Tensor) -> SoftmaxState:
        """The state of the rows of `like` before any column was seen."""
        rows = like.shape[0]
        new = {"dtype": torch.float32}
        return cls(like.new_full((rows,), -torch.inf, **new), *(like.new_zeros((rows,), **new) for _ in range(3)))

    @property
    def lse(self) -> Tensor:
        return self.top + self.mass.log()

    @property
    def mean(self) -> Tensor:
        """sum p (z - top): the entropy is log(mass) minus this."""
        return self.moment / self.mass


def merge(state: SoftmaxState, tiles: Tiles) -> None:
    """Fold the tiles into the state."""
    count, rows = tiles.top.shape
    block = 64
    merge_kernel[(triton.cdiv(rows, block),)](
        state.top, state.mass, state.moment, state.rise, tiles.top, tiles.mass, tiles.moment, rows, count, BLOCK=block
    )


def recentre(state: SoftmaxState, tiles: Tiles) -> None:
    """Stored values e^(z - tile top) c, and those times (z - tile top), in place to the state's top."""
    if tiles.sloped is None:
        raise ValueError("the tiles were not stored")
    rows, columns = tiles.sloped.shape
    height = 16
    recentre_kernel[(triton.cdiv(rows, height), tiles.top.shape[0])](
        tiles.sloped,
        tiles.weighted,
        tiles.top,
        state.top,
        rows,
        columns,
        HAS_WEIGHTED=tiles.weighted is not None,
        BLOCK_ROWS=height,
        BLOCK_COLUMNS=tiles.width,
    )


def accumulate(state: SoftmaxState, kept: Tensor, product: Tensor, below: Tensor | None = None) -> None:
    """kept (N, H) = e^-rise (kept - rise * below) + product, in place; all float32.

    `below` is needed where `kept` is weighted by z - top: when the maximum rises, that factor falls.
    """
    rows, width = kept.shape
    block = 1024
    accumulate_kernel[(rows, triton.cdiv(width, block))](
        kept, product, below, state.rise, width, HAS_BELOW=below is not None, BLOCK=block
    )


def tile_gradients(tiles: Tiles, rows: RowGradients, temperature: float) -> Tensor:
    """-p (logprob_grad + entropy_grad (log p + entropy)) c / temperature over the stored tiles, (N, C).

    The targets' share is not in it. With entropy_grad, the tiles must hold `weighted`.
    """
    if tiles.sloped is None or (rows.entropy_grad is not None and tiles.weighted is None):
        raise ValueError("the tiles were not stored")
    count, columns = tiles.sloped.shape
    height = 16
    tile_gradients_kernel[(triton.cdiv(count, height), tiles.top.shape[0])](
        tiles.sloped,
        tiles.weighted if rows.entropy_grad is not None else None,
        tiles.top,
        rows.lse,
        rows.entropy,
        rows.logprob_grad,
        rows.entropy_grad,
        count,
        columns,
        1.0 / temperature,
        HAS_ENTROPY_GRAD=rows.entropy_grad is not None,
        BLOCK_ROWS=height,
        BLOCK_COLUMNS=tiles.width,
    )
    return tiles.sloped


@triton.jit
def merge_kernel(top, mass, moment, rise, tile_top, tile_mass, tile_moment, rows, tiles, BLOCK: tl.constexpr):
    """BLOCK rows: reads three numbers of every tile in order; no reduction crosses programs."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    first = tl.load(top + row, mask=inside, other=float("-inf"))
    highest = first
    total = tl.load(mass + row, mask=inside, other=0.0)
    total_moment = tl.load(moment + row, mask=inside, other=0.0)
    for tile in range(tiles):
        at = tl.cast(tile, tl.int64) * rows + row
        other = tl.load(tile_top + at, mask=inside, other=float("-inf"))
        other_mass = tl.load(tile_mass + at, mask=inside, other=0.0)
        other_moment = tl.load(tile_moment + at, mask=inside, other=0.0)
        new = tl.maximum(highest, other, propagate_nan=tl.PropagateNan.ALL)
        # A range that holds nothing but -inf has no mass; its distance to the maximum is set to 0, not to NaN.
        ours = tl.where(highest == float("-inf"), 0.0, highest - new)
        theirs = tl.where(other == float("-inf"), 0.0, other - new)
        shrink, grow = tl.exp(ours), tl.exp(theirs)
        # A maximum that is thousands lower has the factor 0; 0 times a finite number stays 0.
        total_moment = shrink * (total_moment + ours * total) + grow * (other_moment + theirs * other_mass)
        total = shrink * total + grow * other_mass
        highest = new
    tl.store(rise + row, tl.where(first == float("-inf"), 0.0, highest - first), mask=inside)
    tl.store(top + row, highest, mask=inside)
    tl.store(mass + row, total, mask=inside)
    tl.store(moment + row, total_moment, mask=inside)


@triton.jit
def recentre_kernel(
    sloped,  # in, out (rows, columns)
    weighted,  # in, out (rows, columns), if HAS_WEIGHTED
    tile_top,  # (tiles, rows) float32
    top,  # (rows,) float32
    rows,
    columns,
    HAS_WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One tile's columns: reads and writes each stored number once."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    own = tl.load(tile_top + tile.to(tl.int64) * rows + row, mask=row < rows, other=float("-inf"))
    fall = tl.where(own == float("-inf"), 0.0, own - tl.load(top + row, mask=row < rows, other=0.0))[:, None]
    factor = tl.exp(fall)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(sloped + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_WEIGHTED:
        product = tl.load(weighted + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(weighted + place, (factor * (product + fall * value)).to(weighted.dtype.element_ty), mask=inside)
    tl.store(sloped + place, (factor * value).to(sloped.dtype.element_ty), mask=inside)


@triton.jit
def tile_gradients_kernel(
    sloped,  # in: exp(z - tile top) c; out: the gradient; (rows, columns)
    weighted,  # exp(z - tile top) (z - tile top) c, (rows, columns), if HAS_ENTROPY_GRAD
    tile_top,  # (tiles, rows) float32
    lse,  # (rows,) float32
    entropy,  # (rows,) float32
    logprob_grad,  # (rows,) float32
    entropy_grad,  # (rows,) float32, if HAS_ENTROPY_GRAD
    rows,
    columns,
    inverse_temperature,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One tile's columns: reads each stored number once, writes the gradient over the first of the two.

    With d = tile top - lse, p = exp(d) exp(z - tile top) and log p = d + (z - tile top).
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    own = tl.load(tile_top + tile.to(tl.int64) * rows + row, mask=row < rows, other=float("-inf"))
    # A tile that holds nothing but -inf stored zeros.
    below = tl.where(own == float("-inf"), 0.0, own - tl.load(lse + row, mask=row < rows, other=0.0))
    factor = -tl.load(logprob_grad + row, mask=row < rows, other=0.0)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(sloped + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ENTROPY_GRAD:
        row_entropy_grad = tl.load(entropy_grad + row, mask=row < rows, other=0.0)
        row_entropy = tl.load(entropy + row, mask=row < rows, other=0.0)
        product = tl.load(weighted + place, mask=inside, other=0.0).to(tl.float32)
        factor = factor - row_entropy_grad * (below + row_entropy)
        value = factor[:, None] * value - row_entropy_grad[:, None] * product
    else:
        value = factor[:, None] * value
    value = (tl.exp(below) * inverse_temperature)[:, None] * value
    tl.store(sloped + place, value.to(sloped.dtype.element_ty), mask=inside)


@triton.jit
def accumulate_kernel(kept, product, below, rise, width, HAS_BELOW: tl.constexpr, BLOCK: tl.constexpr):
    """One piece of a row of `kept`: reads it, the product and (on request) `below`, writes it back."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = row.to(tl.int64) * width + column
    inside = column < width
    climb = tl.load(rise + row)
    value = tl.load(kept + place, mask=inside, other=0.0)
    if HAS_BELOW:
        value -= climb * tl.load(below + place, mask=inside, other=0.0)
    value = tl.exp(-climb) * value + tl.load(product + place, mask=inside, other=0.0)
    tl.store(kept + place, value, mask=inside)
