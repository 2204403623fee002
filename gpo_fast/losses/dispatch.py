"""Chooses the code that runs: CPU with bfloat16 instructions -> C++, anything else -> chunked torch."""

from __future__ import annotations

import functools
import logging

from torch import Tensor

from gpo_fast.losses import chunked, cpu
from gpo_fast.losses.chunked import Gradients, Rows
from gpo_fast.losses.head import Head

logger = logging.getLogger(__name__)


def forward(
    head: Head,
    hidden: Tensor,
    extra: Tensor | None,
    targets: Tensor,
    target_rows: Tensor,
    *,
    want_entropy: bool,
    want_expected: bool,
    want_entropy_row: bool,
) -> Rows:
    """`chunked.forward` by the best code for these inputs."""
    path = choose(head, hidden)
    if path == "cpu":
        return cpu.forward(
            head,
            hidden,
            targets,
            target_rows,
            want_expected=want_expected,
            want_entropy_row=want_entropy_row,
        )
    return chunked.forward(
        head,
        hidden,
        extra,
        targets,
        target_rows,
        want_entropy=want_entropy,
        want_expected=want_expected,
        want_entropy_row=want_entropy_row,
    )


def backward(
    head: Head,
    hidden: Tensor,
    extra: Tensor | None,
    targets: Tensor,
    target_rows: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    *,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    want_extra: bool,
    want_lora_b: bool,
) -> Gradients:
    """`chunked.backward` by the best code for these inputs."""
    path = choose(head, hidden)
    if path == "cpu":
        return cpu.backward(
            head,
            hidden,
            targets,
            target_rows,
            lse,
            entropy,
            grad_logprobs,
            grad_entropy,
            want_hidden=want_hidden,
            want_weight=want_weight,
            want_bias=want_bias,
        )
    return chunked.backward(
        head,
        hidden,
        extra,
        targets,
        target_rows,
        lse,
        entropy,
        grad_logprobs,
        grad_entropy,
        want_hidden=want_hidden,
        want_weight=want_weight,
        want_bias=want_bias,
        want_extra=want_extra,
        want_lora_b=want_lora_b,
    )


def choose(head: Head, hidden: Tensor) -> str:
    """The name of the path for these inputs; the log says it once."""
    path = "cpu" if cpu.supported(head, hidden) else "torch"
    _announce(path, str(hidden.dtype), hidden.device.type)
    return path


@functools.cache
def _announce(path: str, dtype: str, device: str) -> None:
    names = {"cpu": "C++ (AVX-512 BF16)", "torch": "chunked torch"}
    logger.info("linear_logprob of %s on %s runs in %s", dtype, device, names[path])
