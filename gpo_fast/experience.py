"""What one iteration sampled, as rows to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gpo_fast.forest import TokenForest


@dataclass
class TrainingRow:
    """Tokens to learn from: `token_ids` were sampled after `context_ids` (prompt and, after a reset, the prefix).

    `node` is the experience's forest node whose own tokens they are; None: it is in no forest.
    """

    context_ids: list[int]
    token_ids: list[int]
    sampling_logprobs: list[float]
    advantage: float
    kind: Literal["base", "reset", "search"]
    node: int | None = None
    reward: float = 0.0
    old_logprobs: list[float] | None = None  # of the policy that sampled; None: it is the one that is trained
    truncated: bool = False  # it reached the longest length without an end
    token_advantages: list[float] | None = None  # a critic's, one for each token, in place of `advantage`
    values: list[float] | None = None  # the value head's, of the state before each token, as it was sampled
    priority: float = 0.0  # how gladly it is replayed: the advantage of the critical step that it starts from
    pair: int | None = None  # the preference pair that it belongs to
    desirable: bool = False  # the better one of its pair

    @property
    def advantage_of_tokens(self) -> list[float]:
        """One for each token."""
        return self.token_advantages or [self.advantage] * len(self.token_ids)

    @property
    def old_logprobs_of_tokens(self) -> list[float]:
        """Log-probabilities of the tokens under the policy that sampled them: the sampler's where none are given."""
        return self.sampling_logprobs if self.old_logprobs is None else self.old_logprobs

    @property
    def has_advantage(self) -> bool:
        """Whether any token's advantage is not 0."""
        return any(self.advantage_of_tokens)


@dataclass
class Experience:
    """What one iteration sampled."""

    rows: list[TrainingRow]
    metrics: dict[str, float]
    trajectories: list[dict[str, Any]] = field(default_factory=list)  # searched ones, for the report
    forest: TokenForest = field(default_factory=TokenForest)


def inseparable(rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
    """The rows in order, those of one preference pair together: what no batch may tear apart."""
    units: dict[int, list[TrainingRow]] = {}
    for place, row in enumerate(rows):
        units.setdefault(-1 - place if row.pair is None else row.pair, []).append(row)
    return list(units.values())
