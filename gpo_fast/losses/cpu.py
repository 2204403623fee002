"""The C++ kernels of the losses for bfloat16 on a CPU (csrc/cpu/linear_logprob.h), on torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from gpo_fast import _C
from gpo_fast.losses.head import Head
from gpo_fast.losses.rows import Batch, ForwardWants, Gradients, GradientWants, OutputGradients, Rows, row_sums


def supported(head: Head, hidden: Tensor) -> bool:
    """Whether these inputs can go to the C++ kernels on this machine."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == torch.bfloat16
        and hidden.shape[0] > 0
        and head.lora_b is None
        and head.weight.is_contiguous()
        and _C.linear_logprob_kernels() != "none"
    )


def forward(head: Head, batch: Batch, wants: ForwardWants) -> Rows:
    """`chunked.forward` without an adapter on the head; the entropy is always computed."""
    target_logits = torch.empty(batch.targets.shape, dtype=torch.float32)
    target_slopes = torch.empty(batch.targets.shape, dtype=torch.float32)
    lse = torch.empty(batch.count, dtype=torch.float32)
    entropy = torch.empty(batch.count, dtype=torch.float32)
    expected = torch.empty_like(batch.hidden) if wants.expected else None
    entropy_row = torch.empty_like(batch.hidden) if wants.entropy_row else None
    kept = _Inputs(head, batch)
    _C.linear_logprob_forward(
        kept.handle,
        target_logits=target_logits.data_ptr(),
        target_slopes=target_slopes.data_ptr(),
        lse=lse.data_ptr(),
        entropy=entropy.data_ptr(),
        expected=_address(expected),
        entropy_row=_address(entropy_row),
        threads=torch.get_num_threads(),
    )
    return Rows(target_logits, target_slopes, lse, entropy, expected, entropy_row)


def backward(
    head: Head, batch: Batch, lse: Tensor, entropy: Tensor, gradients: OutputGradients, wants: GradientWants
) -> Gradients:
    """`chunked.backward` without an adapter on the head."""
    grad_hidden = torch.empty_like(batch.hidden) if wants.hidden else None
    grad_weight = torch.empty_like(head.weight) if wants.weight else None
    grad_bias = torch.empty(head.weight.shape[0], dtype=torch.float32) if wants.bias else None
    kept = _Inputs(head, batch)
    row_grad = row_sums(gradients.logprobs, batch.first_entries())
    arrays = [
        None if array is None else array.contiguous() for array in (lse, entropy, gradients.logprobs, gradients.entropy)
    ]
    _C.linear_logprob_backward(
        kept.handle,
        lse=_address(arrays[0]),
        entropy=_address(arrays[1]),
        row_grad=row_grad.data_ptr(),
        grad_logprobs=_address(arrays[2]),
        grad_entropy=_address(arrays[3]),
        hidden=_address(grad_hidden),
        weight=_address(grad_weight),
        bias=_address(grad_bias),
        threads=torch.get_num_threads(),
    )
    if grad_bias is not None and head.bias is not None:
        grad_bias = grad_bias.to(head.bias.dtype)
    return Gradients(grad_hidden, grad_weight, grad_bias)


class _Inputs:
    """The handle that the kernels take, and the tensors that it points into: both live equally long."""

    def __init__(self, head: Head, batch: Batch) -> None:
        self.tensors = [
            batch.hidden.contiguous(),
            head.weight,
            batch.targets.contiguous(),
            batch.target_rows.contiguous(),
        ]
        self.bias = None if head.bias is None else head.bias.float().contiguous()
        self.handle = _C.LogprobInputs(
            hidden=self.tensors[0].data_ptr(),
            weight=head.weight.data_ptr(),
            bias=_address(self.bias),
            targets=self.tensors[2].data_ptr(),
            target_rows=self.tensors[3].data_ptr(),
            rows=batch.count,
            vocab=head.weight.shape[0],
            width=batch.hidden.shape[1],
            entries=batch.targets.shape[0],
            temperature=head.temperature,
            softcap=head.softcap or 0.0,
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
