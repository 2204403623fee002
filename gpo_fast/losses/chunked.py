"""Log-probabilities of a linear head and their gradients in torch, in chunks of rows and of vocabulary.

With z the logits of a row, p = softmax(z), y a target of the row and c = d z / d raw (1 / temperature, times
the slope of the soft-cap):

    logprob = z_y - lse(z)             d logprob / d raw_v = (1[v = y] - p_v) c_v
    entropy = lse(z) - sum_v p_v z_v   d entropy / d raw_v = -p_v (z_v - sum_u p_u z_u) c_v

`forward` keeps, on request, the unscaled rows that a frozen head needs for its backward (`backward_frozen`):
nothing is then recomputed, whatever the loss does with the log-probabilities. A row's own targets are left
out of these sums and added in the backward with the weight p_y - 1 in full precision: where p_y is almost 1,
the difference W_y - sum_v p_v W_v would otherwise be nothing but rounding error. `backward` recomputes the
logits and also gives the gradients of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gpo_fast.losses.head import Head, matmul_wide, wide_dtype

# Elements of one chunk of logits: 8 MiB in float32 on a CPU, so that the passes over a chunk stay in its
# cache.
CPU_CHUNK_ELEMENTS = 1 << 21
GPU_CHUNK_ELEMENTS = 1 << 26
ROWS_PER_CHUNK = 1024


class Rows(NamedTuple):
    """What the forward pass knows of N rows and K targets, in the wide dtype; the last two in that of
    `hidden`."""

    target_logits: Tensor  # (K,)
    target_slopes: Tensor  # (K,)  d z / d raw at the target
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,)  meaningless unless wanted
    expected: Tensor | None  # (N, H)  sum of p_v c_v W_v over all v but the row's targets
    entropy_row: Tensor | None  # (N, H)  sum of p_v (z_v - mean) c_v W_v over all v but the row's targets


class Gradients(NamedTuple):
    """Gradients of the inputs, None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    extra: Tensor | None
    lora_b: Tensor | None


def forward(
    head: Head,
    hidden: Tensor,
    extra: Tensor | None,
    targets: Tensor,
    target_rows: Tensor,
    *,
    want_entropy: bool = False,
    want_expected: bool = False,
    want_entropy_row: bool = False,
) -> Rows:
    """One pass over the vocabulary. hidden (N, H), extra (N, r), targets (K,), target_rows (K,) ascending.

    A target outside [0, V), as it occurs where `head` is a shard of the vocabulary, gets the logit -inf.
    `want_entropy_row` needs `want_expected`.
    """
    chunks = [
        _forward_rows(
            head,
            hidden[rows],
            None if extra is None else extra[rows],
            targets[entries],
            target_rows[entries] - rows.start,
            want_entropy or want_entropy_row,
            want_expected,
            want_entropy_row,
        )
        for rows, entries in row_chunks(hidden.shape[0], target_rows)
    ]
    columns = (torch.cat(column) if column[0] is not None else None for column in zip(*chunks))
    return Rows(*columns)  # type: ignore[arg-type]


def _forward_rows(
    head: Head,
    hidden: Tensor,
    extra: Tensor | None,
    targets: Tensor,
    target_rows: Tensor,
    want_entropy: bool,
    want_expected: bool,
    want_entropy_row: bool,
) -> Rows:
    count, width = hidden.shape
    top = hidden.new_full((count,), -torch.inf, dtype=wide_dtype(hidden.dtype))  # running maximum
    mass = torch.zeros_like(top)  # sum exp(z - top)
    moment = torch.zeros_like(top)  # sum exp(z - top) (z - top)
    target_logits = top.new_full(targets.shape, -torch.inf)
    target_slopes = torch.zeros_like(target_logits)
    expected = top.new_zeros((count, width)) if want_expected else None
    entropy_row = top.new_zeros((count, width)) if want_entropy_row else None

    for vocab in vocab_chunks(head, count):
        logits, slope = head.logits(hidden, extra, vocab)
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
        if want_entropy:
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
    head: Head,
    rows: Rows,
    targets: Tensor,
    target_rows: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient (N, H) of the hidden states from the rows that `forward` kept, without the logits."""
    if rows.expected is None:
        raise ValueError("the forward pass kept no gradient rows")
    share, row_grad = target_shares(rows, target_rows, grad_logprobs, grad_entropy)
    grad = rows.expected * -row_grad.unsqueeze(-1)
    if grad_entropy is not None and rows.entropy_row is not None:
        grad -= rows.entropy_row * grad_entropy.unsqueeze(-1)
    for part in torch.arange(targets.shape[0], device=targets.device).split(ROWS_PER_CHUNK):
        inside = part[(targets[part] >= 0) & (targets[part] < head.weight.shape[0])]
        grad.index_add_(0, target_rows[inside], head.weight[targets[inside]] * share[inside].unsqueeze(-1))
    return grad


def target_shares(
    rows: Rows, target_rows: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """d loss / d raw logit at each target (K,), and the sum of each row's logprob gradients (N,)."""
    row_grad = torch.zeros_like(rows.lse).index_add_(0, target_rows, grad_logprobs)
    prob = torch.exp(rows.target_logits - rows.lse[target_rows])
    share = grad_logprobs - row_grad[target_rows] * prob
    if grad_entropy is not None:
        centred = rows.target_logits - rows.lse[target_rows] + rows.entropy[target_rows]
        share = share - grad_entropy[target_rows] * prob * centred.nan_to_num(neginf=0.0)
    return share * rows.target_slopes, row_grad


def backward(
    head: Head,
    hidden: Tensor,
    extra: Tensor | None,
    targets: Tensor,
    target_rows: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    *,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    want_extra: bool,
    want_lora_b: bool,
) -> Gradients:
    """Recompute the logits and give the gradients that are wanted, in the dtypes of their inputs."""
    wide = lse.dtype
    row_grad = torch.zeros_like(lse).index_add_(0, target_rows, grad_logprobs)
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=wide) if want_hidden else None
    grad_weight = hidden.new_zeros(head.weight.shape, dtype=wide) if want_weight else None
    grad_bias = hidden.new_zeros(head.weight.shape[0], dtype=wide) if want_bias else None
    grad_extra = hidden.new_zeros(extra.shape, dtype=wide) if want_extra and extra is not None else None
    grad_lora_b = hidden.new_zeros(head.lora_b.shape, dtype=wide) if want_lora_b and head.lora_b is not None else None
    for rows, entries in row_chunks(hidden.shape[0], target_rows):
        x, u = hidden[rows], None if extra is None else extra[rows]
        for vocab in vocab_chunks(head, x.shape[0]):
            logits, slope = head.logits(x, u, vocab)
            here, at = entries_within(vocab, targets[entries], target_rows[entries] - rows.start)
            log_probs = logits.sub_(lse[rows].unsqueeze(-1))
            grad = torch.exp(log_probs)
            if grad_entropy is None:
                grad *= -row_grad[rows].unsqueeze(-1)
            else:
                centred = log_probs.add_(entropy[rows].unsqueeze(-1)).nan_to_num_(neginf=0.0)
                grad *= centred.mul_(-grad_entropy[rows].unsqueeze(-1)) - row_grad[rows].unsqueeze(-1)
            grad[at] += grad_logprobs[entries][here]
            if slope is not None:
                grad *= slope
            if head.temperature != 1.0:
                grad /= head.temperature
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] += matmul_wide(narrow, head.weight[vocab])
            if grad_weight is not None:
                grad_weight[vocab] += matmul_wide(narrow.t(), x)
            if grad_bias is not None:
                grad_bias[vocab] += grad.sum(0)
            if grad_extra is not None and head.lora_b is not None:
                grad_extra[rows] += matmul_wide(narrow, head.lora_b[vocab])
            if grad_lora_b is not None and u is not None:
                grad_lora_b[vocab] += matmul_wide(narrow.t(), u)

    def cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if gradient is None or like is None else gradient.to(like.dtype)

    return Gradients(
        cast(grad_hidden, hidden),
        cast(grad_weight, head.weight),
        cast(grad_bias, head.bias),
        cast(grad_extra, extra),
        cast(grad_lora_b, head.lora_b),
    )


def row_chunks(count: int, target_rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of rows, each with the slice of the entries that belong to them (`target_rows` is ascending)."""
    starts = range(0, max(count, 1), ROWS_PER_CHUNK)
    if len(starts) == 1:
        yield slice(0, count), slice(0, target_rows.shape[0])
        return
    bounds = torch.tensor([*starts, count], device=target_rows.device)
    entries = torch.searchsorted(target_rows.contiguous(), bounds).tolist()
    for index, start in enumerate(starts):
        yield slice(start, min(start + ROWS_PER_CHUNK, count)), slice(entries[index], entries[index + 1])


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
