"""CriticalStep: what a search found on one trajectory, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gpo_fast.data import decode_completion
from gpo_fast.rollout.types import Completion
from gpo_fast.steps import Step

Criterion = Literal["max", "abs", "min"]
Reset = Literal["before", "after"]
Estimator = Literal["uniform", "posterior", "racing", "bisect", "random", "proposal"]
Reuse = Literal["none", "split", "all"]

SCORES: dict[str, Callable[[Any], Any]] = {"max": lambda a: a, "abs": abs, "min": lambda a: -a}


@dataclass
class CriticalStep:
    """What the search found on one trajectory of H steps.

    `values[i]` is V(s_i) for i in 0..H (H + 1 of them) and `advantages[i]` the advantage of step i (H of them):
    means of continuations with their standard errors for "uniform" and "bisect" (NaN where a state was not
    sampled), posterior means with their posterior standard deviations for "racing" and "posterior".
    `token_position` is the cut of the reset, counted in completion tokens: completion[:token_position] is kept.
    `confidence` is the posterior probability (`value_model`) that no other step has a better advantage; NaN
    where the estimator takes no samples.
    `num_rollouts` and `num_tokens` are what this search sampled, cancelled continuations included; the `saved`
    ones what a uniform search with the same N would have sampled beyond that (tokens are an estimate, from the
    mean length of the continuations of each state or, where there are none, of what the trajectory had left).
    """

    index: int
    token_position: int
    steps: list[Step]
    advantages: list[float]
    values: list[float]
    standard_errors: list[float]
    reward: float
    num_rollouts: int
    num_tokens: int
    reset_state: int = 0  # index of the state that the reset returns to
    continuations: list[list[Completion]] = field(default_factory=list)  # per state, as drawn from it
    continuation_rewards: list[list[float]] = field(default_factory=list)
    estimator: Estimator = "uniform"
    criterion: Criterion = "max"
    confidence: float = math.nan
    rollouts_saved: int = 0
    tokens_saved: float = 0.0
    num_rounds: int = 1
    num_cancelled: int = 0
    reusable: list[Completion] = field(default_factory=list)  # of the reset state, for training
    reusable_rewards: list[float] = field(default_factory=list)

    def record(self, trajectory: Completion, tokenizer: Any) -> dict[str, Any]:
        """The search as the report, the terminal's table and JSON show it; what is not known is None."""
        at = self.reset_state
        drawn = zip(self.continuations[at], self.continuation_rewards[at]) if self.continuations else ()
        return {
            "prompt": decode_completion(trajectory.prompt_token_ids, tokenizer),
            "reward": self.reward,
            "critical": self.index,
            "token_position": self.token_position,
            "estimator": self.estimator,
            "criterion": self.criterion,
            "reset": "after" if self.reset_state > self.index else "before",
            "confidence": _known(self.confidence),
            "num_rollouts": self.num_rollouts,
            "num_tokens": self.num_tokens,
            "rollouts_saved": self.rollouts_saved,
            "tokens_saved": round(self.tokens_saved),
            "steps": [
                {
                    "text": decode_completion(trajectory.token_ids[step.start : step.end], tokenizer),
                    "num_tokens": step.end - step.start,
                    "value": _known(self.values[i]),
                    "standard_error": _known(self.standard_errors[i]),
                    "advantage": _known(self.advantages[i]),
                    "num_samples": len(self.continuation_rewards[i]) if self.continuation_rewards else 0,
                }
                for i, step in enumerate(self.steps)
            ],
            "branches": [branch_record(completion, reward, "search", tokenizer) for completion, reward in drawn],
        }


def branch_record(completion: Completion, reward: float, kind: str, tokenizer: Any) -> dict[str, Any]:
    """A rollout from the reset state as the report shows it; `kind` is "search" or "reset"."""
    return {"text": decode_completion(completion.token_ids, tokenizer), "reward": reward, "kind": kind}


def mean(samples: Sequence[float]) -> float:
    """NaN without samples."""
    return sum(samples) / len(samples) if samples else math.nan


def standard_error(samples: Sequence[float]) -> float:
    """Standard error of the mean; NaN for a single sample, which says nothing about its spread."""
    count = len(samples)
    if count < 2:
        return math.nan
    centre = mean(samples)
    return math.sqrt(sum((s - centre) ** 2 for s in samples) / (count - 1) / count)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
