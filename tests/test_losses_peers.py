"""Every loss that TRL or Liger-Kernel defines the same way equals their own code's result, and so does its gradient."""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from test_losses_policy import BATCH, LENGTH, MAX_LENGTH, WIDTH, Case
from torch import Tensor

from gpo_fast.losses import linear_policy_loss, linear_preference_loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


def ours(case: Case, loss_type: str, dtype: torch.dtype = torch.float64, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of hidden and weight; KL weight 0.05, clip 0.2 and 0.3 (a ratio of 1.3 for CISPO too)."""
    hidden = case.hidden.to(dtype, copy=True).requires_grad_()
    weight = case.weight.to(dtype, copy=True).requires_grad_()
    if loss_type != "rloo":
        options = {"ref_logprobs": case.ref, "beta": 0.05, **options}
    output = linear_policy_loss(
        hidden,
        weight,
        case.targets,
        loss_type=loss_type,
        advantages=case.advantages.to(dtype),
        old_logprobs=case.old,
        epsilon_high=0.3,
        max_completion_length=MAX_LENGTH,
        **options,
    )
    output.loss.backward()
    return output.loss, hidden.grad, weight.grad


def trl_loss(trainer_class: type, case: Case, hidden: Tensor, weight: Tensor, **attributes) -> Tensor:
    """The trainer's `_compute_loss` on the log-probabilities of the case; accumulation and processes are one."""
    logprobs, entropies = case.logprobs(hidden, weight)
    single = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda value: value, reduce=lambda value, reduction: value,
        gather_for_metrics=lambda value: value,
    )  # fmt: skip
    trainer = SimpleNamespace(
        beta=0.05, epsilon_low=0.2, epsilon_high=0.3, importance_sampling_level="token", top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, vllm_importance_sampling_correction=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True), accelerator=single,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _metrics=defaultdict(lambda: defaultdict(list)), use_adaptive_entropy=False,
        _get_per_token_logps_and_entropies=lambda *arguments, **options: (logprobs, entropies, None),
    )  # fmt: skip
    for name, value in attributes.items():
        setattr(trainer, name, value)
    inputs = {
        "prompt_ids": torch.zeros(BATCH, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(BATCH, 1, dtype=torch.int64),
        "completion_ids": case.targets.clamp(min=0),
        "completion_mask": case.mask.long(),
        "advantages": case.advantages,
        "old_per_token_logps": case.old,
        "old_logps": (case.old * case.mask).sum(1),
        "ref_per_token_logps": case.ref,
        "num_items_in_batch": case.mask.sum(),
    }
    return trainer_class._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo"])
def test_policy_losses_equal_trl(loss_type: str) -> None:
    pytest.importorskip("trl")
    from trl import GRPOTrainer, RLOOTrainer

    case = Case()
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    attributes = {"loss_type": loss_type}
    if loss_type == "gspo":
        attributes = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    if loss_type == "cispo":
        attributes["epsilon_high"] = 1.3  # TRL's is the ratio itself, ours its distance from 1
    trainer_class = RLOOTrainer if loss_type == "rloo" else GRPOTrainer
    loss = trl_loss(trainer_class, case, hidden, weight, **attributes)
    loss.backward()
    for value, exact in zip(ours(case, loss_type), (loss, hidden.grad, weight.grad)):
        assert relative_error(value, exact) < 1e-12


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_policy_losses_equal_liger(loss_type: str) -> None:
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    case = Case(torch.float32)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss_function = chunked_loss.LigerFusedLinearGRPOLoss(
        beta=0.05,
        compiled=False,
        epsilon_low=0.2,
        epsilon_high=1.3 if loss_type == "cispo" else 0.3,
        loss_type="grpo" if loss_type == "gspo" else loss_type,
        importance_sampling_level="sequence" if loss_type == "gspo" else "token",
        max_completion_length=MAX_LENGTH,
    )
    loss, _ = loss_function(
        hidden,
        weight,
        case.targets.clamp(min=0),
        case.mask.float(),
        case.advantages.float(),
        ref_per_token_logps=case.ref.float(),
        old_per_token_logps=case.old.float(),
    )
    loss.backward()
    for value, exact in zip(ours(case, loss_type, torch.float32), (loss, hidden.grad, weight.grad)):
        assert relative_error(value, exact) < 1e-5


class Pairs:
    """BATCH sequences, the first half chosen, with a reference model of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.case = Case(dtype)
        self.ref_hidden = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype)
        self.ref, _ = self.case.logprobs(self.ref_hidden, self.case.weight)

    def ours(self, loss_type: str, **options) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = self.case.hidden.clone().requires_grad_(), self.case.weight.clone().requires_grad_()
        output = linear_preference_loss(hidden, weight, self.case.targets, loss_type=loss_type, **options)
        output.loss.backward()
        return output.loss, hidden.grad, weight.grad


@pytest.mark.parametrize("loss_type", ["dpo", "kto", "simpo", "orpo"])
def test_preference_losses_equal_liger(loss_type: str) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    pairs = Pairs(torch.float32)
    hidden, weight = pairs.case.hidden.clone().requires_grad_(), pairs.case.weight.clone().requires_grad_()
    targets, reference = pairs.case.targets, {"ref_input": pairs.ref_hidden, "ref_weight": pairs.case.weight}
    if loss_type == "dpo":
        loss, _ = liger.LigerFusedLinearDPOLoss(beta=0.3, compiled=False)(weight, hidden, targets, **reference)
        results = pairs.ours("dpo", beta=0.3, ref_logprobs=pairs.ref)
    elif loss_type == "kto":
        desirable = torch.tensor([True, False, False, True])
        loss, _ = liger.LigerFusedLinearKTOLoss(beta=0.3, compiled=False, use_ref_model=True)(
            hidden, weight, targets, preference_labels=desirable, kl=torch.tensor(0.7), **reference
        )
        results = pairs.ours("kto", beta=0.3, ref_logprobs=pairs.ref, desirable=desirable, reference_kl=0.7)
    elif loss_type == "simpo":
        loss, _ = liger.LigerFusedLinearSimPOLoss(
            beta=2.0, gamma=0.4, label_smoothing=0.1, compute_nll_loss=False, compiled=False
        )(weight, hidden, targets)
        results = pairs.ours("simpo", beta=2.0, gamma=0.4, label_smoothing=0.1)
    else:
        loss, _ = liger.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)(weight, hidden, targets, nll_target=targets)
        results = pairs.ours("orpo", beta=0.3)
    loss.backward()
    for value, exact in zip(results, (loss, hidden.grad, weight.grad)):
        assert relative_error(value, exact) < 1e-5


def trl_preference_loss(trainer_class: type, pairs: Pairs, hidden: Tensor, weight: Tensor, inputs: dict, **attributes):
    """The trainer's `_compute_loss`, whose model is one that gives the log-probabilities of the case."""
    case = pairs.case
    logprobs, entropy = case.logprobs(hidden, weight)
    for_metrics = {"mean_logits": torch.zeros_like(logprobs), "is_top1": torch.zeros_like(case.mask)}
    outputs = SimpleNamespace(log_probs=logprobs, entropy=entropy, **for_metrics)
    single = SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value)
    trainer = SimpleNamespace(
        beta=0.3, precompute_ref_logps=True, aux_loss_enabled=False, model=SimpleNamespace(training=True),
        accelerator=single, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        **attributes,
    )  # fmt: skip
    # A prompt of one token: the first one has no log-probability.
    prompt = torch.zeros(BATCH, 1, dtype=torch.int64)
    inputs = {
        "input_ids": torch.cat([prompt, case.targets.clamp(min=0)], 1),
        "attention_mask": torch.cat([prompt + 1, case.mask.long()], 1),
        "completion_mask": torch.cat([prompt, case.mask.long()], 1),
        **inputs,
    }
    return trainer_class._compute_loss(trainer, lambda **options: outputs, inputs, return_outputs=False)


def test_dpo_equals_trl() -> None:
    pytest.importorskip("trl")
    from trl import DPOTrainer

    pairs = Pairs(torch.float64)
    hidden, weight = pairs.case.hidden.clone().requires_grad_(), pairs.case.weight.clone().requires_grad_()
    chosen, rejected = pairs.ref.sum(1).chunk(2)
    loss = trl_preference_loss(
        DPOTrainer, pairs, hidden, weight, {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected},
        loss_types=["sigmoid"], loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False,
    )  # fmt: skip
    loss.backward()
    for value, exact in zip(pairs.ours("dpo", beta=0.3, ref_logprobs=pairs.ref), (loss, hidden.grad, weight.grad)):
        assert relative_error(value, exact) < 1e-12


@pytest.mark.parametrize("estimate", [0.7, -0.7])
def test_kto_equals_trl(estimate: float) -> None:
    """TRL's baseline is the mean log-ratio of other completions, but at least 0; ours is an argument."""
    pytest.importorskip("trl")
    from trl import KTOTrainer

    pairs = Pairs(torch.float64)
    hidden, weight = pairs.case.hidden.clone().requires_grad_(), pairs.case.weight.clone().requires_grad_()
    desirable = torch.tensor([True, False, False, True])
    others, ref_of_others = torch.randn(2, BATCH, dtype=torch.float64)
    others += estimate - (others - ref_of_others).mean()
    loss = trl_preference_loss(
        KTOTrainer, pairs, hidden, weight,
        {"label": desirable, "ref_logps": pairs.ref.sum(1), "ref_KL_logps": ref_of_others},
        loss_type="kto", calculate_KL=True, desirable_weight=1.3, undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: others,
    )  # fmt: skip
    loss.backward()
    results = pairs.ours(
        "kto", beta=0.3, ref_logprobs=pairs.ref, desirable=desirable, reference_kl=max(estimate, 0.0),
        desirable_weight=1.3, undesirable_weight=0.8,
    )  # fmt: skip
    for value, exact in zip(results, (loss, hidden.grad, weight.grad)):
        assert relative_error(value, exact) < 1e-12
