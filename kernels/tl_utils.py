"""Functions that several kernels use, and what they know of the process that they run in."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32. PRECISION concerns float32 operands only: "ieee" or "tf32"."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as bare 16-bit integers and would multiply those.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def soft_cap(scores, cap):
    """cap * tanh(scores / cap), from one exponential whose argument is never positive."""
    ratio = tl.exp(-2.0 * tl.abs(scores) / cap)
    size = cap * (1.0 - ratio) / (1.0 + ratio)
    return tl.where(scores < 0, -size, size)


def block_dim(head_dim: int) -> int:
    """Columns of a tile for a head size: the next power of two, at least 16. Raises ValueError beyond 256."""
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head sizes from 1 to 256 are supported, got {head_dim}")
    return max(16, triton.next_power_of_2(head_dim))
