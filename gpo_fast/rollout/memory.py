"""CPU memory for large arrays that are read all through in every step: weights, keys and values.

Linux backs memory with pages of 4 KiB unless it is asked for huge ones. On a machine whose address translation is slow
(a virtual one above all) that halves the speed of reading: one thread read 16 GB/s from huge pages and 10 GB/s from
small ones (Xeon with AVX-512, a virtual machine of two cores).
"""

from __future__ import annotations

import mmap
import sys
import threading
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_ALIGNMENT = 64  # bytes: a cache line


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, from 2 MiB on in huge pages of its own, where the system gives them."""
    size = prod(shape) * dtype.itemsize
    memory = _map(size) if size >= HUGE_PAGE else None
    if memory is None:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape)).view(shape)


def _map(size: int) -> mmap.mmap | None:
    """At least `size` bytes of huge pages; None where there are none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    memory = mmap.mmap(-1, -(-size // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return None
    return memory


class Reused:
    """Uninitialised tensors, one after the other in the same memory once no tensor is on it any more.

    Memory that a process asks for anew is cleared by the system, a page at a time; for arrays that are written once
    and read once that takes longer than the writing.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._lock = threading.Lock()

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor (count,)."""
        size = count * dtype.itemsize
        if size < HUGE_PAGE:
            return torch.empty(count, dtype=dtype)
        with self._lock:
            if self._memory is None or len(self._memory) < size or sys.getrefcount(self._memory) > _UNUSED:
                self._memory = _map(size)
            if self._memory is None:
                return torch.empty(count, dtype=dtype)
            return torch.frombuffer(self._memory, dtype=dtype, count=count)


_UNUSED = 2  # references that sys.getrefcount counts if no tensor has one: the attribute's and its own argument's


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
