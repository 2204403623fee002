"""Log-probabilities of a linear head and their gradients in torch, in chunks of rows and of vocabulary.

The path for every device and dtype that has no kernels of its own. The formulas are in `rows.py`. On a GPU, rows
with several targets add them with atomics (`index_add_`): only there the last bits may differ from run to run.

`forward` and `backward` are two passes over the vocabulary; `forward_logits` and `add_gradients` are one, for some
rows whose logits are kept in between (see `one_pass.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpo_fast.losses.head import Head, add_product, matmul_wide, wide_dtype
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

# Elements of one chunk of logits: 8 MiB in float32 on a CPU, so that the passes over a chunk stay in its
# cache.
CPU_CHUNK_ELEMENTS = 1 << 21
GPU_CHUNK_ELEMENTS = 1 << 26
ROWS_PER_CHUNK = 1024
# Logits that one pass keeps: 1 GiB in float32.
KEPT_ELEMENTS = 1 << 28


def forward(head: Head, batch: Batch, wants: ForwardWants) -> Rows:
    """One pass over the vocabulary."""
    chunks = [_forward_rows(head, part, wants) for _, _, part in row_chunks(batch)]
    columns = (torch.cat(column) if column[0] is not None else None for column in zip(*chunks))
    return Rows(*columns)  # type: ignore[arg-type]


def _forward_rows(head: Head, batch: Batch, wants: ForwardWants, kept: Tensor | None = None) -> Rows:
    """The rows of `batch` at once; `kept` (N, V) gets their logits."""
    hidden, targets, target_rows = batch.hidden, batch.targets, batch.target_rows
    count, width = hidden.shape
    top = hidden.new_full((count,), -torch.inf, dtype=wide_dtype(hidden.dtype))  # running maximum
    mass = torch.zeros_like(top)  # sum exp(z - top)
    moment = torch.zeros_like(top)  # sum exp(z - top) (z - top)
    target_logits = top.new_full(targets.shape, -torch.inf)
    target_slopes = torch.zeros_like(target_logits)
    expected = top.new_zeros((count, width)) if wants.expected else None
    entropy_row = top.new_zeros((count, width)) if wants.entropy_row else None

    for vocab in vocab_chunks(head, count):
        logits, slope = head.logits(hidden, batch.extra, vocab)
        if kept is not None:
            kept[:, vocab] = logits
        here, at = entries_within(vocab, targets, target_rows)
        target_logits[here] = logits[at]
        target_slopes[here] = (1.0 if slope is None else slope[at]) / head.temperature

        new_top = torch.maximum(top, logits.amax(-1))
        # While both maxima are -inf nothing has been summed yet, and any finite origin will do.
        origin = torch.where(new_top == -torch.inf, 0.0, new_top)
        rise = torch.where(top == -torch.inf, 0.0, origin - top)
        shrink = torch.exp(-rise)
        top = new_top
        centred = logits.sub_(origin.unsqueeze(-1))
        weights = torch.exp(centred)
        if wants.entropy or wants.entropy_row:
            moments = (weights * centred).nan_to_num_(nan=0.0)  # 0 * -inf
            moment = shrink * (moment - rise * mass) + moments.sum(-1)
        mass = shrink * mass + weights.sum(-1)
        if expected is None:
            continue
        sloped = weights if slope is None else weights.mul_(slope)
        sloped[at] = 0.0
        if entropy_row is not None:
            weighted = (sloped * centred).nan_to_num_(nan=0.0)
            entropy_row.sub_(rise.unsqueeze(-1) * expected).mul_(shrink.unsqueeze(-1))
            entropy_row += matmul_wide(weighted.to(hidden.dtype), head.weight[vocab])
        expected.mul_(shrink.unsqueeze(-1))
        expected += matmul_wide(sloped.to(hidden.dtype), head.weight[vocab])

    mean = moment / mass
    if expected is not None:
        expected.div_((mass * head.temperature).unsqueeze(-1))
        if entropy_row is not None:
            entropy_row.div_((mass * head.temperature).unsqueeze(-1)).sub_(mean.unsqueeze(-1) * expected)
            entropy_row = entropy_row.to(hidden.dtype)
        expected = expected.to(hidden.dtype)
    return Rows(target_logits, target_slopes, top + mass.log(), mass.log() - mean, expected, entropy_row)


def backward_frozen(
    head: Head, rows: Rows, targets: Tensor, target_rows: Tensor, first: Tensor, gradients: OutputGradients
) -> Tensor:
    """Gradient (N, H) of the hidden states from the rows that `forward` kept, without the logits."""
    if rows.expected is None:
        raise ValueError("the forward pass kept no gradient rows")
    row_gradients = row_sums(gradients.logprobs, first)
    share = target_shares(rows, target_rows, gradients, row_gradients)
    grad = rows.expected * -row_gradients.unsqueeze(-1)
    if gradients.entropy is not None and rows.entropy_row is not None:
        grad -= rows.entropy_row * gradients.entropy.unsqueeze(-1)
    for part in torch.arange(targets.shape[0], device=targets.device).split(ROWS_PER_CHUNK):
        inside = part[(targets[part] >= 0) & (targets[part] < head.weight.shape[0])]
        grad.index_add_(0, target_rows[inside], head.weight[targets[inside]] * share[inside].unsqueeze(-1))
    return grad


def backward(
    head: Head, batch: Batch, lse: Tensor, entropy: Tensor, gradients: OutputGradients, wants: GradientWants
) -> Gradients:
    """Recompute the logits and give the gradients that are wanted."""
    totals = Totals.of_head(head, wants).with_rows(batch, wants)
    for rows, entries, part in row_chunks(batch):
        of_part = OutputGradients(
            gradients.logprobs[entries], None if gradients.entropy is None else gradients.entropy[rows]
        )
        _add_gradients(head, part, lse[rows], entropy[rows], of_part, totals.of_rows(rows))
    return totals.gradients(head)


def rows_at_once(head: Head, hidden: Tensor) -> int:
    """How many rows' logits one pass keeps."""
    return max(1, min(ROWS_PER_CHUNK, KEPT_ELEMENTS // head.weight.shape[0]))


def forward_logits(head: Head, batch: Batch, want_entropy: bool, entropy_needs_grad: bool) -> tuple[Rows, Tensor]:
    """The first half of one pass: what is known of the rows, and their logits (N, V)."""
    kept = batch.hidden.new_empty((batch.count, head.weight.shape[0]), dtype=wide_dtype(batch.hidden.dtype))
    return _forward_rows(head, batch, ForwardWants(entropy=want_entropy or entropy_needs_grad), kept), kept


def add_gradients(
    head: Head, batch: Batch, rows: Rows, kept: Tensor, gradients: OutputGradients, totals: Totals
) -> None:
    """The second half: add to `totals` what these rows give. Overwrites the kept logits."""
    _add_gradients(head, batch, rows.lse, rows.entropy, gradients, totals, kept)


def _add_gradients(
    head: Head,
    batch: Batch,
    lse: Tensor,
    entropy: Tensor,
    gradients: OutputGradients,
    totals: Totals,
    kept: Tensor | None = None,
) -> None:
    x, u = batch.hidden, batch.extra
    row_gradients = row_sums(gradients.logprobs, batch.first_entries())
    for vocab in vocab_chunks(head, batch.count):
        if kept is None:
            logits, slope = head.logits(x, u, vocab)
        else:
            logits = kept[:, vocab]
            slope = head.slope(logits)
        here, at = entries_within(vocab, batch.targets, batch.target_rows)
        log_probs = logits.sub_(lse.unsqueeze(-1))
        grad = torch.exp(log_probs)
        if gradients.entropy is None:
            grad *= -row_gradients.unsqueeze(-1)
        else:
            centred = log_probs.add_(entropy.unsqueeze(-1)).nan_to_num_(neginf=0.0)
            grad *= centred.mul_(-gradients.entropy.unsqueeze(-1)) - row_gradients.unsqueeze(-1)
        grad[at] += gradients.logprobs[here]
        if slope is not None:
            grad *= slope
        if head.temperature != 1.0:
            grad /= head.temperature
        narrow = grad.to(x.dtype)
        if totals.hidden is not None:
            add_product(totals.hidden, narrow, head.weight[vocab])
        if totals.weight is not None:
            add_product(totals.weight[vocab], narrow.t(), x)
        if totals.bias is not None:
            totals.bias[vocab] += grad.sum(0)
        if totals.extra is not None and head.lora_b is not None:
            add_product(totals.extra, narrow, head.lora_b[vocab])
        if totals.lora_b is not None and u is not None:
            add_product(totals.lora_b[vocab], narrow.t(), u)


def row_chunks(batch: Batch) -> Iterator[tuple[slice, slice, Batch]]:
    """Slices of rows, each with the slice of the entries that belong to them, and that part of the batch."""
    starts = range(0, max(batch.count, 1), ROWS_PER_CHUNK)
    if len(starts) == 1:
        yield slice(0, batch.count), slice(0, batch.targets.shape[0]), batch
        return
    bounds = torch.tensor([*starts, batch.count], device=batch.target_rows.device)
    edges = torch.searchsorted(batch.target_rows.contiguous(), bounds).tolist()
    for index, start in enumerate(starts):
        rows = slice(start, min(start + ROWS_PER_CHUNK, batch.count))
        entries = slice(edges[index], edges[index + 1])
        extra = None if batch.extra is None else batch.extra[rows]
        yield (
            rows,
            entries,
            Batch(batch.hidden[rows], extra, batch.targets[entries], batch.target_rows[entries] - start),
        )


def vocab_chunks(head: Head, count: int) -> Iterator[slice]:
    """Slices of the vocabulary such that a chunk of logits for `count` rows has the intended size."""
    elements = CPU_CHUNK_ELEMENTS if head.weight.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    vocab = head.weight.shape[0]
    size = min(vocab, max(256, elements // max(count, 1)))
    for start in range(0, vocab, size):
        yield slice(start, min(start + size, vocab))


def entries_within(vocab: slice, targets: Tensor, target_rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which entries (a mask over K) have their target in this chunk, and their (row, column) in it."""
    here = (targets >= vocab.start) & (targets < vocab.stop)
    return here, (target_rows[here], targets[here] - vocab.start)
