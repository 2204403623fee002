"""The policy losses against their formulas, written out densely in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpo_fast.losses import LossOutput, linear_policy_loss
from gpo_fast.losses.reference import linear_logprob_reference

ALL_TYPES = ["awr", "ppo", "grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo"]
BATCH, LENGTH, WIDTH, VOCAB = 4, 9, 16, 57
MAX_LENGTH = 12


class Case:
    """A random padded batch; sequence i has 1 + 2 i tokens."""

    def __init__(self, dtype: torch.dtype = torch.float64, shift: float = 0.4) -> None:
        self.hidden = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype)
        self.weight = torch.randn(VOCAB, WIDTH, dtype=dtype) / 4
        self.targets = torch.randint(0, VOCAB, (BATCH, LENGTH))
        self.mask = torch.arange(LENGTH) < (1 + 2 * torch.arange(BATCH)).unsqueeze(1)
        self.targets[~self.mask] = -100
        exact, _ = self.logprobs(self.hidden, self.weight)
        self.old = exact + shift * torch.randn_like(exact)
        self.ref = exact + shift * torch.randn_like(exact)
        self.advantages = torch.randn(BATCH, dtype=torch.float64)

    def logprobs(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = linear_logprob_reference(
            hidden.double().flatten(0, 1), weight.double(), self.targets.flatten()
        )
        return logprobs.reshape(BATCH, LENGTH), entropy.reshape(BATCH, LENGTH)


def dense_loss(case: Case, loss_type: str, logprobs: Tensor, *, advantages: Tensor, beta: float, high: float):
    """The formulas of the papers on (B, T) matrices. advantages (B, 1) or (B, T)."""
    mask = case.mask.double()
    lengths = mask.sum(1)
    log_ratio = logprobs - case.old
    if loss_type == "gspo":
        log_ratio = ((log_ratio * mask).sum(1) / lengths).unsqueeze(1).expand_as(mask)
    if loss_type == "rloo":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True).expand_as(mask)
    ratio = log_ratio.exp()
    if loss_type == "awr":
        terms = -torch.exp(advantages / 0.7) * logprobs
    elif loss_type == "cispo":
        terms = -ratio.detach().clamp(max=1 + high) * advantages * logprobs
    else:
        terms = -torch.min(ratio * advantages, ratio.clamp(0.8, 1 + high) * advantages)
    difference = case.ref - logprobs
    terms = (terms + beta * (difference.exp() - difference - 1)) * mask
    if loss_type == "awr":
        return terms.sum() / BATCH
    if loss_type in ("ppo", "bnpo", "dapo", "cispo"):
        return terms.sum() / mask.sum()
    if loss_type == "dr_grpo":
        return terms.sum() / (BATCH * MAX_LENGTH)
    return (terms.sum(1) / lengths).mean()


def options(loss_type: str) -> dict:
    return {"max_completion_length": MAX_LENGTH} if loss_type == "dr_grpo" else {}


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_loss_and_gradients_equal_the_dense_formula(loss_type: str, trainable: bool) -> None:
    case = Case()
    leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(trainable)]
    output = linear_policy_loss(
        *leaves,
        case.targets,
        loss_type=loss_type,
        advantages=case.advantages,
        old_logprobs=case.old,
        ref_logprobs=case.ref,
        beta=0.05,
        epsilon_high=0.3,
        awr_beta=0.7,
        **options(loss_type),
    )
    output.loss.backward()
    exact = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    logprobs, entropy = case.logprobs(*exact)
    loss = dense_loss(case, loss_type, logprobs, advantages=case.advantages.unsqueeze(1), beta=0.05, high=0.3)
    loss.backward()
    assert relative_error(output.loss, loss) < 1e-12
    assert relative_error(output.logprobs, logprobs) < 1e-12
    assert relative_error(output.entropy, entropy) < 1e-12
    for leaf, reference in zip(leaves, exact):
        if reference.requires_grad:
            assert relative_error(leaf.grad, reference.grad) < 1e-12


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_flat_rows_give_the_same_loss_as_padded_rows(loss_type: str) -> None:
    case = Case()
    kept = case.mask.flatten()
    sequence_ids = torch.arange(BATCH).repeat_interleave(LENGTH)[kept]
    common = {"loss_type": loss_type, "advantages": case.advantages, **options(loss_type)}
    padded = linear_policy_loss(case.hidden, case.weight, case.targets, old_logprobs=case.old, **common)
    flat = linear_policy_loss(
        case.hidden.flatten(0, 1)[kept],
        case.weight,
        case.targets.flatten()[kept],
        sequence_ids=sequence_ids,
        old_logprobs=case.old.flatten()[kept],
        **common,
    )
    assert relative_error(flat.loss, padded.loss) < 1e-12
    for name, value in padded.metrics.items():
        torch.testing.assert_close(flat.metrics[name], value)


@pytest.mark.parametrize("loss_type", [name for name in ALL_TYPES if name != "rloo"])
def test_advantages_per_step_and_per_token_agree(loss_type: str) -> None:
    case = Case()
    steps = torch.randn(7, dtype=torch.float64)
    step_ids = torch.randint(0, 7, (BATCH, LENGTH))
    common = {"loss_type": loss_type, "old_logprobs": case.old, "awr_beta": 0.7, **options(loss_type)}
    by_step = linear_policy_loss(case.hidden, case.weight, case.targets, advantages=steps, step_ids=step_ids, **common)
    by_token = linear_policy_loss(case.hidden, case.weight, case.targets, advantages=steps[step_ids], **common)
    assert by_step.loss == by_token.loss
    logprobs, _ = case.logprobs(case.hidden, case.weight)
    exact = dense_loss(case, loss_type, logprobs, advantages=steps[step_ids], beta=0.0, high=0.2)
    assert relative_error(by_step.loss, exact) < 1e-12


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_on_policy_is_the_ratio_of_the_detached_logprob(loss_type: str) -> None:
    case = Case()
    case.old, _ = case.logprobs(case.hidden, case.weight)
    outputs: list[LossOutput] = []
    gradients = []
    for old in (None, case.old):
        hidden = case.hidden.clone().requires_grad_()
        output = linear_policy_loss(
            hidden,
            case.weight,
            case.targets,
            loss_type=loss_type,
            advantages=case.advantages,
            old_logprobs=old,
            **options(loss_type),
        )
        output.loss.backward()
        outputs.append(output)
        gradients.append(hidden.grad)
    assert relative_error(outputs[0].loss, outputs[1].loss) < 1e-12
    assert relative_error(gradients[0], gradients[1]) < 1e-12
    assert outputs[0].metrics["ratio_mean"] == 1.0
    assert gradients[0].norm() > 0


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_micro_batches_with_global_counts_add_up(loss_type: str) -> None:
    case = Case()
    whole = linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        loss_type=loss_type,
        advantages=case.advantages,
        old_logprobs=case.old,
        **options(loss_type),
    )
    parts = [
        linear_policy_loss(
            case.hidden[part],
            case.weight,
            case.targets[part],
            loss_type=loss_type,
            advantages=case.advantages[part],
            old_logprobs=case.old[part],
            num_sequences=BATCH,
            num_tokens=case.mask.sum(),
            **options(loss_type),
        ).loss
        for part in (slice(0, 1), slice(1, BATCH))
    ]
    assert relative_error(parts[0] + parts[1], whole.loss) < 1e-12


def test_entropy_bonus_and_its_gradient() -> None:
    case = Case()
    for trainable in (False, True):
        leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(trainable)]
        output = linear_policy_loss(
            *leaves,
            case.targets,
            loss_type="bnpo",
            advantages=torch.zeros(BATCH, dtype=torch.float64),
            entropy_coef=0.3,
        )
        output.loss.backward()
        exact = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
        loss = -0.3 * case.logprobs(*exact)[1].sum() / case.mask.sum()
        loss.backward()
        assert relative_error(output.loss, loss) < 1e-12
        assert relative_error(leaves[0].grad, exact[0].grad) < 1e-12
        if trainable:
            assert relative_error(leaves[1].grad, exact[1].grad) < 1e-12


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("k1", lambda d: -d),
        ("k2", lambda d: d**2 / 2),
        ("k3", lambda d: d.exp() - d - 1),
    ],
)
def test_kl_estimators(kind: str, formula) -> None:
    case = Case()
    output = linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        loss_type="bnpo",
        advantages=torch.zeros(BATCH, dtype=torch.float64),
        ref_logprobs=case.ref,
        beta=2.0,
        kl=kind,
    )
    logprobs, _ = case.logprobs(case.hidden, case.weight)
    exact = formula(case.ref - logprobs)[case.mask].mean()
    assert relative_error(output.metrics["kl"], exact) < 1e-12
    assert relative_error(output.loss, 2 * exact) < 1e-12


def test_dual_clip_bounds_the_loss_of_a_bad_token() -> None:
    case = Case()
    case.old = case.logprobs(case.hidden, case.weight)[0] - 3.0  # ratio exp(3) = 20
    common = {"loss_type": "ppo", "advantages": torch.full((BATCH,), -2.0), "old_logprobs": case.old}
    hidden = case.hidden.clone().requires_grad_()
    unbounded = linear_policy_loss(hidden, case.weight, case.targets, **common)
    bounded = linear_policy_loss(hidden, case.weight, case.targets, dual_clip=3.0, **common)
    assert relative_error(unbounded.loss, torch.tensor(2.0).double() * torch.tensor(3.0).double().exp()) < 1e-12
    assert relative_error(bounded.loss, torch.tensor(6.0).double()) < 1e-12
    bounded.loss.backward()
    assert hidden.grad.abs().max() == 0


def test_truncated_importance_sampling_weighs_the_policy_term_only() -> None:
    case = Case()
    rollout = case.old + torch.randn_like(case.old)
    common = {"loss_type": "dapo", "advantages": case.advantages, "old_logprobs": case.old}
    corrected = linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        rollout_logprobs=rollout,
        importance_cap=1.5,
        ref_logprobs=case.ref,
        beta=0.1,
        **common,
    )
    importance = (case.old - rollout).exp().clamp(max=1.5)
    logprobs, _ = case.logprobs(case.hidden, case.weight)
    ratio = (logprobs - case.old).exp()
    gain = torch.min(ratio * case.advantages.unsqueeze(1), ratio.clamp(0.8, 1.2) * case.advantages.unsqueeze(1))
    difference = case.ref - logprobs
    terms = -importance * gain + 0.1 * (difference.exp() - difference - 1)
    assert relative_error(corrected.loss, terms[case.mask].mean()) < 1e-12


def test_awr_clamps_the_exponent_and_its_gradient() -> None:
    case = Case()
    advantages = torch.tensor([0.5, 100.0, -1.0, 3.0], dtype=torch.float64, requires_grad=True)
    output = linear_policy_loss(
        case.hidden, case.weight, case.targets, loss_type="awr", advantages=advantages, awr_max_exponent=2.0
    )
    output.loss.backward()
    logprobs, _ = case.logprobs(case.hidden, case.weight)
    exact = -(torch.exp(advantages.detach().clamp(max=2.0)) * logprobs.sum(1)).sum() / BATCH
    assert relative_error(output.loss, exact) < 1e-12
    assert advantages.grad[1] == 0
    assert advantages.grad[3] == 0
    assert advantages.grad[0] > 0


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_tokens_without_weight_change_nothing(loss_type: str) -> None:
    case = Case()
    weights = torch.rand(BATCH, LENGTH, dtype=torch.float64)
    weights[:, 1] = 0.0
    hidden = case.hidden.clone().requires_grad_()
    output = linear_policy_loss(
        hidden,
        case.weight,
        case.targets,
        loss_type=loss_type,
        advantages=case.advantages,
        old_logprobs=case.old,
        weights=weights,
        **options(loss_type),
    )
    output.loss.backward()
    if loss_type not in ("gspo", "rloo"):
        assert hidden.grad[:, 1].abs().max() == 0
    assert torch.isfinite(output.loss)
    assert hidden.grad.norm() > 0


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_overflowing_ratios_and_huge_advantages_stay_finite(loss_type: str) -> None:
    case = Case(torch.float32)
    case.old = case.old - 1e4 * torch.randn_like(case.old)
    hidden = case.hidden.clone().requires_grad_()
    output = linear_policy_loss(
        hidden,
        case.weight,
        case.targets,
        loss_type=loss_type,
        advantages=1e6 * case.advantages,
        old_logprobs=case.old,
        ref_logprobs=case.old,
        beta=0.1,
        **options(loss_type),
    )
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("loss_type", [name for name in ALL_TYPES if name != "awr"])
def test_advantages_of_zero_give_no_gradient(loss_type: str, trainable: bool, dtype: torch.dtype) -> None:
    case = Case(dtype)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_(trainable)]
    output = linear_policy_loss(
        *leaves,
        case.targets,
        loss_type=loss_type,
        advantages=torch.zeros(BATCH),
        old_logprobs=case.old,
        **options(loss_type),
    )
    output.loss.backward()
    assert output.loss == 0
    assert all(leaf.grad.abs().max() == 0 for leaf in leaves if leaf.requires_grad)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("loss_type", [name for name in ALL_TYPES if name != "awr"])
def test_advantages_of_zero_leave_the_kl_and_entropy_terms(loss_type: str, trainable: bool) -> None:
    """Means over tokens as the policy term's are, of the entropy always over the tokens of the batch."""
    case = Case()
    leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(trainable)]
    output = linear_policy_loss(
        *leaves,
        case.targets,
        loss_type=loss_type,
        advantages=torch.zeros(BATCH, dtype=torch.float64),
        old_logprobs=case.old,
        ref_logprobs=case.ref,
        beta=0.05,
        entropy_coef=0.3,
        **options(loss_type),
    )
    output.loss.backward()
    exact = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    logprobs, entropy = case.logprobs(*exact)
    difference = case.ref - logprobs
    divergence = (difference.exp() - difference - 1) * case.mask
    lengths = case.mask.sum(1)
    if loss_type in ("ppo", "bnpo", "dapo", "cispo"):
        divergence = divergence.sum() / lengths.sum()
    elif loss_type == "dr_grpo":
        divergence = divergence.sum() / (BATCH * MAX_LENGTH)
    else:
        divergence = (divergence.sum(1) / lengths).mean()
    loss = 0.05 * divergence - 0.3 * entropy.sum() / lengths.sum()
    loss.backward()
    assert relative_error(output.loss, loss) < 1e-12
    for leaf, reference in zip(leaves, exact):
        if reference.requires_grad:
            assert relative_error(leaf.grad, reference.grad) < 1e-12


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_a_batch_without_targets_has_no_loss(loss_type: str) -> None:
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    output = linear_policy_loss(
        hidden,
        weight,
        torch.full((3, 5), -100),
        loss_type=loss_type,
        advantages=torch.randn(3),
        **options(loss_type),
    )
    output.loss.backward()
    assert output.loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "a2c"}, "loss_type"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"beta": 0.1}, "ref_logprobs"),
        ({"advantages": torch.randn(BATCH + 1)}, "advantages"),
        ({"step_ids": torch.full((BATCH, LENGTH), BATCH)}, "step_ids"),
        ({"old_logprobs": torch.randn(BATCH)}, "old_logprobs"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"sequence_ids": torch.zeros(BATCH)}, "sequence_ids"),
        ({"awr_beta": 0.0}, "awr_beta"),
    ],
)
def test_wrong_values_are_named(change: dict, message: str) -> None:
    case = Case()
    arguments = {"loss_type": "grpo", "advantages": case.advantages, **change}
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(case.hidden, case.weight, case.targets, **arguments)


def test_sequence_ids_must_ascend() -> None:
    with pytest.raises(ValueError, match="ascending"):
        linear_policy_loss(
            torch.randn(3, 4),
            torch.randn(5, 4),
            torch.tensor([0, 1, 2]),
            loss_type="grpo",
            advantages=torch.randn(2),
            sequence_ids=torch.tensor([1, 0, 1]),
        )
