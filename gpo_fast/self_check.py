"""Compares a tree-packed training step with the padded one: `self_check_steps` of GPOConfig."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_tolerance(model: nn.Module, bf16: bool) -> float:
    """How far the two may be apart, relative to the gradient's norm.

    Rounding alone keeps them apart: about 1e-5 in float32, some hundredths in 16 bits, growing with depth. A token
    that sees one token too many or too few moves the gradient by a large part of its norm.
    """
    narrow = bf16 or any(p.dtype.itemsize == 2 for p in model.parameters())
    return 0.25 if narrow else 1e-3


def compare_gradients(
    model: nn.Module, loss: Tensor, padded_loss: Tensor, padded: dict[str, Tensor], *, tolerance: float
) -> None:
    """`padded` holds the padded batch's gradients by parameter name; the model holds the packed batch's.

    Raises:
        RuntimeError: loss or gradients are farther apart than `tolerance`.
    """
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if ours.keys() != padded.keys():
        raise RuntimeError(f"self check: only one way of packing reached {sorted(ours.keys() ^ padded.keys())}")
    off = _norm([ours[name].double() - gradient.double() for name, gradient in padded.items()])
    size = _norm([gradient.double() for gradient in padded.values()])
    loss_off = abs(float(loss) - float(padded_loss))
    # Not "greater than": NaN must fail too.
    if not (off <= tolerance * size and loss_off <= tolerance * (1 + abs(float(padded_loss)))):
        raise RuntimeError(
            f"self check: the tree-packed gradient differs from the padded one by {off / max(size, 1e-300):.2g} of its "
            f"norm and the loss by {loss_off:.2g} (padded: {float(padded_loss):.6g}); at most {tolerance:g} is "
            "rounding. Train with packing='padded', and report the model's type"
        )


def _norm(tensors: list[Tensor]) -> float:
    squares = [t.square().sum() for t in tensors]
    whole = [s.full_tensor() if isinstance(s, DTensor) else s for s in squares]
    return float(torch.stack(whole).sum().sqrt())
