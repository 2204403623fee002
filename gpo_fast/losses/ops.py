"""The custom operators behind `linear_logprob`, and the autograd function that joins them.

Two operators: the forward pass (with the rows that a frozen head keeps) and the recomputing backward pass.
Both have fake implementations, so `torch.compile` and gradient checkpointing see opaque nodes of known
shapes. Rows and entries without a target are dropped inside, before any matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpo_fast.losses import chunked, dispatch
from gpo_fast.losses.head import IGNORED, Head, wide_dtype


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
    want_entropy: bool,
    want_expected: bool,
    want_entropy_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Target logits (K,), their slopes (K,), log-sum-exp (N,), entropy (N,) and the kept rows (N, H) or (0,
    H).

    Ignored entries have the logit 0, ignored rows (without any kept target) the log-sum-exp 0 and empty sums.
    """
    head = Head(weight, bias, lora_b, temperature, softcap)
    entries, rows, compact_rows = _kept(targets, target_rows, hidden.shape[0])
    result = dispatch.forward(
        head,
        _take(hidden, rows),
        None if extra is None else _take(extra, rows),
        targets[entries],
        compact_rows,
        want_entropy=want_entropy,
        want_expected=want_expected,
        want_entropy_row=want_entropy_row,
    )
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
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, extra and lora_b; empty where `wanted` says no."""
    head = Head(weight, bias, lora_b, temperature, softcap)
    entries, rows, compact_rows = _kept(targets, target_rows, hidden.shape[0])
    gradients = dispatch.backward(
        head,
        _take(hidden, rows),
        None if extra is None else _take(extra, rows),
        targets[entries],
        compact_rows,
        lse[rows],
        entropy[rows],
        grad_logprobs[entries],
        None if grad_entropy is None else grad_entropy[rows],
        want_hidden=wanted[0],
        want_weight=wanted[1],
        want_bias=wanted[2],
        want_extra=wanted[3],
        want_lora_b=wanted[4],
    )
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
        temperature: float,
        softcap: float | None,
        want_entropy: bool,
        entropy_needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad
        frozen = needs[0] and not any(needs[1:5])
        target_logits, slopes, lse, entropy, expected, entropy_row = linear_logprob_forward(
            hidden,
            weight,
            targets,
            target_rows,
            bias,
            extra,
            lora_b,
            temperature,
            softcap,
            want_entropy,
            frozen,
            frozen and entropy_needs_grad,
        )
        logprobs = torch.where(targets == IGNORED, 0.0, target_logits - lse[target_rows])
        ctx.frozen = frozen
        ctx.entropy_needs_grad = entropy_needs_grad
        ctx.options = (temperature, softcap)
        ctx.set_materialize_grads(False)
        shared = (targets, target_rows, lse, entropy)
        if frozen:
            ctx.save_for_backward(*shared, weight, target_logits, slopes, expected, entropy_row)
        else:
            ctx.save_for_backward(*shared, hidden, weight, bias, extra, lora_b)
        if not entropy_needs_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 6
        if not ctx.entropy_needs_grad:
            grad_entropy = None
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 5 + nothing
        temperature, softcap = ctx.options
        saved = ctx.saved_tensors  # once: gradient checkpointing recomputes the forward pass to give them
        targets, target_rows, lse, entropy = saved[:4]
        if grad_logprobs is None:
            grad_logprobs = lse.new_zeros(targets.shape)
        grad_logprobs = torch.where(targets == IGNORED, 0.0, grad_logprobs)
        if ctx.frozen:
            weight, target_logits, slopes, expected, entropy_row = saved[4:]
            rows = chunked.Rows(
                target_logits,
                slopes,
                lse,
                entropy,
                expected,
                entropy_row if ctx.entropy_needs_grad else None,
            )
            head = Head(weight, temperature=temperature, softcap=softcap)
            grad_hidden = chunked.backward_frozen(head, rows, targets, target_rows, grad_logprobs, grad_entropy)
            return (grad_hidden.to(expected.dtype), None, None, None, None, *nothing)
        hidden, weight, bias, extra, lora_b = saved[4:]
        wanted = list(ctx.needs_input_grad[:5])
        gradients = linear_logprob_backward(
            hidden,
            weight,
            targets,
            target_rows,
            bias,
            extra,
            lora_b,
            temperature,
            softcap,
            lse,
            entropy,
            grad_logprobs,
            grad_entropy,
            wanted,
        )
        return (*(gradient if want else None for want, gradient in zip(wanted, gradients)), *nothing)


def _kept(targets: Tensor, target_rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the kept entries, of the rows that have any, and for each kept entry its row among those."""
    entries = (targets != IGNORED).nonzero().squeeze(-1)
    rows, compact_rows = torch.unique_consecutive(target_rows[entries], return_inverse=True)
    return entries, rows, compact_rows


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
