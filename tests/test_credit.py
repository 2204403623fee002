"""Credit within a failing trajectory: which tokens are blamed, and that this points along the true gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from test_trainer import PROMPTS, config, share_of_ones

from gpo_fast import GPOTrainer, TokenForest
from gpo_fast.credit import SURE, blame_mistakes
from gpo_fast.critical.proposals import FirstMistake
from gpo_fast.experience import TrainingRow
from gpo_fast.steps import Step

PROMPT = [7, 8, 9]


def in_twos(token_ids) -> list[Step]:
    return [Step(start, min(start + 2, len(token_ids))) for start in range(0, len(token_ids), 2)]


def row_of(forest: TokenForest, root: int, logprobs: list[float], advantage: float) -> TrainingRow:
    tokens = list(range(10, 10 + len(logprobs)))
    node = forest.branch(root, len(PROMPT), tokens, logprobs=logprobs)
    return TrainingRow(PROMPT, tokens, list(logprobs), advantage, "base", node)


def test_the_blame_goes_to_the_likely_first_mistake() -> None:
    forest = TokenForest()
    root = forest.add_prompt(PROMPT)
    logprobs = [-0.01, -0.02, -3.0, -0.1, -0.02, -0.01, -4.0, -1.0]
    failing = row_of(forest, root, logprobs, -0.8)
    blame_mistakes([failing], forest, FirstMistake(), in_twos)
    share = FirstMistake().probabilities(np.array([0.02, 3.0, 0.02, 4.0]))
    assert share[:2].sum() >= SURE * share.sum() > share[0]
    assert failing.token_ids == [10, 11, 12, 13]
    assert failing.sampling_logprobs == logprobs[:4]
    expected = np.repeat(-0.8 * share[:2] / share[:2].sum(), 2)
    np.testing.assert_allclose(failing.advantage_of_tokens, expected)
    assert forest.path(failing.node) == [*PROMPT, 10, 11, 12, 13]


def test_what_is_not_worse_than_its_group_stays_as_it_is() -> None:
    forest = TokenForest()
    root = forest.add_prompt(PROMPT)
    rows = [row_of(forest, root, [-2.0, -0.1, -0.1], advantage) for advantage in (1.2, 0.0)]
    certain = row_of(forest, root, [0.0] * 6, -1.0)  # no token could have been another one
    outside = TrainingRow(PROMPT, [1, 2], [-1.0, -2.0], -1.0, "reset")
    before = [(list(r.token_ids), r.node) for r in (*rows, certain, outside)]
    blame_mistakes([*rows, certain, outside], forest, FirstMistake(), in_twos)
    assert [(r.token_ids, r.node) for r in (*rows, certain, outside)] == before
    assert all(r.token_advantages is None for r in (*rows, certain, outside))


def test_where_surprises_say_little_the_blame_is_spread() -> None:
    forest = TokenForest()
    root = forest.add_prompt(PROMPT)
    vague = FirstMistake()
    vague.kappa = 1e-4  # a policy that may choose its words
    row = row_of(forest, root, [-1.0] * 20, -1.0)
    blame_mistakes([row], forest, vague, in_twos)
    assert len(row.token_ids) == 18
    np.testing.assert_allclose(row.token_advantages, -1 / 9, rtol=2e-3)


@pytest.mark.parametrize("rate", [0.3, 0.05])
def test_blame_points_along_the_true_gradient_with_less_noise(rate: float) -> None:
    """A chain of 8 steps, each right with a probability of its own, where a wrong one dooms the chain.

    A wrong step is as surprising as it is unlikely. Gradients are those of the steps' logits.
    """
    rng = np.random.default_rng(0)
    right = np.linspace(0.5, 1.5, 8)
    right = rate ** (right / right.sum())  # of each step; their product is the rate
    truth = rate * (1 - right)
    plain, blamed = [], []
    for _ in range(4000):
        outcomes = rng.random((8, 8)) < right  # rollouts, steps
        rewards = outcomes.all(axis=1).astype(float)
        if rewards.std() == 0:
            continue
        advantages = (rewards - rewards.mean()) / rewards.std(ddof=1)
        scores = outcomes - right
        plain.append(advantages @ scores)
        total = np.zeros(8)
        forest = TokenForest()
        root = forest.add_prompt(PROMPT)
        for happened, advantage, score in zip(outcomes, advantages, scores):
            row = row_of(forest, root, np.log(np.where(happened, right, 1 - right)).tolist(), float(advantage))
            mistakes = FirstMistake()
            blame_mistakes([row], forest, mistakes, lambda ids: [Step(i, i + 1) for i in range(len(ids))])
            own = row.advantage_of_tokens
            total[: len(own)] += np.array(own) * score[: len(own)]
        blamed.append(total)

    def cosine_and_quality(gradients: list[np.ndarray]) -> tuple[float, float]:
        all_of_them = np.array(gradients)
        mean, noise = all_of_them.mean(axis=0), all_of_them.var(axis=0).sum()
        cosine = float(truth @ mean / np.linalg.norm(truth) / np.linalg.norm(mean))
        return cosine, float((truth @ mean) ** 2 / noise)

    cosine, quality = cosine_and_quality(blamed)
    assert cosine > 0.97
    assert quality > 1.5 * cosine_and_quality(plain)[1]


def test_a_trainer_learns_from_what_is_blamed(tmp_path: Path) -> None:
    rows = {}
    for credit in ("trajectory", "mistake"):
        trainer = GPOTrainer(
            tiny.model(),
            share_of_ones,
            args=config(tmp_path / credit, credit=credit, max_steps=1, min_step_tokens=2, step_splitter="tokens"),
            train_dataset=PROMPTS,
            processing_class=tiny.tokenizer(),
        )
        trainer.engine.update_weights()
        rows[credit] = trainer.sampler.collect(PROMPTS, seed=3).rows
        trainer.train()
    pairs = list(zip(rows["trajectory"], rows["mistake"]))
    assert [a.advantage for a, _ in pairs] == [b.advantage for _, b in pairs]
    for plain, blamed in pairs:
        assert plain.token_ids[: len(blamed.token_ids)] == blamed.token_ids
        assert (blamed.token_advantages is None) == (plain.advantage >= 0)
    blamed_pairs = [(plain, blamed) for plain, blamed in pairs if blamed.token_advantages]
    assert len(blamed_pairs) >= 2
    for plain, blamed in blamed_pairs:
        steps = trainer.sampler.splitter.split(plain.token_ids, trainer.engine.tokenizer)
        shares = [blamed.advantage_of_tokens[step.start] for step in steps if step.start < len(blamed.token_ids)]
        assert sum(shares) == pytest.approx(plain.advantage)
