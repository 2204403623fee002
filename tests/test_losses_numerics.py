"""linear_logprob against float64 plain torch: values, entropies and every gradient, on fresh random inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpo_fast import _C
from gpo_fast.losses import linear_logprob
from gpo_fast.losses.reference import linear_logprob_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = [(256, 128, 512), (252, 123, 507), (93, 31, 123), (1, 64, 4096), (4096, 256, 5000)]
BEST = _C.linear_logprob_kernels()


@pytest.fixture(params=["float32", "bfloat16 amx", "bfloat16 avx512", "bfloat16 none"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """float32, and bfloat16 by each of the ways that a CPU can take."""
    name, _, kernels = request.param.partition(" ")
    if kernels:
        try:
            _C.use_linear_logprob_kernels(kernels)
        except ValueError:
            pytest.skip(f"this machine lacks {kernels}")
    yield getattr(torch, name)
    _C.use_linear_logprob_kernels(BEST)


def relative_error(value: Tensor, exact: Tensor) -> float:
    exact = exact.detach()
    return float((value.detach().double() - exact).norm() / exact.norm().clamp(min=1e-30))


def random_inputs(rows: int, width: int, vocab: int, dtype: torch.dtype, spread: float = 1.0):
    """hidden, weight with logits of standard deviation `spread`, bias, and targets of which a fifth is ignored."""
    hidden = torch.randn(rows, width).to(dtype)
    weight = (spread * torch.randn(vocab, width) / width**0.5).to(dtype)
    bias = (0.1 * torch.randn(vocab)).to(dtype)
    targets = torch.randint(0, vocab, (rows,))
    if rows > 1:
        targets[torch.rand(rows) < 0.2] = -100
    return hidden, weight, bias, targets


def compare(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    trainable: bool,
    entropy: bool = True,
    tolerance: float | None = None,
    **options,
) -> None:
    tolerance = tolerance or TOLERANCE[hidden.dtype]
    grad_logprobs, grad_entropy = torch.randn(targets.shape), torch.randn(targets.shape)
    results = []
    for call, dtype in ((linear_logprob, hidden.dtype), (linear_logprob_reference, torch.float64)):
        leaves = [hidden.to(dtype, copy=True).requires_grad_()]
        leaves.append(weight.to(dtype, copy=True).requires_grad_(trainable))
        if bias is not None:
            leaves.append(bias.to(dtype, copy=True).requires_grad_(trainable))
        extra = {"return_entropy": True} if call is linear_logprob else {}
        logprobs, entropies = call(
            leaves[0], leaves[1], targets, bias=leaves[2] if bias is not None else None, **extra, **options
        )
        loss = (logprobs * grad_logprobs).sum()
        if entropy:
            loss = loss + (entropies * grad_entropy).sum()
        loss.backward()
        results.append([logprobs, entropies, *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    assert results[0][0].dtype == torch.float32
    for name, value, exact in zip(("logprobs", "entropy", "hidden", "weight", "bias"), *results):
        error = relative_error(value, exact)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype, trainable: bool) -> None:
    hidden, weight, bias, targets = random_inputs(*shape, dtype)
    compare(hidden, weight, bias, targets, trainable=trainable)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"softcap": 2.0}, {"temperature": 1.7, "softcap": 5.0}])
def test_temperature_and_softcap(options: dict, dtype: torch.dtype, trainable: bool) -> None:
    hidden, weight, _, targets = random_inputs(70, 48, 700, dtype, spread=2.0)
    compare(hidden, weight, None, targets, trainable=trainable, **options)
    compare(hidden, weight, None, targets, trainable=trainable, entropy=False, **options)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_a_common_offset_of_all_logits_changes_nothing(level: float, dtype: torch.dtype, trainable: bool) -> None:
    """All-very-negative and all-very-large logits: a maximum that started at 0 would underflow or overflow.

    A float32 logit of size 1e4 is rounded by up to 2**-11, which is the error of a probability.
    """
    hidden, weight, _, targets = random_inputs(60, 32, 400, dtype)
    bias = torch.full((400,), level).to(dtype)
    compare(hidden, weight, bias, targets, trainable=trainable, tolerance=max(TOLERANCE[dtype], 2**-10))


@pytest.mark.parametrize("trainable", [False, True])
def test_logits_of_ten_thousand(dtype: torch.dtype, trainable: bool) -> None:
    """Distributions that are almost one-hot. The entropies are rounding noise, so only values are compared."""
    hidden, weight, _, targets = random_inputs(60, 32, 400, dtype, spread=1e4)
    leaf = hidden.clone().requires_grad_()
    logprobs, entropy = linear_logprob(leaf, weight.requires_grad_(trainable), targets, return_entropy=True)
    exact, _ = linear_logprob_reference(hidden.double(), weight.detach().double(), targets)
    assert relative_error(logprobs, exact) <= TOLERANCE[dtype]
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(entropy).all()
    assert torch.isfinite(leaf.grad).all()


def test_gradient_at_a_near_certain_target(dtype: torch.dtype) -> None:
    """Where p is almost 1, W_y - sum p W would be the difference of two rounded vectors, with an error of 2**-9
    of their size, as large as the result.

    A float32 logit of 13 is off by up to 2**-21, and so is 1 - p, here about 1e-3: hence the looser float32 bound.
    """
    hidden, weight, _, _ = random_inputs(40, 64, 300, dtype)
    targets = torch.arange(40)
    weight[:40] = (1.6 * hidden / hidden.norm(dim=1, keepdim=True)).to(dtype)
    median = float(linear_logprob(hidden, weight, targets).median())
    assert -1e-2 < median < -1e-4
    tolerance = max(TOLERANCE[dtype], 4 * 2**-21 / 1e-3)
    compare(hidden, weight, None, targets, trainable=False, entropy=False, tolerance=tolerance)


def test_what_is_rounded_for_bfloat16_inputs() -> None:
    """Logits are not: of size 40, rounded to bfloat16, they would be off by up to 0.125. The probabilities that are
    multiplied by W are, each by 2**-9 of itself at most, and so is the kept row: 2**-8 in all.
    """
    hidden, weight, _, targets = random_inputs(200, 64, 900, torch.bfloat16, spread=10.0)
    leaf, exact_leaf = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    logprobs, entropy = linear_logprob(leaf, weight, targets, return_entropy=True)
    exact, exact_entropy = linear_logprob_reference(exact_leaf, weight.double(), targets)
    assert float(exact.detach().min()) < -20
    assert float((logprobs - exact).detach().abs().max()) < 1e-4
    assert float((entropy - exact_entropy).detach().abs().max()) < 1e-4
    logprobs.sum().backward()
    exact.sum().backward()
    assert relative_error(leaf.grad, exact_leaf.grad) <= 2**-8


@pytest.mark.parametrize("trainable", [False, True])
def test_all_rows_ignored(dtype: torch.dtype, trainable: bool) -> None:
    hidden, weight, bias, targets = random_inputs(9, 16, 50, dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trainable)]
    logprobs, entropy = linear_logprob(*leaves, torch.full_like(targets, -100), bias=bias, return_entropy=True)
    assert logprobs.tolist() == [0.0] * 9
    assert entropy.tolist() == [0.0] * 9
    (logprobs.sum() + entropy.sum()).backward()
    assert all(leaf.grad.abs().max() == 0 for leaf in leaves if leaf.requires_grad)


def test_ignored_rows_are_not_read() -> None:
    hidden, weight, _, targets = random_inputs(50, 16, 80, torch.float32)
    hidden[targets == -100] = float("nan")
    leaf = hidden.clone().requires_grad_()
    logprobs = linear_logprob(leaf, weight, targets)
    logprobs.sum().backward()
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("trainable", [False, True])
def test_several_targets_per_row(dtype: torch.dtype, trainable: bool) -> None:
    """A branch point: equal to copies of the row, one for each target, with gradients summed over the copies."""
    hidden, weight, bias, _ = random_inputs(30, 24, 90, dtype)
    lengths = torch.randint(0, 4, (30,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    targets = torch.cat([torch.randperm(90)[:length] for length in lengths.tolist()])
    rows = torch.arange(30).repeat_interleave(lengths)
    grad, row_grad = torch.randn(targets.shape), torch.randn(30)
    leaves = [
        tensor.clone().requires_grad_(index == 0 or trainable) for index, tensor in enumerate((hidden, weight, bias))
    ]
    logprobs, entropy = linear_logprob(
        leaves[0], leaves[1], targets, bias=leaves[2], row_offsets=offsets, return_entropy=True
    )
    ((logprobs * grad).sum() + (entropy * row_grad).sum()).backward()
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    copies, _ = linear_logprob_reference(exact[0][rows], exact[1], targets, bias=exact[2])
    _, once = linear_logprob_reference(exact[0], exact[1], torch.where(lengths > 0, 0, -100), bias=exact[2])
    ((copies * grad).sum() + (once * row_grad).sum()).backward()
    assert relative_error(logprobs, copies) <= TOLERANCE[dtype]
    assert relative_error(entropy, once) <= TOLERANCE[dtype]
    for leaf, reference in zip(leaves, exact):
        if reference.grad is not None:
            assert relative_error(leaf.grad, reference.grad) <= TOLERANCE[dtype]


def test_lora_on_the_head(dtype: torch.dtype) -> None:
    hidden, weight, _, targets = random_inputs(40, 24, 90, dtype)
    lora_a, lora_b = torch.randn(4, 24).to(dtype) / 5, torch.randn(90, 4).to(dtype) / 5
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, lora_a, lora_b)]
    grad = torch.randn(40)
    logprobs = linear_logprob(leaves[0], weight, targets, lora=(leaves[1], leaves[2], 0.5))
    (logprobs * grad).sum().backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    merged = weight.double() + 0.5 * exact[2] @ exact[1]
    reference, _ = linear_logprob_reference(exact[0], merged, targets)
    (reference * grad).sum().backward()
    assert relative_error(logprobs, reference) <= TOLERANCE[dtype]
    for leaf, other in zip(leaves, exact):
        assert relative_error(leaf.grad, other.grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_in_float64(softcap: float | None, trainable: bool) -> None:
    hidden, weight, bias, targets = random_inputs(6, 5, 9, torch.float64)
    inputs = [tensor.requires_grad_(index == 0 or trainable) for index, tensor in enumerate((hidden, weight, bias))]

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden, weight, targets, bias=bias, temperature=0.8, softcap=softcap, return_entropy=True)

    def reference(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob_reference(hidden, weight, targets, bias=bias, temperature=0.8, softcap=softcap)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradcheck(reference, inputs)


@pytest.mark.parametrize("trainable", [False, True])
def test_results_are_the_same_bits_every_time(dtype: torch.dtype, trainable: bool) -> None:
    hidden, weight, _, targets = random_inputs(300, 40, 900, dtype)
    outcomes = []
    for _ in range(2):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
        logprobs = linear_logprob(*leaves, targets)
        logprobs.sum().backward()
        outcomes.append([logprobs, *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for first, second in zip(*outcomes):
        assert torch.equal(first, second)


@pytest.mark.parametrize("trainable", [False, True])
def test_gradient_checkpointing(trainable: bool) -> None:
    hidden, weight, _, targets = random_inputs(20, 16, 70, torch.float32)
    gradients = []
    for wrap in (False, True):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
        arguments = (leaf * 2, head, targets)
        call = checkpoint(linear_logprob, *arguments, use_reentrant=False) if wrap else linear_logprob(*arguments)
        call.sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("trainable", [False, True])
def test_torch_compile_without_graph_breaks(trainable: bool) -> None:
    hidden, weight, _, targets = random_inputs(20, 16, 70, torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs, entropy = linear_logprob(hidden * 2, weight, targets, return_entropy=True)
        return logprobs.sum() + 0.1 * entropy.sum()

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
        call(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves if leaf.requires_grad])
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("trainable", [False, True])
def test_second_derivatives_raise(trainable: bool) -> None:
    hidden, weight, _, targets = random_inputs(5, 4, 7, torch.float32)
    hidden.requires_grad_()
    logprobs = linear_logprob(hidden, weight.requires_grad_(trainable), targets)
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_casts_as_a_linear_layer_does() -> None:
    hidden, weight, _, targets = random_inputs(12, 16, 30, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs = linear_logprob(hidden, weight, targets)
    expected = linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(logprobs, expected)
    logprobs.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_kernels_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'amx', 'avx512' or 'none'.*got 'sse'"):
        _C.use_linear_logprob_kernels("sse")
    assert _C.linear_logprob_kernels() == BEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(4)}, "hidden"),
        ({"weight": torch.randn(9, 5)}, "weight"),
        ({"weight": torch.randn(9, 6, dtype=torch.float64)}, "dtype"),
        ({"targets": torch.tensor([0, 1, 9, 2])}, "targets"),
        ({"targets": torch.tensor([0, -1, 3, 2])}, "targets"),
        ({"targets": torch.tensor([0, 1, 2])}, "targets"),
        ({"targets": torch.tensor([0, 1, 2, 3], dtype=torch.int32)}, "int64"),
        ({"bias": torch.randn(8)}, "bias"),
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"lora": (torch.randn(2, 5), torch.randn(9, 2), 1.0)}, "lora"),
        ({"row_offsets": torch.tensor([0, 1, 2, 3])}, "row_offsets"),
        ({"row_offsets": torch.tensor([0, 1, 2, 3, 5])}, "row_offsets"),
        ({"targets": torch.tensor([3, 3, 1, 2]), "row_offsets": torch.tensor([0, 2, 2, 3, 4])}, "distinct"),
    ],
)
def test_wrong_values_are_named(change: dict, message: str) -> None:
    arguments = {
        "hidden": torch.randn(4, 6),
        "weight": torch.randn(9, 6),
        "targets": torch.tensor([0, 8, -100, 2]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)
