"""FSDP2 under GPOTrainer: parameters, gradients and the optimiser's state in shards, one on each process.

A pass gathers a layer's parameters when it comes to it, which all processes have to do together. So all of them make
the same number of passes: one that has fewer batches than another makes up for it with `idle_batch`es.

The rollout engine reads weights in ways that shards cannot serve. It samples from a whole copy of the model on every
process, which `refresh_copy` brings up to date.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from gpo_fast.losses import LossOutput
from gpo_fast.training_batch import TrainingBatch

_METHOD = "gpo_fast_pass"

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are in shards; those of a model to be sharded are whole until it trains."""
    return isinstance(model, FSDPModule)


def forward_pass(model: nn.Module, compute: Callable[[], T]) -> T:
    """`compute()`, which calls the model's parts, as a forward pass of the model if it is sharded.

    A backward pass that follows must begin at the `loss` of a LossOutput.
    """
    if not is_sharded(model):
        return compute()
    if not hasattr(model, _METHOD):
        _register(model)
    results: list[T] = []

    def run() -> Tensor | None:
        # FSDP is shown the loss alone, and its own copy is not used: it would be rounded to the compute data type.
        results.append(compute())
        return results[0].loss if isinstance(results[0], LossOutput) else None

    getattr(model, _METHOD)(run)
    return results[0]


def _register(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A process's loss is its part of a sum over all of them, not one of several whose mean is wanted.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, _METHOD, lambda run: run())
    register_fsdp_forward_method(model, _METHOD)


def anchor(hidden: Tensor, head: nn.Module) -> Tensor:
    """0, from one row of hidden states [R, H] through the head.

    The losses take the head's weight without a call of the head, at which its parameters would be gathered. And the
    same parameters must have a gradient on each process, if only 0, or the sums over the processes do not fit.
    """
    logits: Tensor = head(hidden[:1])
    return 0.0 * logits.float().sum()


def idle_batch(device: torch.device | str) -> TrainingBatch:
    """One token and no rows: what goes through the model where there is nothing to compute."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return TrainingBatch([], token, token, token[0], none, none)


def whole_copy(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A frozen copy of a model that is still to be sharded, the same on all processes.

    The first process's weights are sent to the others: it may be the only one that has loaded them.
    """
    copied = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    for tensor in copied.state_dict().values():
        dist.broadcast(tensor, src=0)
    return copied


@torch.no_grad()
def refresh_copy(copied: nn.Module, model: nn.Module) -> None:
    """Gives a whole copy the trained parameters as they are now. One at a time is gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a pass without gradients leaves the last parameters gathered
    for own, current in zip(copied.parameters(), model.parameters(), strict=True):
        if current.requires_grad:
            own.copy_(current.full_tensor() if isinstance(current, DTensor) else current)
