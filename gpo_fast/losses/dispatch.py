"""Chooses the code that runs: CUDA -> Triton, CPU with bfloat16 instructions -> C++, anything else ->
torch."""

from __future__ import annotations

from gpo_fast.losses.chunked import backward, forward

__all__ = ["backward", "forward"]
