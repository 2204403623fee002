"""Replay of critical-step rollouts: states are drawn again in proportion to the advantage of their critical step.

GPO's theory (arXiv 2509.16456) samples reset states in proportion to the advantage. Here the rollouts from the
critical steps of earlier iterations are trained on again, drawn so, with the log-probabilities under which they were
sampled: the ratio of the loss corrects for the policy's having moved, and its clip drops what has moved too far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from gpo_fast.experience import TrainingRow
from gpo_fast.forest import TokenForest


class ReplayBuffer:
    """The newest `size` rollouts from critical steps that something can be learned from."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a replay buffer holds at least 1 row, got {size}")
        self.rows: deque[TrainingRow] = deque(maxlen=size)

    def add(self, rows: Sequence[TrainingRow]) -> None:
        """Keeps the rows that start at a critical step with a positive priority and have an advantage."""
        for row in rows:
            if row.kind != "base" and row.priority > 0 and row.has_advantage:
                # Its forest is not kept.
                self.rows.append(replace(row, node=None, old_logprobs=row.old_logprobs_of_tokens))

    def sample(self, count: int, rng: np.random.Generator) -> list[TrainingRow]:
        """At most `count` different rows, drawn in proportion to their priorities."""
        count = min(count, len(self.rows))
        if count == 0:
            return []
        priorities = np.array([row.priority for row in self.rows])
        places = rng.choice(len(self.rows), size=count, replace=False, p=priorities / priorities.sum())
        return [self.rows[place] for place in places]

    def state(self) -> list[dict[str, Any]]:
        """All that `load` needs, and JSON can hold it."""
        return [asdict(row) for row in self.rows]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """The rows of a `state`; the newest ones, if it has more than the buffer holds."""
        self.rows.clear()
        self.rows.extend(TrainingRow(**row) for row in state)


def plant(rows: Sequence[TrainingRow], forest: TokenForest) -> list[TrainingRow]:
    """The rows as branches of a forest, where rows with one context share it."""
    roots: dict[tuple[int, ...], int] = {}
    planted = []
    for row in rows:
        context = tuple(row.context_ids)
        if context not in roots:
            roots[context] = forest.add_prompt(context)
        node = forest.branch(roots[context], len(context), row.token_ids, logprobs=row.sampling_logprobs)
        planted.append(replace(row, node=node))
    return planted
