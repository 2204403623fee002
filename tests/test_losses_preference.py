"""The preference losses against float64 formulas and against TRL's own code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpo_fast.losses import linear_preference_loss
from gpo_fast.losses.reference import linear_logprob_reference

PAIRS, LENGTH, WIDTH, VOCAB = 3, 8, 12, 41
ALL_TYPES = ["dpo", "kto", "simpo", "orpo"]


class Case:
    """2 * PAIRS sequences of 2 to 7 tokens; the first half is chosen."""

    def __init__(self) -> None:
        self.hidden = torch.randn(2 * PAIRS, LENGTH, WIDTH, dtype=torch.float64)
        self.weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64) / 4
        self.targets = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH))
        self.targets[torch.arange(LENGTH) >= torch.arange(2, 2 + 2 * PAIRS).unsqueeze(1)] = -100
        self.mask = (self.targets != -100).double()
        self.ref = self.logprobs(self.hidden) + 0.5 * torch.randn(2 * PAIRS, LENGTH)
        self.desirable = torch.tensor([True, False, True, False, False, True])

    def logprobs(self, hidden: Tensor) -> Tensor:
        logprobs, _ = linear_logprob_reference(hidden.flatten(0, 1), self.weight, self.targets.flatten())
        return logprobs.reshape(2 * PAIRS, LENGTH)

    def arguments(self, loss_type: str) -> dict:
        if loss_type == "dpo":
            return {"ref_logprobs": self.ref}
        if loss_type == "kto":
            return {
                "ref_logprobs": self.ref,
                "desirable": self.desirable,
                "reference_kl": 0.3,
                "desirable_weight": 1.3,
                "undesirable_weight": 0.8,
            }
        return {}


def formula(case: Case, loss_type: str, logprobs: Tensor, beta: float) -> Tensor:
    sums = logprobs.sum(1)
    means = sums / case.mask.sum(1)
    if loss_type == "kto":
        value = beta * (sums - (case.ref * case.mask).sum(1) - 0.3)
        return torch.where(case.desirable, 1.3 * (1 - torch.sigmoid(value)), 0.8 * (1 - torch.sigmoid(-value))).mean()
    if loss_type == "dpo":
        ratio = sums - (case.ref * case.mask).sum(1)
        return -F.logsigmoid(beta * (ratio[:PAIRS] - ratio[PAIRS:])).mean()
    if loss_type == "simpo":
        return -F.logsigmoid(beta * (means[:PAIRS] - means[PAIRS:]) - 0.5).mean()
    odds = means.exp() / (1 - means.exp())
    likelihood = sums[:PAIRS].sum() / case.mask[:PAIRS].sum()
    return -likelihood - beta * F.logsigmoid((odds[:PAIRS] / odds[PAIRS:]).log()).mean()


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_loss_and_gradient_equal_the_formula(loss_type: str) -> None:
    case = Case()
    hidden, exact = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    output = linear_preference_loss(
        hidden, case.weight, case.targets, loss_type=loss_type, beta=0.7, **case.arguments(loss_type)
    )
    reference = formula(case, loss_type, case.logprobs(exact), 0.7)
    output.loss.backward()
    reference.backward()
    assert relative_error(output.loss, reference) < 1e-12
    assert relative_error(hidden.grad, exact.grad) < 1e-12


@pytest.mark.parametrize("loss_type", ALL_TYPES)
def test_flat_rows_and_summed_references_give_the_same_loss(loss_type: str) -> None:
    case = Case()
    kept = case.targets != -100
    arguments = case.arguments(loss_type)
    padded = linear_preference_loss(case.hidden, case.weight, case.targets, loss_type=loss_type, **arguments)
    if "ref_logprobs" in arguments:
        arguments["ref_logprobs"] = (case.ref * case.mask).sum(1)
    flat = linear_preference_loss(
        case.hidden[kept],
        case.weight,
        case.targets[kept],
        loss_type=loss_type,
        sequence_ids=torch.arange(2 * PAIRS).unsqueeze(1).expand_as(kept)[kept],
        **arguments,
    )
    assert relative_error(flat.loss, padded.loss) < 1e-12
    for name, value in padded.metrics.items():
        torch.testing.assert_close(flat.metrics[name], value)


def test_micro_batches_with_global_counts_add_up() -> None:
    case = Case()
    for loss_type in ("dpo", "simpo", "orpo"):
        whole = linear_preference_loss(
            case.hidden, case.weight, case.targets, loss_type=loss_type, **case.arguments(loss_type)
        )
        total = torch.zeros((), dtype=torch.float64)
        for rows in ([0, PAIRS], [1, 2, PAIRS + 1, PAIRS + 2]):
            arguments = {"ref_logprobs": case.ref[rows]} if loss_type == "dpo" else {}
            total += linear_preference_loss(
                case.hidden[rows],
                case.weight,
                case.targets[rows],
                loss_type=loss_type,
                num_examples=PAIRS,
                num_tokens=case.mask[:PAIRS].sum(),
                **arguments,
            ).loss
        assert relative_error(total, whole.loss) < 1e-12


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_equals_trl(smoothing: float) -> None:
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer

    case = Case()
    means = case.logprobs(case.hidden).sum(1) / case.mask.sum(1)
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.6,
        beta=2.0,
        label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, means[:PAIRS], means[PAIRS:])
    output = linear_preference_loss(
        case.hidden,
        case.weight,
        case.targets,
        loss_type="simpo",
        beta=2.0,
        gamma=0.6,
        label_smoothing=smoothing,
    )
    assert relative_error(output.loss, losses.mean()) < 1e-12


def test_orpo_equals_trl() -> None:
    pytest.importorskip("trl")
    from trl.experimental.orpo import ORPOTrainer

    case = Case()
    logprobs = case.logprobs(case.hidden)
    means = logprobs.sum(1) / case.mask.sum(1)
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    losses = ORPOTrainer.odds_ratio_loss(trainer, means[:PAIRS], means[PAIRS:])[0]
    likelihood = logprobs[:PAIRS].sum() / case.mask[:PAIRS].sum()
    output = linear_preference_loss(case.hidden, case.weight, case.targets, loss_type="orpo", beta=0.3)
    # TRL computes this term in float32.
    assert relative_error(output.loss, -likelihood - losses.mean()) < 1e-6


def test_label_smoothing_of_dpo() -> None:
    case = Case()
    ratio = case.logprobs(case.hidden).sum(1) - (case.ref * case.mask).sum(1)
    margin = 0.1 * (ratio[:PAIRS] - ratio[PAIRS:])
    exact = -(0.9 * F.logsigmoid(margin) + 0.1 * F.logsigmoid(-margin)).mean()
    output = linear_preference_loss(
        case.hidden, case.weight, case.targets, loss_type="dpo", ref_logprobs=case.ref, label_smoothing=0.1
    )
    assert relative_error(output.loss, exact) < 1e-12


def test_orpo_is_finite_for_certain_sequences() -> None:
    """Mean log-probabilities of exactly 0, where the odds are infinite."""
    hidden = torch.full((2, 1, 4), 100.0, requires_grad=True)
    weight = torch.stack([torch.ones(4), -torch.ones(4)])
    output = linear_preference_loss(hidden, weight, torch.zeros(2, 1, dtype=torch.int64), loss_type="orpo")
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "ipo"}, "loss_type"),
        ({"ref_logprobs": None}, "ref_logprobs"),
        ({"ref_logprobs": torch.randn(3)}, "ref_logprobs"),
        ({"loss_type": "kto"}, "desirable"),
        ({"loss_type": "kto", "desirable": torch.ones(2 * PAIRS)}, "desirable"),
        (
            {"loss_type": "kto", "desirable": torch.ones(2 * PAIRS, dtype=torch.bool), "reference_kl": -1.0},
            "reference_kl",
        ),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"loss_type": "orpo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"num_examples": -1}, "num_examples"),
    ],
)
def test_wrong_values_are_named(change: dict, message: str) -> None:
    case = Case()
    arguments = {"loss_type": "dpo", "ref_logprobs": case.ref, **change}
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(case.hidden, case.weight, case.targets, **arguments)


def test_pairs_need_an_even_number_of_sequences() -> None:
    case = Case()
    with pytest.raises(ValueError, match="even"):
        linear_preference_loss(case.hidden[:3], case.weight, case.targets[:3], loss_type="simpo")
