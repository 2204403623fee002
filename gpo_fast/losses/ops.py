"""The custom operators behind `linear_logprob`, and the autograd function that joins them.

Two operators: the forward pass (with the rows that a frozen head keeps) and the recomputing backward pass.
Both have fake implementations, so `torch.compile` and gradient checkpointing see opaque nodes of known
shapes; what is a dataclass elsewhere is a flat list of arguments here, because operators take nothing else. Rows
and entries without a target are dropped inside, before any matrix product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from gpo_fast.losses import dispatch
from gpo_fast.losses.head import IGNORED, Head, wide_dtype
from gpo_fast.losses.parallel import merge_shards, sum_over_shards
from gpo_fast.losses.rows import Batch, ForwardWants, GradientWants, OutputGradients, Rows, first_entries


class LogprobOptions(NamedTuple):
    """What `LinearLogprob` takes beside tensors."""

    temperature: float
    softcap: float | None
    want_entropy: bool
    entropy_needs_grad: bool
    vocab_start: int = 0  # the first row of this shard of the head
    tp_group: ProcessGroup | None = None  # the processes that hold the other shards


@torch.library.custom_op("gpo_fast::linear_logprob_forward", mutates_args=())
def linear_logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_rows: Tensor,
    bias: Tensor | None,
    extra: Tensor | None,
    lora_b: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_start: int,
    want_entropy: bool,
    want_expected: bool,
    want_entropy_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Target logits (K,), their slopes (K,), log-sum-exp (N,), entropy (N,) and the kept rows (N, H) or (0, H).

    Ignored entries have the logit 0, ignored rows (without any kept target) the log-sum-exp 0 and empty sums.
    """
    head = Head(weight, bias, lora_b, temperature, softcap)
    entries, rows, batch = _kept(hidden, extra, targets, target_rows, vocab_start)
    result = dispatch.forward(head, batch, ForwardWants(want_entropy, want_expected, want_entropy_row))
    width = hidden.shape[1]
    outputs = _empty_outputs(hidden, targets, want_expected, want_entropy_row, zeros=True)
    for output, values, where in (
        (outputs[0], result.target_logits, entries),
        (outputs[1], result.target_slopes, entries),
        (outputs[2], result.lse, rows),
        (outputs[3], result.entropy, rows),
    ):
        output[where] = values
    kept = [
        hidden.new_zeros((0, width)) if values is None else _spread(values, rows, hidden.shape[0])
        for values in (result.expected, result.entropy_row)
    ]
    return outputs[0], outputs[1], outputs[2], outputs[3], kept[0], kept[1]


@linear_logprob_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_rows: Tensor,
    bias: Tensor | None,
    extra: Tensor | None,
    lora_b: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_start: int,
    want_entropy: bool,
    want_expected: bool,
    want_entropy_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(hidden, targets, want_expected, want_entropy_row)


@torch.library.custom_op("gpo_fast::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_rows: Tensor,
    bias: Tensor | None,
    extra: Tensor | None,
    lora_b: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_start: int,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, extra and lora_b; empty where `wanted` says no."""
    head = Head(weight, bias, lora_b, temperature, softcap)
    entries, rows, batch = _kept(hidden, extra, targets, target_rows, vocab_start)
    output_gradients = OutputGradients(grad_logprobs[entries], None if grad_entropy is None else grad_entropy[rows])
    gradients = dispatch.backward(head, batch, lse[rows], entropy[rows], output_gradients, GradientWants(*wanted))
    return (
        hidden.new_zeros(0) if gradients.hidden is None else _spread(gradients.hidden, rows, hidden.shape[0]),
        hidden.new_zeros(0) if gradients.weight is None else gradients.weight,
        hidden.new_zeros(0) if gradients.bias is None else gradients.bias,
        hidden.new_zeros(0) if gradients.extra is None else _spread(gradients.extra, rows, hidden.shape[0]),
        hidden.new_zeros(0) if gradients.lora_b is None else gradients.lora_b,
    )


@linear_logprob_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_rows: Tensor,
    bias: Tensor | None,
    extra: Tensor | None,
    lora_b: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_start: int,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth, fifth = (
        torch.empty_like(like) if want and like is not None else hidden.new_empty(0)
        for want, like in zip(wanted, (hidden, weight, bias, extra, lora_b))
    )
    return first, second, third, fourth, fifth


class LinearLogprob(torch.autograd.Function):
    """(log-probabilities (K,), entropies (N,)) with gradients for the hidden states and the head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        extra: Tensor | None,
        lora_b: Tensor | None,
        targets: Tensor,
        target_rows: Tensor,
        options: LogprobOptions,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad
        frozen = needs[0] and not any(needs[1:5])
        rows = Rows(
            *linear_logprob_forward(
                hidden,
                weight,
                targets,
                target_rows,
                bias,
                extra,
                lora_b,
                options.temperature,
                options.softcap,
                options.vocab_start,
                options.want_entropy,
                frozen,
                frozen and options.entropy_needs_grad,
            )
        )
        if options.tp_group is not None:
            rows = merge_shards(rows, targets, target_rows, options.tp_group)
        logprobs = torch.where(targets == IGNORED, 0.0, rows.target_logits - rows.lse[target_rows])
        ctx.frozen = frozen
        ctx.options = options
        ctx.set_materialize_grads(False)
        if frozen:
            ctx.save_for_backward(targets, target_rows, weight, *rows)
        else:
            ctx.save_for_backward(targets, target_rows, weight, rows.lse, rows.entropy, hidden, bias, extra, lora_b)
        if not options.entropy_needs_grad:
            ctx.mark_non_differentiable(rows.entropy)
        return logprobs, rows.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        options: LogprobOptions = ctx.options
        if not options.entropy_needs_grad:
            grad_entropy = None
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        saved = ctx.saved_tensors  # once: gradient checkpointing recomputes the forward pass to give them
        targets, target_rows, weight = saved[:3]
        if grad_logprobs is None:
            assert grad_entropy is not None
            grad_logprobs = grad_entropy.new_zeros(targets.shape)
        grad_logprobs = torch.where(targets == IGNORED, 0.0, grad_logprobs)
        if ctx.frozen:
            gradient = _frozen_gradient(
                weight, Rows(*saved[3:]), targets, target_rows, grad_logprobs, grad_entropy, options
            )
            return (gradient, *(None,) * 7)
        lse, entropy, hidden, bias, extra, lora_b = saved[3:]
        wanted = list(ctx.needs_input_grad[:5])
        gradients = linear_logprob_backward(
            hidden,
            weight,
            targets,
            target_rows,
            bias,
            extra,
            lora_b,
            options.temperature,
            options.softcap,
            options.vocab_start,
            lse,
            entropy,
            grad_logprobs,
            grad_entropy,
            wanted,
        )
        if options.tp_group is not None:
            # Every shard of the vocabulary adds its part to what all processes hold.
            shared = [sum_over_shards(gradients[i], options.tp_group) if wanted[i] else gradients[i] for i in (0, 3)]
            gradients = (shared[0], gradients[1], gradients[2], shared[1], gradients[4])
        return (*(gradient if want else None for want, gradient in zip(wanted, gradients)), None, None, None)


def _frozen_gradient(
    weight: Tensor,
    rows: Rows,
    targets: Tensor,
    target_rows: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    options: LogprobOptions,
) -> Tensor:
    """Gradient (N, H) of the hidden states from the kept rows, in their dtype."""
    assert rows.expected is not None
    dtype = rows.expected.dtype
    if not options.entropy_needs_grad:
        rows = rows._replace(entropy_row=None)
    head = Head(weight, temperature=options.temperature, softcap=options.softcap)
    # An ignored entry stays outside of every vocabulary.
    local = torch.where(targets == IGNORED, -1, targets - options.vocab_start)
    first = first_entries(target_rows, rows.lse.shape[0])
    output_gradients = OutputGradients(grad_logprobs, grad_entropy)
    gradient = dispatch.backward_frozen(head, rows, local, target_rows, first, output_gradients)
    if options.tp_group is not None:
        gradient = sum_over_shards(gradient, options.tp_group)
    return gradient.to(dtype)


def _kept(
    hidden: Tensor, extra: Tensor | None, targets: Tensor, target_rows: Tensor, vocab_start: int
) -> tuple[Tensor, Tensor, Batch]:
    """Indices of the kept entries and of the rows that have any, and the batch that is made of them."""
    entries = (targets != IGNORED).nonzero().squeeze(-1)
    rows, compact_rows = torch.unique_consecutive(target_rows[entries], return_inverse=True)
    batch = Batch(
        _take(hidden, rows),
        None if extra is None else _take(extra, rows),
        targets[entries] - vocab_start,
        compact_rows,
    )
    return entries, rows, batch


def _take(values: Tensor, rows: Tensor) -> Tensor:
    return values.contiguous() if rows.shape[0] == values.shape[0] else values[rows]


def _spread(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Put compact rows back to their places; zeros elsewhere."""
    if rows.shape[0] == count:
        return values
    return values.new_zeros((count, *values.shape[1:])).index_copy_(0, rows, values)


def _empty_outputs(
    hidden: Tensor, targets: Tensor, want_expected: bool, want_entropy_row: bool, zeros: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(hidden.dtype)
    rows, width = hidden.shape
    new = hidden.new_zeros if zeros else hidden.new_empty
    return (
        new(targets.shape, dtype=wide),
        new(targets.shape, dtype=wide),
        new((rows,), dtype=wide),
        new((rows,), dtype=wide),
        new((rows if want_expected and not zeros else 0, width)),
        new((rows if want_entropy_row and not zeros else 0, width)),
    )
