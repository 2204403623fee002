"""Accuracy with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Accuracy(NamedTuple):
    """A share of successes with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    n: int


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> Accuracy:
    """Share of successes with Wilson's score interval (Wilson 1927), which stays honest near 0 and 1.

    Raises:
        ValueError: n below 1, or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"an interval needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Accuracy(share, max(0.0, centre - half), min(1.0, centre + half), n)


def accuracy_of(rewards: Sequence[float]) -> Accuracy:
    """Accuracy of outcome rewards: a reward of 1 is a success."""
    return wilson_interval(sum(r >= 1 for r in rewards), len(rewards))


def pass_at_k(successes: int, n: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from `successes` of n (arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k is not within 1 and n, or successes not within 0 and n.
    """
    if not 1 <= k <= n or not 0 <= successes <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= successes <= n, got k={k}, {successes} of {n}")
    return 1.0 - math.comb(n - successes, k) / math.comb(n, k)


def pass_at_k_of(rewards: Sequence[Sequence[float]], k: int, *, resamples: int = 2000, seed: int = 0) -> Accuracy:
    """pass@k over problems, each with its samples' rewards, with a 95 % interval.

    Samples of one problem depend on one another, so the interval is a bootstrap over problems; with one sample for
    each problem it is Wilson's. If all problems agree (all right or all wrong), the bootstrap would have no width:
    then it is Wilson's over problems as well.
    """
    if not rewards:
        raise ValueError("pass@k needs at least one problem")
    shares = np.array([pass_at_k(sum(r >= 1 for r in row), len(row), k) for row in rewards])
    if all(len(row) == 1 for row in rewards) or shares.min() == shares.max():
        return wilson_interval(float(shares.sum()), len(shares))
    draws = np.random.default_rng(seed).integers(len(shares), size=(resamples, len(shares)))
    low, high = np.quantile(shares[draws].mean(axis=1), [0.025, 0.975])
    return Accuracy(float(shares.mean()), float(low), float(high), len(shares))


class Gain(NamedTuple):
    """A difference of two accuracies on the same problems, with its 95 % interval."""

    gain: float
    low: float
    high: float


def gain_of(before: Sequence[float], after: Sequence[float], z: float = 1.959964) -> Gain:
    """The gain in accuracy from rewards of the same problems, by the paired differences' normal interval.

    Raises:
        ValueError: fewer than two problems, or lists of different lengths.
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"a gain needs two lists of equal length, 2 at least, got {len(before)} and {len(after)}")
    differences = [(b >= 1) - (a >= 1) for a, b in zip(before, after)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    half = z * math.sqrt(variance / len(differences))
    return Gain(mean, mean - half, mean + half)
