"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): groups that teach nothing make room for other prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpo_fast.data import Example
from gpo_fast.rollout.types import Completion


def mixed_groups(rewards: np.ndarray) -> np.ndarray:
    """Which groups of rewards (groups, n) differ within themselves, bool (groups,)."""
    mixed: np.ndarray = rewards.max(axis=1) > rewards.min(axis=1)
    return mixed


@dataclass
class BaseRollouts:
    """Groups of completions, n of each prompt, group by group. A completion's `request_index` is its group."""

    examples: list[Example]
    completions: list[Completion]
    outcomes: np.ndarray  # (groups, n): rewards without any length's punishment
    rewards: np.ndarray  # (groups, n)
    sampled_rollouts: int  # here and below, those of groups that were given up included
    sampled_tokens: int
    rounds: int = 0

    def prompt(self, group: int) -> list[int]:
        width: int = self.rewards.shape[1]
        return self.completions[group * width].prompt_token_ids

    def is_mixed(self) -> np.ndarray:
        """Which groups have outcomes that differ, bool (groups,)."""
        return mixed_groups(self.outcomes)

    def put(self, group: int, other: BaseRollouts, source: int) -> None:
        """Replaces a group by one of `other`."""
        width = self.rewards.shape[1]
        new = other.completions[source * width : (source + 1) * width]
        self.completions[group * width : (group + 1) * width] = [replace(c, request_index=group) for c in new]
        self.examples[group] = other.examples[source]
        self.outcomes[group], self.rewards[group] = other.outcomes[source], other.rewards[source]


def resample(
    base: BaseRollouts,
    draw: Callable[[Sequence[Example], int], BaseRollouts],
    pool: Any,
    rng: np.random.Generator,
    max_rounds: int,
) -> None:
    """Replaces groups whose outcomes are all the same by mixed groups of other prompts.

    Args:
        draw: samples groups of the given examples in round 1, 2, ...
        pool: a data set of examples, from which each round takes as many as there are groups to be replaced.
        max_rounds: groups that are not mixed after so many rounds stay as they are.
    """
    for round_ in range(1, max_rounds + 1):
        empty = np.flatnonzero(~base.is_mixed())
        if not len(empty):
            return
        chosen = rng.choice(len(pool), size=min(len(empty), len(pool)), replace=False)
        found = draw([pool[int(i)] for i in chosen], round_)
        base.sampled_rollouts += found.sampled_rollouts
        base.sampled_tokens += found.sampled_tokens
        base.rounds = round_
        for group, source in zip(empty, np.flatnonzero(found.is_mixed())):
            base.put(int(group), found, int(source))
