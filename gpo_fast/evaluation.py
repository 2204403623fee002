"""Accuracy with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


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
