"""The losses with one ratio per token in one Triton kernel (kernels/step_loss.py), where it can run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from gpo_fast.losses.policy import PolicyOptions

try:
    from gpo_fast.kernels import step_loss
except ImportError:  # Triton has no wheel for this platform, and then there is no CUDA device either
    step_loss = None


def supported(new: Tensor, loss_type: str, others: list[Tensor | None]) -> bool:
    """Whether the kernel computes this loss: on CUDA, and with a gradient to the log-probabilities alone."""
    return (
        step_loss is not None
        and new.is_cuda
        and new.dtype == torch.float32
        and loss_type not in ("gspo", "rloo")
        and not any(other is not None and other.requires_grad for other in others)
    )


def fused_loss(
    new: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantage: Tensor,
    importance: Tensor | None,
    share: Tensor,
    options: PolicyOptions,
    beta: float,
    max_log_ratio: float,
) -> Tensor:
    """The sum of all tokens' terms, a scalar; the arguments are those of `step_loss.token_losses`."""
    kinds = {"awr": step_loss.AWR, "cispo": step_loss.CISPO}
    estimators = {"k1": step_loss.K1, "k2": step_loss.K2, "k3": step_loss.K3}
    numbers = step_loss.TokenLossOptions(
        kind=kinds.get(options.loss_type, step_loss.CLIPPED),
        kl=estimators[options.kl] if beta != 0.0 else step_loss.NO_KL,
        epsilon=options.epsilon,
        epsilon_high=options.epsilon_high,
        dual_clip=options.dual_clip,
        beta=beta,
        awr_beta=options.awr_beta,
        awr_max_exponent=options.awr_max_exponent,
        max_log_ratio=max_log_ratio,
    )
    arrays = [None if array is None else array.contiguous() for array in (old, ref, advantage, importance, share)]
    loss: Tensor = _TokenLoss.apply(new.contiguous(), *arrays, numbers)  # type: ignore[no-untyped-call]  # torch has no annotation
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        new: Tensor,
        old: Tensor,
        ref: Tensor | None,
        advantage: Tensor,
        importance: Tensor | None,
        share: Tensor,
        options: step_loss.TokenLossOptions,
    ) -> Tensor:
        terms, derivatives = step_loss.token_losses(new, old, ref, advantage, importance, share, options)
        ctx.save_for_backward(derivatives)
        return torch.sum(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (derivatives,) = ctx.saved_tensors
        return (grad * derivatives, *(None,) * 6)
