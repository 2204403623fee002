"""The output head as the losses see it: the arithmetic from a row of hidden states to its logits.

raw = x W^T + u B^T + b        (B, u: the extra columns of a LoRA adapter on the head, u = scale * x A^T)
z   = cap * tanh(raw / cap)    (with a soft-cap; otherwise z = raw)
z   = z / temperature
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Head:
    """The parameters of an output head. Shapes: weight (V, H), bias (V,), lora_b (V, r)."""

    weight: Tensor
    bias: Tensor | None = None
    lora_b: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, extra: Tensor | None, vocab: slice) -> tuple[Tensor, Tensor | None]:
        """Scaled logits (N, len(vocab)) and, with a soft-cap, d(capped logit) / d(raw logit).

        The result is float32 (float64 for float64 inputs); nothing is rounded to the inputs' dtype on the
        way.
        """
        raw = matmul_wide(hidden, self.weight[vocab].t())
        if self.lora_b is not None and extra is not None:
            raw += matmul_wide(extra, self.lora_b[vocab].t())
        if self.bias is not None:
            raw += self.bias[vocab]
        slope = None
        if self.softcap is not None:
            tanh = torch.tanh_(raw.div_(self.softcap))
            slope = 1 - tanh * tanh
            raw = tanh.mul_(self.softcap)
        if self.temperature != 1.0:
            raw.div_(self.temperature)
        return raw, slope

    def slope(self, logits: Tensor) -> Tensor | None:
        """d(capped logit) / d(raw logit) again, from the logits that `logits` gave."""
        if self.softcap is None:
            return None
        tanh = logits * (self.temperature / self.softcap)
        return 1 - tanh * tanh


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulators and results for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the wide dtype as the result, which never aliases an input.

    torch has no bfloat16 product with a float32 result on a CPU, so the inputs are widened there: slower than
    a bfloat16 product, but logits rounded to bfloat16 would be wrong by up to 2**-9 of their size.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b for a `total` of the wide dtype; in one pass over it where torch has that product."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += matmul_wide(a, b)
