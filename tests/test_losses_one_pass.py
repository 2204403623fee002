"""Losses of a trainable head in one pass: equal to float64 plain torch and to two passes, whatever the pieces are."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from test_losses_numerics import TOLERANCE, random_inputs
from test_losses_policy import ALL_TYPES, BATCH, LENGTH, Case, dense_loss, options
from test_losses_preference import ALL_TYPES as PREFERENCE_TYPES
from test_losses_preference import PAIRS, formula
from test_losses_preference import Case as Pairs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpo_fast import _C
from gpo_fast.losses import (
    LossOutput,
    SharedRows,
    chunked,
    dispatch,
    linear_policy_loss,
    linear_preference_loss,
    one_pass,
)
from gpo_fast.losses.reference import linear_logprob_reference

PER_SEQUENCE = ["gspo", "rloo"]
BEST = _C.linear_logprob_kernels()


@pytest.fixture(autouse=True)
def _one_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a CPU two passes are faster; here one is taken, of bfloat16 by the torch path."""
    monkeypatch.setattr(dispatch, "one_pass", dispatch.choose)
    _C.use_linear_logprob_kernels("none")
    yield
    _C.use_linear_logprob_kernels(BEST)


def cut(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Pieces of so many rows."""
    monkeypatch.setattr(chunked, "rows_at_once", lambda head, hidden: rows)


def passes(loss: Tensor) -> int:
    return 1 if "Attach" in loss.grad_fn.name() else 2


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact.detach()).norm() / exact.detach().norm())


def two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "one_pass", lambda head, hidden: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [5, 7, 1000, "two passes", "frozen"])
@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_every_policy_loss_with_every_option(
    loss_type: str, how: int | str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of so many rows end inside the sequences of 1, 3, 5 and 7 tokens; gspo and rloo need them whole."""
    if isinstance(how, int):
        cut(monkeypatch, how)
    elif how == "two passes":
        two_passes(monkeypatch)
    case = Case(torch.float64)
    leaves = [tensor.to(dtype) for tensor in (case.hidden, case.weight, 0.3 * torch.randn(case.weight.shape[0]))]
    exact = [tensor.double().requires_grad_() for tensor in leaves]
    leaves = [tensor.requires_grad_(index == 0 or how != "frozen") for index, tensor in enumerate(leaves)]
    output = linear_policy_loss(
        leaves[0], leaves[1], case.targets, loss_type=loss_type, advantages=case.advantages, bias=leaves[2],
        old_logprobs=case.old, ref_logprobs=case.ref, beta=0.05, epsilon_high=0.3, awr_beta=0.7, entropy_coef=0.2,
        temperature=0.8, softcap=3.0, **options(loss_type),
    )  # fmt: skip
    (output.loss / 3).backward()
    logprobs, entropy = linear_logprob_reference(
        exact[0].flatten(0, 1), exact[1], case.targets.flatten(), bias=exact[2], temperature=0.8, softcap=3.0
    )
    logprobs, entropy = logprobs.reshape(BATCH, LENGTH), entropy.reshape(BATCH, LENGTH)
    loss = dense_loss(case, loss_type, logprobs, advantages=case.advantages.unsqueeze(1), beta=0.05, high=0.3)
    loss = loss - 0.2 * entropy.sum() / case.mask.sum()
    (loss / 3).backward()

    single = isinstance(how, int) and not (loss_type in PER_SEQUENCE and how < 7)
    assert passes(output.loss) == (1 if single else 2)
    tolerance = 1e-12 if dtype == torch.float64 else TOLERANCE[dtype]
    assert relative_error(output.loss, loss) <= tolerance
    assert relative_error(output.logprobs, logprobs) <= tolerance
    assert relative_error(output.entropy, entropy) <= tolerance
    for leaf, reference in zip(leaves, exact):
        if leaf.requires_grad:
            assert relative_error(leaf.grad, reference.grad) <= tolerance


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("loss_type", PREFERENCE_TYPES)
def test_a_preference_loss_with_every_option_of_the_head(
    loss_type: str, single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not single:
        two_passes(monkeypatch)
    case = Pairs()
    width, vocab = case.weight.shape[1], case.weight.shape[0]
    leaves = [case.hidden.clone(), case.weight.clone(), 0.3 * torch.randn(vocab, dtype=torch.float64)]
    leaves += [torch.randn(3, width, dtype=torch.float64) / 4, torch.randn(vocab, 3, dtype=torch.float64) / 4]
    exact = [leaf.clone().requires_grad_() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output = linear_preference_loss(
        leaves[0], leaves[1], case.targets, loss_type=loss_type, beta=0.7, bias=leaves[2], temperature=0.8,
        softcap=3.0, lora=(leaves[3], leaves[4], 0.5), **case.arguments(loss_type),
    )  # fmt: skip
    output.loss.backward()
    logprobs, _ = linear_logprob_reference(
        exact[0].flatten(0, 1), exact[1] + 0.5 * exact[4] @ exact[3], case.targets.flatten(), bias=exact[2],
        temperature=0.8, softcap=3.0,
    )  # fmt: skip
    loss = formula(case, loss_type, logprobs.reshape(case.targets.shape), 0.7)
    loss.backward()
    assert passes(output.loss) == (1 if single else 2)
    assert relative_error(output.loss, loss) <= 1e-12
    for leaf, reference in zip(leaves, exact):
        assert relative_error(leaf.grad, reference.grad) <= 1e-12


@pytest.mark.parametrize("rows", [13, 14, 1000])
@pytest.mark.parametrize("loss_type", PREFERENCE_TYPES)
def test_every_preference_loss(loss_type: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of 2 + 5, 3 + 6 and 4 + 7 tokens; in two passes the same to the last digits."""
    cut(monkeypatch, rows)
    case = Pairs()
    outcomes = []
    for single in (True, False):
        if not single:
            two_passes(monkeypatch)
        leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        output = linear_preference_loss(
            *leaves, case.targets, loss_type=loss_type, beta=0.7, num_examples=5, **case.arguments(loss_type)
        )
        assert passes(output.loss) == (1 if single else 2)
        output.loss.backward()
        outcomes.append([output.loss, output.logprobs, *output.metrics.values(), *(leaf.grad for leaf in leaves)])
    for value, exact in zip(*outcomes):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-14)


def test_a_pair_longer_than_a_piece_goes_in_two_passes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut(monkeypatch, 10)
    one_pass._announce.cache_clear()
    case = Pairs()
    with caplog.at_level(logging.INFO, logger="gpo_fast"):
        for _ in range(2):
            output = linear_preference_loss(
                case.hidden, case.weight.requires_grad_(), case.targets, loss_type="dpo", ref_logprobs=case.ref
            )
    assert passes(output.loss) == 2
    said = [record.message for record in caplog.records if "trainable head" in record.message]
    assert len(said) == 1
    assert "two passes" in said[0]
    assert "more than 10 tokens" in said[0]


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_pairs_with_an_empty_side(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chosen sequence without tokens, and one pair without any."""
    cut(monkeypatch, max(rows, 7))
    case = Pairs()
    targets = case.targets.clone()
    targets[0] = targets[1] = targets[PAIRS + 1] = -100
    outcomes = []
    for single in (True, False):
        if not single:
            two_passes(monkeypatch)
        leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        output = linear_preference_loss(*leaves, targets, loss_type="simpo")
        output.loss.backward()
        outcomes.append([output.loss, *(leaf.grad for leaf in leaves)])
    for value, exact in zip(*outcomes):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-14)


class SharedCase:
    """Loss tokens that share rows, in no order: some are one pair of row and target, some one row."""

    def __init__(self) -> None:
        lengths = torch.tensor([1, 3, 0, 2, 1, 1, 2])
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        self.pairs = torch.cat([torch.randperm(20)[:length] for length in lengths.tolist()])
        self.pair_of_token = torch.randint(0, self.pairs.shape[0], (25,))
        self.rows = torch.arange(7).repeat_interleave(lengths)[self.pair_of_token]
        self.targets = self.pairs[self.pair_of_token]
        self.targets[[3, 11]] = -100
        self.hidden = torch.randn(7, 6, dtype=torch.float64)
        self.weight = torch.randn(20, 6, dtype=torch.float64)
        self.advantages = torch.randn(25, dtype=torch.float64)
        self.old = -3 + torch.randn(25, dtype=torch.float64)

    def shared(self) -> SharedRows:
        return SharedRows(self.pairs, self.offsets, self.pair_of_token)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("loss_type", ["grpo", "awr", "gspo"])
def test_tokens_that_share_rows(loss_type: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, rows)
    case = SharedCase()
    outcomes = []
    for shared in (True, False):
        leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        output = linear_policy_loss(
            leaves[0] if shared else leaves[0][case.rows], leaves[1], case.targets, loss_type=loss_type,
            advantages=case.advantages, old_logprobs=case.old, entropy_coef=0.1,
            shared=case.shared() if shared else None,
        )  # fmt: skip
        if shared:
            assert passes(output.loss) == (2 if loss_type == "gspo" else 1)
        output.loss.backward()
        outcomes.append([output.loss, output.logprobs, output.entropy, *(leaf.grad for leaf in leaves)])
        two_passes(monkeypatch)
    for value, exact in zip(*outcomes):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_a_frozen_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 4)
    case = Case(torch.float64)
    lora = [torch.randn(3, case.weight.shape[1]).to(dtype) / 4, torch.randn(case.weight.shape[0], 3).to(dtype) / 2]
    weight = case.weight.to(dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (case.hidden.to(dtype), *lora)]
    output = linear_policy_loss(
        leaves[0], weight, case.targets, loss_type="dapo", advantages=case.advantages, old_logprobs=case.old,
        lora=(leaves[1], leaves[2], 0.5), epsilon_high=0.3,
    )  # fmt: skip
    assert passes(output.loss) == 1
    output.loss.backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logprobs, _ = case.logprobs(exact[0], weight.double() + 0.5 * exact[2] @ exact[1])
    dense_loss(case, "dapo", logprobs, advantages=case.advantages.unsqueeze(1), beta=0.0, high=0.3).backward()
    for leaf, reference in zip(leaves, exact):
        assert relative_error(leaf.grad, reference.grad) <= TOLERANCE[dtype]


def run(hidden: Tensor, weight: Tensor, targets: Tensor, **changes) -> LossOutput:
    arguments = {"loss_type": "ppo", "advantages": torch.randn(1).expand(targets.shape), **changes}
    return linear_policy_loss(hidden, weight, targets, **arguments)


@pytest.mark.parametrize("shape", [(256, 128, 512), (252, 123, 507), (93, 31, 123), (1, 64, 4096), (4096, 256, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """With the pieces that such a head gets; a fifth of the rows is ignored."""
    hidden, weight, _, targets = random_inputs(*shape, dtype)
    old, advantages = -6 + torch.randn(shape[0]), torch.randn(shape[0])
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    output = run(*leaves, targets, old_logprobs=old, advantages=advantages)
    assert passes(output.loss) == 1
    output.loss.backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logprobs, _ = linear_logprob_reference(*exact, targets)
    ratio = (logprobs - old).clamp(-20, 20).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (-gain[targets != -100].mean()).backward()
    for leaf, reference in zip(leaves, exact):
        assert relative_error(leaf.grad, reference.grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_a_common_offset_of_all_logits(level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 logit of size 1e4 is rounded by up to 2**-11, which is the error of a probability."""
    cut(monkeypatch, 9)
    hidden, weight, _, targets = random_inputs(40, 32, 300, torch.float32)
    gradients = []
    for bias in (torch.full((300,), level), torch.zeros(300)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        run(*leaves, targets, advantages=torch.ones(40), bias=bias).loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for value, exact in zip(*gradients):
        assert relative_error(value, exact.double()) <= 2**-10


@pytest.mark.parametrize("loss_type", ALL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_numbers_stay_finite(loss_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 1e4, ratios that overflow, advantages of 1e6."""
    cut(monkeypatch, 8)
    case = Case(torch.float32)
    leaves = [(100 * case.hidden).to(dtype).requires_grad_(), (100 * case.weight).to(dtype).requires_grad_()]
    output = linear_policy_loss(
        *leaves, case.targets, loss_type=loss_type, advantages=1e6 * case.advantages,
        old_logprobs=1e4 * torch.randn(BATCH, LENGTH), entropy_coef=0.1, **options(loss_type),
    )  # fmt: skip
    assert passes(output.loss) == 1
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_nothing_to_learn_from() -> None:
    hidden, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    output = run(hidden, weight, torch.full((3, 5), -100))
    output.loss.backward()
    assert output.loss == 0
    assert output.logprobs.abs().max() == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_ignored_rows_are_not_read() -> None:
    hidden, weight, _, targets = random_inputs(50, 16, 80, torch.float32)
    hidden[targets == -100] = float("nan")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    run(*leaves, targets).loss.backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_gradcheck_in_float64(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes backward several times through one graph."""
    cut(monkeypatch, 7)
    case = Case(shift=0.05)  # the clips are not reached, where a loss has no derivative
    inputs = [case.hidden[:, :, :4].clone().requires_grad_(), case.weight[:9, :4].clone().requires_grad_()]
    inputs.append(torch.randn(9, dtype=torch.float64).requires_grad_())
    targets = torch.where(case.mask, case.targets % 9, -100)
    old = linear_policy_loss(inputs[0], inputs[1], targets, loss_type="awr", advantages=case.advantages).logprobs

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = linear_policy_loss(
            hidden, weight, targets, loss_type=loss_type, advantages=case.advantages, old_logprobs=old + 0.03,
            bias=0.01 * bias, temperature=0.9, softcap=4.0, entropy_coef=0.1, **options(loss_type),
        )  # fmt: skip
        assert passes(output.loss) == 1
        return output.loss

    if loss_type == "cispo":
        pytest.skip("its ratio is a constant to the gradient, not to differences of the loss")
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("how", ["one pass", "two passes", "frozen"])
@pytest.mark.parametrize("loss_type", PREFERENCE_TYPES)
def test_gradcheck_of_preference_losses_in_float64(loss_type: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 13)
    if how == "two passes":
        two_passes(monkeypatch)
    case = Pairs()
    inputs = [case.hidden[:, :, :2].clone(), case.weight[:9, :2].clone(), 0.3 * torch.randn(9, dtype=torch.float64)]
    inputs = [tensor.requires_grad_(index == 0 or how != "frozen") for index, tensor in enumerate(inputs)]
    targets = torch.where(case.targets == -100, -100, case.targets % 9)
    arguments = case.arguments(loss_type)
    if "ref_logprobs" in arguments:
        own = linear_preference_loss(inputs[0], inputs[1], targets, loss_type="simpo").logprobs
        arguments["ref_logprobs"] = own + 0.3 * torch.randn(own.shape)  # close, so that no sigmoid is flat

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = linear_preference_loss(
            hidden, weight, targets, loss_type=loss_type, beta=0.7, bias=bias, temperature=0.9, softcap=4.0,
            **arguments,
        )  # fmt: skip
        assert passes(output.loss) == (1 if how == "one pass" else 2)
        return output.loss

    # Differences over 1e-6 are good to about 1e-9. The defaults would pass an error of 3 % in the smallest gradients.
    assert torch.autograd.gradcheck(call, inputs, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss_type", [name for name in ALL_TYPES if name != "awr"])
def test_advantages_of_zero_give_no_gradient(
    loss_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, 7)
    case = Case(dtype)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    output = linear_policy_loss(
        *leaves, case.targets, loss_type=loss_type, advantages=torch.zeros(BATCH), old_logprobs=case.old,
        **options(loss_type),
    )  # fmt: skip
    assert passes(output.loss) == 1
    output.loss.backward()
    assert output.loss == 0
    assert all(leaf.grad.abs().max() == 0 for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_gives_the_gradients_twice(dtype: torch.dtype) -> None:
    hidden, weight, _, targets = random_inputs(30, 16, 90, dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = run(*leaves, targets).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(*pair) for pair in zip(first, second))


@pytest.mark.parametrize(("loss_type", "sizes"), [("grpo", [7, 7, 2]), ("gspo", [4, 5, 7])])
def test_pieces_are_as_large_as_allowed(loss_type: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of 1, 3, 5 and 7 tokens."""
    cut(monkeypatch, 7)
    forward_logits, seen = chunked.forward_logits, []

    def counting(head, batch, *options):
        seen.append(batch.count)
        return forward_logits(head, batch, *options)

    monkeypatch.setattr(chunked, "forward_logits", counting)
    case = Case()
    weight = case.weight.requires_grad_()
    linear_policy_loss(case.hidden, weight, case.targets, loss_type=loss_type, advantages=case.advantages)
    assert seen == sizes


def test_second_derivatives_raise() -> None:
    hidden, weight, _, targets = random_inputs(5, 4, 7, torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    (gradient,) = torch.autograd.grad(run(*leaves, targets).loss.square(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    hidden, weight, _, targets = random_inputs(20, 16, 70, torch.float32)
    advantages = torch.randn(20)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return run(hidden * 2, weight, targets, advantages=advantages).loss

    gradients = []
    for wrap in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = checkpoint(loss, *leaves, use_reentrant=reentrant) if wrap else loss(*leaves)
        value.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for first, second in zip(*gradients):
        assert torch.equal(first, second)


@pytest.mark.parametrize("loss_type", ["grpo", "dpo"])
def test_torch_compile_without_graph_breaks(loss_type: str) -> None:
    """A compiled loss goes through the two operators of two passes."""
    case = Pairs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        if loss_type == "dpo":
            return linear_preference_loss(hidden * 2, weight, case.targets, loss_type="dpo", ref_logprobs=case.ref).loss
        advantages = case.ref[:, 0]
        return linear_policy_loss(hidden * 2, weight, case.targets, loss_type="grpo", advantages=advantages).loss

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        call(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second)


def test_results_are_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 70)
    hidden, weight, _, targets = random_inputs(300, 40, 900, torch.float32)
    advantages = torch.randn(300)
    outcomes = []
    for _ in range(2):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        output = run(*leaves, targets, advantages=advantages, entropy_coef=0.1)
        output.loss.backward()
        outcomes.append([output.loss, output.logprobs, *(leaf.grad for leaf in leaves)])
    for first, second in zip(*outcomes):
        assert torch.equal(first, second)


def test_autocast_casts_as_a_linear_layer_does() -> None:
    hidden, weight, _, targets = random_inputs(12, 16, 30, torch.float32)
    advantages, gradients = torch.randn(12), []
    for cast in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            inputs = leaves if cast else [leaf.bfloat16() for leaf in leaves]
            loss = run(*inputs, targets, advantages=advantages).loss
        loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for first, second in zip(*gradients):
        assert first.dtype == torch.float32
        assert torch.equal(first, second)


def test_advantages_that_are_learned_get_their_gradient() -> None:
    """Only two passes give them one."""
    case = Case()
    advantages = case.advantages.clone().requires_grad_()
    output = linear_policy_loss(
        case.hidden, case.weight.requires_grad_(), case.targets, loss_type="ppo", advantages=advantages
    )
    assert passes(output.loss) == 2
    output.loss.backward()
    # On-policy the ratio is 1: the loss is -A for each token.
    torch.testing.assert_close(advantages.grad, -case.mask.sum(1) / case.mask.sum().double())


@pytest.mark.parametrize("single", [True, False])
def test_the_log_says_how(single: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if not single:
        monkeypatch.undo()  # a CPU's own choice
    one_pass._announce.cache_clear()
    hidden, weight, _, targets = random_inputs(20, 16, 70, torch.float32)
    with caplog.at_level(logging.INFO, logger="gpo_fast"):
        assert passes(run(hidden, weight.requires_grad_(), targets).loss) == (1 if single else 2)
    assert f"torch.float32 on cpu: {'one pass' if single else 'two passes'}" in caplog.text
