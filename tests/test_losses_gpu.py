"""The fused losses on a GPU: the numbers of the CPU tests, the large shape, and the same bits every time."""

from __future__ import annotations

import math

import pytest
import torch
from test_losses_numerics import SHAPES, TOLERANCE, random_inputs, relative_error

from gpo_fast.losses import linear_logprob, linear_policy_loss
from gpo_fast.losses.reference import linear_logprob_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1937, 3584, 152064)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_values_and_gradients(
    shape: tuple[int, int, int], dtype: torch.dtype, softcap: float | None, trainable: bool
) -> None:
    inputs = [tensor.cuda() for tensor in random_inputs(*shape, dtype)]
    targets = inputs.pop()
    grad, entropy_grad = torch.randn(targets.shape, device="cuda"), torch.randn(targets.shape, device="cuda")
    results = []
    for call, wide in ((linear_logprob, dtype), (linear_logprob_reference, torch.float64)):
        leaves = [
            tensor.to(wide, copy=True).requires_grad_(index == 0 or trainable) for index, tensor in enumerate(inputs)
        ]
        extra = {"return_entropy": True} if call is linear_logprob else {}
        logprobs, entropy = call(leaves[0], leaves[1], targets, bias=leaves[2], softcap=softcap, **extra)
        ((logprobs * grad).sum() + (entropy * entropy_grad).sum()).backward()
        results.append([logprobs.detach(), entropy.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for name, value, exact in zip(("logprobs", "entropy", "hidden", "weight", "bias"), *results):
        error = relative_error(value, exact)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1937, 3584, 152064)])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7, "entropy_coef": 0.1}])
def test_a_loss_in_one_pass(shape: tuple[int, int, int], dtype: torch.dtype, options: dict) -> None:
    inputs = [tensor.cuda() for tensor in random_inputs(*shape, dtype)]
    targets = inputs.pop()
    old, advantages = (torch.randn(targets.shape, device="cuda") for _ in range(2))
    old = old - math.log(shape[2])
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = linear_policy_loss(
        *leaves[:2], targets, bias=leaves[2], loss_type="dapo", advantages=advantages, old_logprobs=old, **options
    )
    assert "Attach" in output.loss.grad_fn.name()
    (output.loss / 3).backward()

    exact = [tensor.double().requires_grad_() for tensor in inputs]
    of_head = {name: value for name, value in options.items() if name != "entropy_coef"}
    logprobs, entropy = linear_logprob_reference(*exact[:2], targets, bias=exact[2], **of_head)
    ratio = (logprobs - old).clamp(-20, 20).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    gain = gain + options.get("entropy_coef", 0.0) * entropy
    (-gain[targets != -100].mean() / 3).backward()
    for leaf, reference in zip(leaves, exact):
        assert relative_error(leaf.grad, reference.grad) <= TOLERANCE[dtype]


def test_the_factor_of_the_loss_is_not_rounded_to_bfloat16() -> None:
    """1/3 in bfloat16 would be off by 2**-9.4 everywhere; the norm of many numbers shows it."""
    hidden, weight, _, targets = (tensor.cuda() for tensor in random_inputs(200, 64, 500, torch.bfloat16))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_policy_loss(*leaves, targets, loss_type="ppo", advantages=torch.ones(1, device="cuda")).loss
    whole = torch.autograd.grad(loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss / 3, leaves)
    for part, exact in zip(third, whole):
        size = float(part.double().norm() / exact.double().norm())
        assert abs(3 * size - 1) < 2**-13


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("loss_type", ["gspo", "grpo"])
def test_results_are_the_same_bits_every_time(loss_type: str, trainable: bool) -> None:
    hidden, weight, _, targets = (tensor.cuda() for tensor in random_inputs(3000, 512, 20000, torch.bfloat16))
    outcomes = []
    for _ in range(3):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
        output = linear_policy_loss(
            *leaves, targets, loss_type=loss_type, advantages=torch.ones(1, device="cuda"), entropy_coef=0.1
        )
        output.loss.backward()
        outcomes.append([output.loss.detach(), output.logprobs, *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for other in outcomes[1:]:
        assert all(torch.equal(first, second) for first, second in zip(outcomes[0], other))


@pytest.mark.parametrize("trainable", [False, True])
def test_extra_memory_is_a_fraction_of_the_logits(trainable: bool) -> None:
    hidden, weight, _, targets = (tensor.cuda() for tensor in random_inputs(8192, 1024, 151936, torch.bfloat16))
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, weight, targets).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = hidden.nbytes + (weight.nbytes if trainable else 0)
    assert extra - gradients < 0.15 * 8192 * 151936 * 4


def test_extra_memory_of_one_pass() -> None:
    """Beside the gradients: the head's in float32, and the exponentials of 1,024 rows."""
    hidden, weight, _, targets = (tensor.cuda() for tensor in random_inputs(4096, 1024, 151936, torch.bfloat16))
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_policy_loss(
        hidden, weight, targets, loss_type="ppo", advantages=torch.ones(1, device="cuda")
    ).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
    assert extra < 1.1 * (4 * weight.numel() + 2 * 1024 * 151936)
