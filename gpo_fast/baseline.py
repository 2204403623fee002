"""The baseline that leaves a group's gradient the least noise.

A group's gradient is sum_i (r_i - b) g_i with the rewards r and g_i the gradient of completion i's log-probability. The
baseline b does not change its mean. Its noise is least with (Greensmith, Bartlett, Baxter, JMLR 5, 2004; for lengths in
place of sizes OPO, arXiv 2505.23585)

    b = sum_i |g_i|^2 r_i / sum_i |g_i|^2

GRPO's mean is this for gradients of one size. They are not: a completion fails by a token that was unlikely, and an
unlikely token's gradient is large. So b lies below the mean: failures weigh little, and successes much. What weighs
next to nothing teaches next to nothing, and costs as much time in training as the rest: it is left out.

Where successes are the unlikely ones b would lie above the mean, and a rare success, which is what there is to learn,
would weigh little. There it is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Completions with a smaller share than this of their group's largest advantage are left out. Of two outcomes, b/(1 - b)
# is the smaller one's advantage over the larger one's and b its share of what the group teaches: at most a sixth.
MINOR = 0.2


def gradient_size(logprobs: Sequence[float], *, averaged: bool = False) -> float:
    """|g|^2 of a completion, from the log-probabilities of its tokens: the gradient with respect to the logits.

    Of a token with probability p it is (1 - p)^2 and the squares of the other tokens' probabilities, which add at most
    as much again and are not recorded: left out.

    Args:
        averaged: the loss takes the mean over the completion's tokens and not their sum.
    """
    size = float(np.square(1 - np.exp(np.asarray(logprobs, dtype=np.float64))).sum())
    return size / len(logprobs) ** 2 if averaged and len(logprobs) else size


def optimal_baseline(rewards: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The b of each group, shape (groups, 1), from rewards and `gradient_size`s of shape (groups, n); never above the
    group's mean, and the mean where no completion has a gradient."""
    weights = np.where(sizes.sum(axis=1, keepdims=True) > 0, sizes, 1.0)
    baseline = (weights * rewards).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    lower: np.ndarray = np.minimum(baseline, rewards.mean(axis=1, keepdims=True))
    return lower


def without_minor(advantages: np.ndarray) -> np.ndarray:
    """The advantages (groups, n) with 0 in place of those that teach next to nothing."""
    size = np.abs(advantages)
    kept: np.ndarray = np.where(size < MINOR * size.max(axis=1, keepdims=True), 0.0, advantages)
    return kept
