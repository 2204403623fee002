"""The baseline that leaves a group's gradient the least noise: that it does, and that a trainer uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_trainer import PROMPTS, config, share_of_ones

from gpo_fast import GPOTrainer
from gpo_fast.baseline import MINOR, gradient_size, optimal_baseline, without_minor
from gpo_fast.config import AVERAGED_LOSSES


def test_the_size_is_that_of_the_gradient_with_respect_to_the_logits_up_to_a_factor_of_two() -> None:
    logits = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = torch.tensor([0, 3, 8, 2, 2, 5])
    logprobs = logits.log_softmax(-1)[torch.arange(6), tokens]
    for scale, averaged in ((1.0, False), (1 / 6, True)):
        (gradient,) = torch.autograd.grad(scale * logprobs.sum(), logits, retain_graph=True)
        size = gradient_size(logprobs.tolist(), averaged=averaged)
        assert size <= float(gradient.square().sum()) <= 2 * size
    assert gradient_size([0.0, 0.0]) == gradient_size([]) == gradient_size([], averaged=True) == 0


def test_no_other_baseline_leaves_less_noise() -> None:
    """Of sum_i (r_i - b) g_i the noise is sum_i (r_i - b)^2 |g_i|^2 where the g_i are independent of one another."""
    rng = np.random.default_rng(0)
    rewards, sizes = rng.normal(size=(5, 8)), rng.exponential(size=(5, 8))
    sizes *= np.where(rewards > rewards.mean(axis=1, keepdims=True), 0.2, 1.0)  # what fails is unlikely
    best = optimal_baseline(rewards, sizes)
    noise = lambda b: ((rewards - b) ** 2 * sizes).sum(axis=1)  # noqa: E731
    for other in (best + 0.01, best - 0.01, rewards.mean(axis=1, keepdims=True)):
        assert (noise(best) < noise(other)).all()
    np.testing.assert_allclose(optimal_baseline(rewards, np.ones((5, 8)))[:, 0], rewards.mean(axis=1))
    np.testing.assert_allclose(optimal_baseline(rewards, np.zeros((5, 8)))[:, 0], rewards.mean(axis=1))
    surprising = np.where(rewards > rewards.mean(axis=1, keepdims=True), 5.0, 1.0)  # successes are
    np.testing.assert_allclose(optimal_baseline(rewards, surprising)[:, 0], rewards.mean(axis=1))


def test_what_teaches_next_to_nothing_is_left_out() -> None:
    advantages = np.array([[1.0, -MINOR - 0.01, -MINOR + 0.01], [0.0, 0.0, 0.0], [-1.0, 0.1, 0.5]])
    expected = [[1.0, -MINOR - 0.01, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.5]]
    np.testing.assert_array_equal(without_minor(advantages), expected)


@pytest.mark.parametrize("rate", [0.7, 0.3, 0.05])
def test_an_update_points_along_the_true_gradient_with_less_noise(rate: float) -> None:
    """A chain of 8 steps, each right with a probability of its own, where a wrong one dooms the chain.

    Gradients are those of the steps' logits.
    """
    rng = np.random.default_rng(0)
    right = np.linspace(0.5, 1.5, 8)
    right = rate ** (right / right.sum())  # of each step; their product is the rate
    truth = rate * (1 - right)
    plain, optimal = [], []
    for _ in range(4000):
        outcomes = rng.random((8, 8)) < right  # rollouts, steps
        rewards = outcomes.all(axis=1).astype(float)
        logprobs = np.log(np.where(outcomes, right, 1 - right))
        sizes = np.array([gradient_size(rollout) for rollout in logprobs])
        plain.append((rewards - rewards.mean()) @ (outcomes - right))
        centred = rewards[None] - optimal_baseline(rewards[None], sizes[None])
        optimal.append(without_minor(centred)[0] @ (outcomes - right))

    def cosine_and_quality(gradients: list[np.ndarray]) -> tuple[float, float]:
        all_of_them = np.array(gradients)
        mean, noise = all_of_them.mean(axis=0), all_of_them.var(axis=0).sum()
        cosine = float(truth @ mean / np.linalg.norm(truth) / np.linalg.norm(mean))
        return cosine, float((truth @ mean) ** 2 / noise)

    cosine, quality = cosine_and_quality(optimal)
    assert cosine > 0.95
    assert quality > 1.1 * cosine_and_quality(plain)[1]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_trainer_compares_with_it(tmp_path: Path, loss_type: str) -> None:
    found = {}
    for baseline in ("mean", "optimal"):
        trainer = GPOTrainer(
            tiny.model(),
            share_of_ones,
            args=config(
                tmp_path / baseline,
                baseline=baseline,
                loss_type=loss_type,
                max_steps=1,
                min_step_tokens=2,
                step_splitter="tokens",
            ),
            train_dataset=PROMPTS,
            processing_class=tiny.tokenizer(),
        )
        trainer.engine.update_weights()
        found[baseline] = trainer.sampler.collect(PROMPTS, seed=3).rows
    n, groups = trainer.args.num_generations, 0
    assert [row.token_ids for row in found["mean"]] == [row.token_ids for row in found["optimal"]]
    base = [(m, o) for m, o in zip(found["mean"], found["optimal"]) if m.kind == "base"]
    for first in range(0, len(base), n):
        group = base[first : first + n]
        rewards = np.array([[o.reward for _, o in group]])
        sizes = [gradient_size(o.sampling_logprobs, averaged=loss_type in AVERAGED_LOSSES) for _, o in group]
        b = min(np.average(rewards[0], weights=sizes), rewards.mean())
        expected = without_minor((rewards - b) / (rewards.std(ddof=1) + 1e-4))[0]
        assert [o.advantage for _, o in group] == pytest.approx(expected.tolist(), abs=1e-9)
        groups += [m.advantage for m, _ in group] != pytest.approx(expected.tolist(), abs=1e-3)
    assert groups >= 2
    assert any(o.kind == "reset" and o.advantage != m.advantage for m, o in zip(found["mean"], found["optimal"]))
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
