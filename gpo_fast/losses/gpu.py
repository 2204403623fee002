"""The Triton kernels of the losses (kernels/linear_logprob*.py) on a CUDA device, chunk by chunk.

A kept row costs one more product with W, H numbers wide: it, and the products of the backward, go to cuBLAS
(`matmul_wide`), which is at the ceiling there. The logits' own product is in our kernel, because a plain one would
write float32 logits to memory and read them again: 8 bytes for each, where 2 H multiply-adds take about as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpo_fast.kernels.linear_logprob import HeadColumns, RowGradients, Tiles, logit_gradients, softmax_tiles
from gpo_fast.kernels.linear_logprob_merge import SoftmaxState, accumulate, merge, recentre, tile_gradients
from gpo_fast.kernels.linear_logprob_targets import frozen_backward, target_logits, write_targets
from gpo_fast.losses.head import Head, add_product, matmul_wide
from gpo_fast.losses.rows import (
    Batch,
    ForwardWants,
    Gradients,
    GradientWants,
    OutputGradients,
    Rows,
    Totals,
    row_sums,
    target_shares,
)

# A block of stored exponentials or gradients is 2,048 rows by 16,384 columns: 64 MiB in bfloat16. Wider, and it
# leaves the second-level cache sooner; narrower, and the sums of H numbers per row are read and written more often
# (12 H bytes per row and block, against 8 bytes for each of its columns).
ROWS = 2048
COLUMNS = 16384
# Without stored blocks only three numbers per row and tile are alive.
ROWS_WITHOUT_BLOCKS = 8192
# One pass stores a block of all columns: 1,024 rows by 151,936 are 297 MiB in bfloat16. The head's gradient is read and
# written once for so many rows.
ROWS_OF_ONE_PASS = 1024


def supported(head: Head, hidden: Tensor) -> bool:
    """Whether these inputs can go to the Triton kernels."""
    return (
        hidden.is_cuda
        and hidden.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and hidden.shape[0] > 0
        and torch.cuda.get_device_capability(hidden.device)[0] >= 8
    )


def forward(head: Head, batch: Batch, wants: ForwardWants) -> Rows:
    """`chunked.forward`; the entropy is always computed."""
    head = _dense(head)
    columns = _columns(head, slice(0, head.weight.shape[0]))
    logits, slopes = target_logits(batch.hidden, batch.extra, columns, batch.targets, batch.target_rows)
    run = _forward_kept if wants.expected else _forward_sums
    parts = [
        run(head, batch, rows, wants) for rows in _slices(batch.count, ROWS if wants.expected else ROWS_WITHOUT_BLOCKS)
    ]
    lse, entropy, expected, entropy_row = (None if column[0] is None else torch.cat(column) for column in zip(*parts))
    return Rows(logits, slopes, lse, entropy, expected, entropy_row)  # type: ignore[arg-type]


def _forward_sums(head: Head, batch: Batch, rows: slice, wants: ForwardWants) -> tuple[Tensor, Tensor, None, None]:
    hidden, extra = _rows_of(batch, rows)
    state = SoftmaxState.empty(hidden)
    merge(state, softmax_tiles(hidden, extra, _columns(head, slice(0, head.weight.shape[0]))))
    return state.lse, state.mass.log() - state.mean, None, None


def _forward_kept(
    head: Head, batch: Batch, rows: slice, wants: ForwardWants
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    hidden, extra = _rows_of(batch, rows)
    state = SoftmaxState.empty(hidden)
    expected = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    entropy_row = torch.zeros_like(expected) if wants.entropy_row else None
    for vocab in _slices(head.weight.shape[0], COLUMNS):
        columns = _columns(head, vocab)
        tiles = softmax_tiles(hidden, extra, columns, store_sloped=True, store_weighted=entropy_row is not None)
        merge(state, tiles)
        recentre(state, tiles)
        for block in (tiles.sloped, tiles.weighted):
            if block is not None:
                write_targets(block, None, batch.targets, batch.target_rows, rows.start, vocab.start)
        if entropy_row is not None and tiles.weighted is not None:
            accumulate(state, entropy_row, matmul_wide(tiles.weighted, columns.weight), below=expected)
        if tiles.sloped is not None:
            accumulate(state, expected, matmul_wide(tiles.sloped, columns.weight))
    mean = state.mean
    scale = (state.mass * head.temperature).reciprocal_().unsqueeze(-1)
    expected *= scale
    if entropy_row is not None:
        entropy_row = entropy_row.mul_(scale).sub_(mean.unsqueeze(-1) * expected).to(hidden.dtype)
    return state.lse, state.mass.log() - mean, expected.to(hidden.dtype), entropy_row


def backward_frozen(
    head: Head, rows: Rows, targets: Tensor, target_rows: Tensor, first: Tensor, gradients: OutputGradients
) -> Tensor:
    """`chunked.backward_frozen` in one kernel."""
    if rows.expected is None:
        raise ValueError("the forward pass kept no gradient rows")
    row_gradients = row_sums(gradients.logprobs, first)
    share = target_shares(rows, target_rows, gradients, row_gradients)
    # The gradient of a sum is one number, expanded: its stride is 0.
    entropy_gradient = None if gradients.entropy is None else gradients.entropy.contiguous()
    gradient: Tensor = frozen_backward(
        rows.expected, rows.entropy_row, _dense(head).weight, first, targets, share, row_gradients, entropy_gradient
    )
    return gradient


def backward(
    head: Head, batch: Batch, lse: Tensor, entropy: Tensor, gradients: OutputGradients, wants: GradientWants
) -> Gradients:
    """`chunked.backward`: the gradient of a block of logits is made once and feeds every product that needs it."""
    head = _dense(head)
    hidden, extra = batch.hidden, batch.extra
    row_gradients = row_sums(gradients.logprobs, batch.first_entries())
    whole = _columns(head, slice(0, head.weight.shape[0]))
    logits, slopes = target_logits(hidden, extra, whole, batch.targets, batch.target_rows)
    seen = Rows(logits, slopes, lse, entropy, None, None)
    share = target_shares(seen, batch.target_rows, gradients, row_gradients)

    def wide(like: Tensor | None, wanted: bool) -> Tensor | None:
        return torch.zeros_like(like, dtype=torch.float32) if wanted and like is not None else None

    grad_hidden, grad_extra = wide(hidden, wants.hidden), wide(extra, wants.extra)
    grad_weight = torch.empty_like(head.weight) if wants.weight else None
    grad_bias = torch.empty_like(head.bias) if wants.bias and head.bias is not None else None
    grad_lora_b = torch.empty_like(head.lora_b) if wants.lora_b and head.lora_b is not None else None
    for vocab in _slices(head.weight.shape[0], COLUMNS):
        columns = _columns(head, vocab)
        # The head's share of this range is summed over all rows before it is rounded, once.
        part_weight = wide(columns.weight, wants.weight)
        part_bias = wide(columns.bias, wants.bias)
        part_lora_b = wide(columns.lora_b, wants.lora_b)
        for rows in _slices(batch.count, ROWS):
            x, u = _rows_of(batch, rows)
            at = RowGradients(
                lse[rows],
                entropy[rows],
                row_gradients[rows],
                None if gradients.entropy is None else gradients.entropy[rows].contiguous(),
            )
            block = logit_gradients(x, u, columns, at)
            write_targets(block, share, batch.targets, batch.target_rows, rows.start, vocab.start)
            if grad_hidden is not None:
                add_product(grad_hidden[rows], block, columns.weight)
            if grad_extra is not None and columns.lora_b is not None:
                add_product(grad_extra[rows], block, columns.lora_b)
            if part_weight is not None:
                add_product(part_weight, block.t(), x)
            if part_bias is not None:
                part_bias += block.sum(0, dtype=torch.float32)
            if part_lora_b is not None and u is not None:
                add_product(part_lora_b, block.t(), u)
        for whole_gradient, part in ((grad_weight, part_weight), (grad_bias, part_bias), (grad_lora_b, part_lora_b)):
            if whole_gradient is not None and part is not None:
                whole_gradient[vocab] = part
    return Gradients(
        None if grad_hidden is None else grad_hidden.to(hidden.dtype),
        grad_weight,
        grad_bias,
        None if grad_extra is None else grad_extra.to(hidden.dtype),
        grad_lora_b,
    )


def rows_at_once(head: Head, hidden: Tensor) -> int:
    """How many rows' logits one pass keeps."""
    return ROWS_OF_ONE_PASS


def forward_logits(head: Head, batch: Batch, want_entropy: bool, entropy_needs_grad: bool) -> tuple[Rows, Tiles]:
    """`chunked.forward_logits`; what is kept are exponentials of the logits. The entropy is always computed."""
    head = _dense(head)
    columns = _columns(head, slice(0, head.weight.shape[0]))
    logits, slopes = target_logits(batch.hidden, batch.extra, columns, batch.targets, batch.target_rows)
    state = SoftmaxState.empty(batch.hidden)
    tiles = softmax_tiles(batch.hidden, batch.extra, columns, store_sloped=True, store_weighted=entropy_needs_grad)
    merge(state, tiles)
    return Rows(logits, slopes, state.lse, state.mass.log() - state.mean, None, None), tiles


def add_gradients(
    head: Head, batch: Batch, rows: Rows, kept: Tiles, gradients: OutputGradients, totals: Totals
) -> None:
    """`chunked.add_gradients`: the kept exponentials become the gradient of the logits, in place."""
    head = _dense(head)
    row_gradients = row_sums(gradients.logprobs, batch.first_entries())
    share = target_shares(rows, batch.target_rows, gradients, row_gradients)
    entropy_gradient = None if gradients.entropy is None else gradients.entropy.contiguous()
    at = RowGradients(rows.lse, rows.entropy, row_gradients, entropy_gradient)
    block = tile_gradients(kept, at, head.temperature)
    write_targets(block, share, batch.targets, batch.target_rows, 0, 0)
    for total, left, right in (
        (totals.hidden, block, head.weight),
        (totals.extra, block, head.lora_b),
        (totals.weight, block.t(), batch.hidden),
        (totals.lora_b, block.t(), batch.extra),
    ):
        if total is not None and right is not None:
            add_product(total, left, right)
    if totals.bias is not None:
        totals.bias.add_(block.sum(0, dtype=torch.float32))


def _dense(head: Head) -> Head:
    """The head with rows of W whose elements lie together; a tied or sliced weight usually has them already."""
    if head.weight.stride(1) == 1 and (head.lora_b is None or head.lora_b.stride(1) == 1):
        return head
    lora_b = None if head.lora_b is None else head.lora_b.contiguous()
    return Head(head.weight.contiguous(), head.bias, lora_b, head.temperature, head.softcap)


def _columns(head: Head, vocab: slice) -> HeadColumns:
    bias = None if head.bias is None else head.bias[vocab].float()
    lora_b = None if head.lora_b is None else head.lora_b[vocab]
    return HeadColumns(head.weight[vocab], bias, lora_b, head.temperature, head.softcap)


def _rows_of(batch: Batch, rows: slice) -> tuple[Tensor, Tensor | None]:
    return batch.hidden[rows], None if batch.extra is None else batch.extra[rows]


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
