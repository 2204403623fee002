"""A loss of a trainable head in one pass over the vocabulary: 6TVH FLOPs, where two passes need 8TVH.

Two passes compute the logits twice, because a token's gradient g_t, of the loss by its log-probability, is known only
when the backward pass begins. But a loss is a sum over tokens, sequences or pairs with normalisers that are known
beforehand, so g_t is known as soon as the log-probabilities of its token, sequence or pair are. Piece by piece:

    x (n, H) -> logits (n, V) -> log-sum-exp, logprobs, entropies -> g_t by autograd on n numbers -> dlogits (n, V)
    dHidden of these rows = dlogits W        dWeight += dlogits^T x

The backward pass multiplies what is there by the gradient of the loss, one number. The price is memory: the logits of a
piece, and, where there are several pieces, the head's gradient in float32.

Liger-Kernel's chunked losses (arXiv 2410.10989) do the same; Cut Cross-Entropy (arXiv 2411.09009) takes two passes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpo_fast.losses import dispatch
from gpo_fast.losses.head import IGNORED, Head, wide_dtype
from gpo_fast.losses.linear_logprob import Prepared
from gpo_fast.losses.rows import Batch, Gradients, GradientWants, OutputGradients, Totals
from gpo_fast.losses.shared_rows import SharedRows

logger = logging.getLogger(__name__)

# (log-probabilities (t,), entropies (t,), which tokens they are (t,)) -> what they add to the loss.
TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Piece(NamedTuple):
    """Loss tokens whose logits are alive at the same time, and the n rows and k targets that they share."""

    tokens: Tensor  # (t,)
    entry_of_token: Tensor  # (t,)  place in targets
    targets: Tensor  # (k,)
    target_rows: Tensor  # (k,) ascending, place in rows
    rows: Tensor  # (n,) of hidden, distinct


@dataclass(frozen=True)
class Plan:
    """How one pass runs: by which code, over which pieces, and which loss it is the gradient of."""

    path: ModuleType  # has rows_at_once, forward_logits and add_gradients
    pieces: list[Piece]
    loss: TokenLoss
    num_tokens: int
    want_entropy: bool
    entropy_needs_grad: bool
    temperature: float
    softcap: float | None


class Tensors(NamedTuple):
    """What may have a gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    extra: Tensor | None
    lora_b: Tensor | None


class OnePass(NamedTuple):
    """What `token_loss` gives: (T,) each, 0 where ignored, detached; and the gradients, as a function of the loss."""

    logprobs: Tensor
    entropy: Tensor
    attach: Callable[[Tensor], Tensor]


def token_loss(
    prepared: Prepared,
    targets: Tensor,
    shared: SharedRows | None,
    loss: TokenLoss,
    *,
    whole: Tensor | None = None,
    constants: Iterable[Tensor | None] = (),
    want_entropy: bool,
    entropy_needs_grad: bool,
) -> OnePass | None:
    """The log-probabilities of a loss's tokens, and `attach`, which gives the loss's value its gradients.

    Args:
        prepared, targets, shared: as in `token_logprobs`.
        loss: what some tokens add to the loss. The gradient of the loss is the sum of theirs over all pieces.
        whole: int64 (T,): tokens of one number must be in one piece. The tokens of a piece are in the order of these
            numbers, then in their own.
        constants: what else the loss is made of. One pass gives them no gradient.
        want_entropy: otherwise the entropies mean nothing.
        entropy_needs_grad: the loss depends on the entropies.

    Returns:
        None where the loss has to go in two passes (with a trainable head the log says once why), or where no gradient
        is needed.
    """
    tensors = Tensors(prepared.rows, prepared.weight, prepared.bias, prepared.extra, prepared.lora_b)
    trainable = any(tensor is not None and tensor.requires_grad for tensor in tensors[1:])
    if not trainable or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    head = _head(tensors, prepared.head.temperature, prepared.head.softcap)
    path = dispatch.one_pass(head, prepared.rows)
    pieces: list[Piece] | None = None
    if path is None:
        how = "two passes: on a CPU they are faster"
    elif prepared.head.tp_group is not None:
        how = "two passes: the vocabulary is spread over processes"
    elif any(constant is not None and constant.requires_grad for constant in constants):
        how = "two passes: more than the hidden states and the head needs a gradient"
    elif whole is not None and shared is not None:
        how = "two passes: its gradient needs whole sequences, and they share rows"
    else:
        size = path.rows_at_once(head, prepared.rows)
        pieces = _pieces(prepared, targets.reshape(-1), shared, whole, size)
        how = "one pass"
        if pieces is None:
            how = f"two passes: its gradient needs whole sequences, and one has more than {size} tokens"
    _announce(str(prepared.rows.dtype), prepared.rows.device.type, how)
    if path is None or pieces is None:
        return None
    plan = Plan(
        path,
        pieces,
        loss,
        targets.numel(),
        want_entropy,
        entropy_needs_grad,
        prepared.head.temperature,
        prepared.head.softcap,
    )
    logprobs, entropy, gradients = _run(plan, tensors)

    def attach(value: Tensor) -> Tensor:
        attached: Tensor = _Attach.apply(*tensors, value, gradients, plan)  # type: ignore[no-untyped-call]  # torch has no annotation
        return attached

    return OnePass(logprobs, entropy, attach)


@functools.cache
def _announce(dtype: str, device: str, how: str) -> None:
    logger.info("loss of a trainable head in %s on %s: %s", dtype, device, how)


class _Attach(torch.autograd.Function):
    """A loss whose gradients are there already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        extra: Tensor | None,
        lora_b: Tensor | None,
        value: Tensor,
        gradients: Gradients,
        plan: Plan,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, extra, lora_b)
        ctx.gradients, ctx.plan = gradients, plan
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients are handed over, not copied. Who goes backward twice (retain_graph) computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _run(ctx.plan, Tensors(*ctx.saved_tensors), ctx.needs_input_grad)[2]
        for gradient in gradients:
            if gradient is not None:
                _scale(gradient, grad)
        return (*gradients, None, None, None)


def _scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, in place. A narrow gradient is widened in parts: torch would round the factor to its type."""
    if factor.device.type == "cpu" and factor == 1:
        return
    for part in gradient.split(4096):
        part.copy_(part.to(factor.dtype) * factor)


def _run(plan: Plan, tensors: Tensors, needs: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, Gradients]:
    """Log-probabilities and entropies of the tokens, and the gradients of what `needs` (default: requires) them."""
    if needs is None:
        needs = [tensor is not None and tensor.requires_grad for tensor in tensors]
    wants = GradientWants(*needs[:5])
    hidden, _, _, extra, _ = tensors
    head = _head(tensors, plan.temperature, plan.softcap)
    logprobs, entropy = (hidden.new_zeros(plan.num_tokens, dtype=wide_dtype(hidden.dtype)) for _ in range(2))
    grad_hidden = torch.zeros_like(hidden) if wants.hidden else None
    grad_extra = torch.zeros_like(extra) if wants.extra and extra is not None else None
    # The sums of one piece are rounded once, as they are made. A CPU has no such product.
    narrow = len(plan.pieces) == 1 and hidden.is_cuda
    # The inputs have their final types: autocast inside would round the float32 logits to its own.
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        totals = Totals.of_head(head, wants, narrow=narrow)
        for piece in plan.pieces:
            batch = Batch(
                hidden[piece.rows], None if extra is None else extra[piece.rows], piece.targets, piece.target_rows
            )
            of_rows = totals.with_rows(batch, wants)
            logprobs[piece.tokens], entropy[piece.tokens] = _run_piece(plan, piece, head, batch, of_rows)
            for whole, part in ((grad_hidden, of_rows.hidden), (grad_extra, of_rows.extra)):
                if whole is not None and part is not None:
                    whole[piece.rows] = part.to(whole.dtype)
    of_head = totals.gradients(head)
    return logprobs, entropy, of_head._replace(hidden=grad_hidden, extra=grad_extra)


def _run_piece(plan: Plan, piece: Piece, head: Head, batch: Batch, totals: Totals) -> tuple[Tensor, Tensor]:
    """Add the piece's gradients to the totals; log-probabilities and entropies of its tokens. Its logits die here."""
    rows, logits = plan.path.forward_logits(head, batch, plan.want_entropy, plan.entropy_needs_grad)
    logprobs = rows.target_logits - rows.lse[piece.target_rows]
    of_loss = _gradients_of_loss(plan, piece, logprobs, rows.entropy)
    plan.path.add_gradients(head, batch, rows, logits, of_loss, totals)
    return logprobs[piece.entry_of_token], rows.entropy[piece.target_rows[piece.entry_of_token]]


def _gradients_of_loss(plan: Plan, piece: Piece, logprobs: Tensor, entropy: Tensor) -> OutputGradients:
    """What the piece's log-probabilities (k,) and entropies (n,) have as gradients of the loss."""
    leaves = [logprobs.detach().requires_grad_(), entropy.detach().requires_grad_(plan.entropy_needs_grad)]
    with torch.enable_grad():
        of_tokens = leaves[0][piece.entry_of_token], leaves[1][piece.target_rows[piece.entry_of_token]]
        loss = plan.loss(*of_tokens, piece.tokens)
        gradients = torch.autograd.grad(loss, leaves if plan.entropy_needs_grad else leaves[:1])
    return OutputGradients(gradients[0], gradients[1] if plan.entropy_needs_grad else None)


def _pieces(
    prepared: Prepared, targets: Tensor, shared: SharedRows | None, whole: Tensor | None, size: int
) -> list[Piece] | None:
    """The tokens that have a target, in pieces of at most `size` rows; None if one of `whole` has more."""
    tokens = (targets != IGNORED).nonzero().squeeze(-1)
    if whole is not None:
        tokens = tokens[torch.argsort(whole[tokens], stable=True)]
    if shared is not None:
        tokens = tokens[torch.argsort(shared.pair_of_token[tokens], stable=True)]
    entries = tokens if shared is None else shared.pair_of_token[tokens]
    if whole is not None:
        counts = torch.unique_consecutive(whole[tokens], return_counts=True)[1].tolist()
        if max(counts, default=0) > size:
            return None
        lengths = _grouped(counts, size)
    else:
        distinct = torch.unique_consecutive(prepared.target_rows[entries], return_counts=True)[1]
        lengths = [int(part.sum()) for part in distinct.split(size)]
    return [
        _piece(prepared, part, of_part)
        for part, of_part in zip(tokens.split(lengths), entries.split(lengths))
        if part.numel()
    ]


def _piece(prepared: Prepared, tokens: Tensor, entry_of_token: Tensor) -> Piece:
    entries, place = torch.unique_consecutive(entry_of_token, return_inverse=True)
    rows, target_rows = torch.unique_consecutive(prepared.target_rows[entries], return_inverse=True)
    return Piece(tokens, place, prepared.targets[entries], target_rows, rows)


def _grouped(counts: list[int], size: int) -> list[int]:
    """Sums of neighbours, as many as are at most `size` together."""
    sums: list[int] = []
    for count in counts:
        if sums and sums[-1] + count <= size:
            sums[-1] += count
        else:
            sums.append(count)
    return sums


def _head(tensors: Tensors, temperature: float, softcap: float | None) -> Head:
    return Head(tensors.weight, tensors.bias, tensors.lora_b, temperature, softcap)
