"""Chooses the code that runs: CUDA -> Triton; CPU with AMX or AVX-512 BF16 -> C++; anything else -> chunked torch."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

from torch import Tensor

from gpo_fast import _C
from gpo_fast.losses import chunked, cpu
from gpo_fast.losses.head import Head
from gpo_fast.losses.rows import Batch, ForwardWants, Gradients, GradientWants, OutputGradients, Rows

try:
    from gpo_fast.losses import gpu
except ImportError as error:  # Triton has no wheel for this platform
    gpu = None  # type: ignore[assignment]
    _NO_TRITON = str(error)

logger = logging.getLogger(__name__)


def forward(head: Head, batch: Batch, wants: ForwardWants) -> Rows:
    """One pass over the vocabulary by the best code for these inputs."""
    rows: Rows = choose(head, batch.hidden).forward(head, batch, wants)
    return rows


def backward_frozen(
    head: Head, rows: Rows, targets: Tensor, target_rows: Tensor, first: Tensor, gradients: OutputGradients
) -> Tensor:
    """Gradient (N, H) of the hidden states from the rows that `forward` kept, without the logits."""
    assert rows.expected is not None
    on_gpu = gpu is not None and gpu.supported(head, rows.expected)
    path = gpu if on_gpu else chunked
    gradient: Tensor = path.backward_frozen(head, rows, targets, target_rows, first, gradients)
    return gradient


def backward(
    head: Head, batch: Batch, lse: Tensor, entropy: Tensor, gradients: OutputGradients, wants: GradientWants
) -> Gradients:
    """Recompute the logits and give the gradients that are wanted, by the best code for these inputs."""
    path = choose(head, batch.hidden)
    wanted: Gradients = path.backward(head, batch, lse, entropy, gradients, wants)
    return wanted


def one_pass(head: Head, hidden: Tensor) -> ModuleType | None:
    """The module that runs a loss of a trainable head in one pass, or None where two passes are better.

    On a CPU they are: in the memory that we allow there is room for the logits of few rows, and W and its gradient go
    through memory once for each such piece, which costs what computing the logits again does (docs/kernels.md).
    """
    path = choose(head, hidden)
    return path if path is gpu or hidden.device.type != "cpu" else None


def choose(head: Head, hidden: Tensor) -> ModuleType:
    """The module with the code for these inputs; the log says once which one and why."""
    path: ModuleType = chunked
    if gpu is not None and gpu.supported(head, hidden):
        path = gpu
    elif cpu.supported(head, hidden):
        path = cpu
    _announce(path.__name__, str(hidden.dtype), hidden.device.type)
    return path


@functools.cache
def _announce(path: str, dtype: str, device: str) -> None:
    names = {"gpu": "Triton", "cpu": f"C++ ({_C.linear_logprob_kernels()})", "chunked": "chunked torch"}
    reason = f" (no Triton: {_NO_TRITON})" if device == "cuda" and gpu is None else ""
    logger.info("linear_logprob of %s on %s runs in %s%s", dtype, device, names[path.rpartition(".")[2]], reason)
