"""CPU memory for large arrays that are read all through in every step: weights, keys and values.

Linux backs memory with pages of 4 KiB unless it is asked for huge ones. On a machine whose address translation is slow
(a virtual one above all) that halves the speed of reading: one thread read 16 GB/s from huge pages and 10 GB/s from
small ones (Xeon with AVX-512, a virtual machine of two cores).
"""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_ALIGNMENT = 64  # bytes: a cache line


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in huge pages of its own, where the system gives them."""
    if prod(shape) == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    size = prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, -(-size // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape)).view(shape)


class Arena:
    """Tensors one after the other in blocks of memory from `empty`, which live as long as one of their tensors."""

    def __init__(self, block_bytes: int = 32 * HUGE_PAGE) -> None:
        self._block_bytes = block_bytes
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = prod(shape) * dtype.itemsize
        if self._used + size > len(self._block):
            self._block = empty((max(size, self._block_bytes),), torch.uint8)
            self._used = 0
        piece = self._block[self._used : self._used + size].view(dtype).view(shape)
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return piece
