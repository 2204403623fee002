"""The critical step of a trajectory, by Monte Carlo advantage (arXiv 2509.16456, section 4).

V(s_i) is the mean outcome reward of continuations sampled from the state before step i; V(s_H) is the
trajectory's own reward; the advantage of step i is V(s_{i+1}) - V(s_i), so H steps need H values, never 2H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gpo_fast.rollout.types import Completion, Request, RolloutBackend, SamplingParams
from gpo_fast.steps import Step, StepSplitter

Criterion = Literal["max", "abs", "min"]
Reset = Literal["before", "after"]
OutcomeReward = Callable[[Sequence[Completion]], Sequence[float]]

_SCORES: dict[str, Callable[[float], float]] = {"max": lambda a: a, "abs": abs, "min": lambda a: -a}


@dataclass
class CriticalStep:
    """What the search found on one trajectory of H steps.

    `values[i]` is V(s_i) for i in 0..H (H + 1 of them), `advantages[i]` the advantage of step i (H of them).
    `token_position` is the cut of the reset, counted in completion tokens: completion[:token_position] is kept.
    `num_rollouts` and `num_tokens` are what this search sampled.
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


class CriticalStepFinder:
    """Finds critical steps with the paper's uniform Monte Carlo search: `n_samples` continuations from each state.

    All continuations of all states of all trajectories go to the engine as one batch.

    Args:
        engine: a rollout backend with the attribute `tokenizer`.
        reward_fn: outcome rewards of whole completions (`token_ids` from the end of the prompt on).
        splitter: cuts a trajectory into steps.
        n_samples: N, continuations per state. The paper's default is 4; accuracy is flat beyond 12.
        criterion: "max" (the paper's: largest gain), "min" (largest fall), "abs" (largest change).
        estimator: "uniform".
        reset: keep the tokens "before" the critical step (the step itself is sampled anew) or "after" it; the last
            step cannot be kept, and a trajectory of one step is always reset to its start.
        sampling: how continuations are drawn. `max_tokens` is the limit of the *whole* completion, so a
            continuation gets what its prefix left of it.
        seed: first seed of the search; every state of every trajectory has a stream of its own.
    """

    def __init__(
        self,
        engine: RolloutBackend,
        reward_fn: OutcomeReward,
        splitter: StepSplitter | None = None,
        *,
        n_samples: int = 4,
        criterion: Criterion = "max",
        estimator: Literal["uniform"] = "uniform",
        reset: Reset = "before",
        sampling: SamplingParams | None = None,
        seed: int = 0,
    ) -> None:
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        if criterion not in _SCORES:
            raise ValueError(f"criterion must be 'max', 'abs' or 'min', got {criterion!r}")
        if estimator != "uniform":
            raise ValueError(f"estimator must be 'uniform', got {estimator!r}")
        if reset not in ("before", "after"):
            raise ValueError(f"reset must be 'before' or 'after', got {reset!r}")
        self.engine = engine
        self.reward_fn = reward_fn
        self.splitter = splitter or StepSplitter()
        self.n_samples = n_samples
        self.criterion = criterion
        self.reset = reset
        self.sampling = sampling or SamplingParams()
        self.seed = seed

    def find(
        self,
        completions: Sequence[Completion],
        *,
        rewards: Sequence[float] | None = None,
        root_values: Sequence[Sequence[float] | None] | None = None,
    ) -> list[CriticalStep]:
        """One `CriticalStep` for each trajectory.

        Args:
            rewards: the trajectories' own rewards, V(s_H); computed by `reward_fn` if None.
            root_values: for each trajectory the rewards of other rollouts of the same prompt, if there are any:
                they are samples of V(s_0), which is then not sampled again.
        """
        tokenizer: Any = self.engine.tokenizer  # type: ignore[attr-defined]
        own = list(self.reward_fn(completions)) if rewards is None else [float(r) for r in rewards]
        roots = list(root_values) if root_values is not None else [None] * len(completions)
        if not len(own) == len(roots) == len(completions):
            raise ValueError(f"{len(completions)} completions, {len(own)} rewards, {len(roots)} root values")
        steps = [self.splitter.split(c.token_ids, tokenizer) for c in completions]

        # The comb: every state of every trajectory that has to be sampled, as one batch of requests.
        states = [
            (row, i) for row, row_steps in enumerate(steps) for i in range(len(row_steps)) if i > 0 or not roots[row]
        ]
        requests = [
            self._continuation_request(completions[row], steps[row][i].start, self.seed + n)
            for n, (row, i) in enumerate(states)
        ]
        sampled = self.engine.generate(requests) if requests else []
        whole = [self.whole(completions[states[c.request_index][0]], c) for c in sampled]
        outcomes = list(self.reward_fn(whole)) if whole else []

        by_row: list[list[tuple[Completion, float]]] = [[] for _ in completions]
        for drawn, outcome in zip(sampled, outcomes):
            by_row[states[drawn.request_index][0]].append((drawn, outcome))

        found = []
        for row, completion in enumerate(completions):
            branches: list[list[Completion]] = [[] for _ in steps[row]]
            branch_rewards: list[list[float]] = [[] for _ in steps[row]]
            tokens = 0
            for drawn, outcome in by_row[row]:
                i = states[drawn.request_index][1]
                branches[i].append(drawn)
                branch_rewards[i].append(float(outcome))
                tokens += len(drawn.token_ids)
            samples = [list(r) for r in branch_rewards]
            if roots[row]:
                samples[0] = [float(r) for r in roots[row] or ()]
            found.append(self._choose(completion, steps[row], own[row], samples, branches, branch_rewards, tokens))
        return found

    def _continuation_request(self, completion: Completion, cut: int, seed: int) -> Request:
        room = max(1, self.sampling.max_tokens - cut)
        tokens = [*completion.prompt_token_ids, *completion.token_ids[:cut]]
        return Request(tokens, n=self.n_samples, sampling=replace(self.sampling, max_tokens=room), seed=seed)

    @staticmethod
    def whole(trajectory: Completion, continuation: Completion) -> Completion:
        """The continuation as a completion of the trajectory's prompt, so that rewards see all of it."""
        cut = len(continuation.prompt_token_ids) - len(trajectory.prompt_token_ids)
        return replace(
            continuation,
            prompt_token_ids=trajectory.prompt_token_ids,
            token_ids=[*trajectory.token_ids[:cut], *continuation.token_ids],
            logprobs=[*trajectory.logprobs[:cut], *continuation.logprobs],
            sampling_logprobs=[*trajectory.sampling_logprobs[:cut], *continuation.sampling_logprobs],
        )

    def _choose(
        self,
        completion: Completion,
        steps: list[Step],
        reward: float,
        samples: list[list[float]],
        branches: list[list[Completion]],
        branch_rewards: list[list[float]],
        tokens: int,
    ) -> CriticalStep:
        values = [_mean(s) for s in samples] + [reward]
        advantages = [then - before for before, then in zip(values, values[1:])]
        # A reset needs an unfinished state: after the last step there is nothing left to sample.
        after = self.reset == "after" and len(steps) > 1
        candidates = range(len(steps) - after)
        index = max(candidates, key=lambda i: _SCORES[self.criterion](advantages[i]))
        return CriticalStep(
            index=index,
            token_position=steps[index].end if after else steps[index].start,
            reset_state=index + after,
            steps=steps,
            advantages=advantages,
            values=values,
            standard_errors=[_standard_error(s) for s in samples] + [0.0],
            reward=reward,
            num_rollouts=sum(len(b) for b in branches),
            num_tokens=tokens,
            continuations=branches,
            continuation_rewards=branch_rewards,
        )


def _mean(samples: Sequence[float]) -> float:
    return sum(samples) / len(samples)


def _standard_error(samples: Sequence[float]) -> float:
    """Standard error of the mean; NaN for a single sample, which says nothing about its spread."""
    count = len(samples)
    if count < 2:
        return math.nan
    mean = _mean(samples)
    return math.sqrt(sum((s - mean) ** 2 for s in samples) / (count - 1) / count)
