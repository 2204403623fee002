"""Procedure I of GPO (arXiv 2509.16456): sample, find critical steps, reset there and sample again, score.

What comes out is ordinary experience for an unchanged policy-gradient algorithm. Rollouts from a critical step
form a group of their own: they share the state s_m, so their mean reward is the baseline of that state.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from gpo_fast.config import GPOConfig
from gpo_fast.critical import CriticalStep, CriticalStepFinder, OutcomeReward
from gpo_fast.critical.step import branch_record
from gpo_fast.data import Example, columns_of, decode_completion, encode_prompt, is_conversation
from gpo_fast.forest import TokenForest
from gpo_fast.rewards import RewardFunctions
from gpo_fast.rollout.types import Completion, Request

PhaseCallback = Callable[[str], None]


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


@dataclass
class Experience:
    """What one iteration sampled."""

    rows: list[TrainingRow]
    metrics: dict[str, float]
    trajectories: list[dict[str, Any]] = field(default_factory=list)  # searched ones, for the report
    forest: TokenForest = field(default_factory=TokenForest)


@dataclass
class _Searched:
    """A trajectory chosen for the search: its example, its place in the base rollouts, and what was found."""

    example: int
    completion: Completion
    reward: float
    node: int
    critical: CriticalStep | None = None
    resets: list[Completion] = field(default_factory=list)
    reset_rewards: list[float] = field(default_factory=list)


class PhaseTimer:
    """Wall-clock seconds by phase."""

    def __init__(self, on_phase: PhaseCallback | None = None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._on_phase = on_phase
        self._inner = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._on_phase is not None:
            self._on_phase(phase)
        start, outer_inner = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] += spent - self._inner  # a phase within a phase is counted once
            self._inner = outer_inner + spent


class GuidedSampler:
    """Turns prompts into experience. `engine` needs `generate` and the attribute `tokenizer`."""

    def __init__(
        self,
        engine: Any,
        rewards: RewardFunctions,
        config: GPOConfig,
        max_length: int,
        on_phase: PhaseCallback | None = None,
    ) -> None:
        self.engine = engine
        self.rewards = rewards
        self.config = config
        self.max_length = max_length
        self.on_phase = on_phase
        self.splitter = config.splitter()

    def collect(self, examples: Sequence[Example], seed: int) -> Experience:
        """One iteration's experience. The same seed and weights give the same experience."""
        config, timer = self.config, PhaseTimer(self.on_phase)
        forest = TokenForest()
        prompts = [encode_prompt(e["prompt"], self.engine.tokenizer, self.max_length) for e in examples]
        roots = [forest.add_prompt(ids) for ids in prompts]
        seeds = np.random.SeedSequence([seed, 0x6770]).generate_state(2 * len(examples) + 2).tolist()

        with timer("rollout"):
            base = self.engine.generate(
                [
                    Request(ids, config.num_generations, self._sampling(len(ids)), seed=seeds[i], keep=config.use_gpo)
                    for i, ids in enumerate(prompts)
                ]
            )
        owner = [c.request_index for c in base]
        with timer("reward"):
            base_rewards = self._score(base, owner, examples)
        nodes = [
            forest.branch(roots[i], len(prompts[i]), c.token_ids, logprobs=c.logprobs, reward=float(r))
            for c, i, r in zip(base, owner, base_rewards)
        ]
        grouped = base_rewards.reshape(len(examples), config.num_generations)
        rows = self._rows(base, self._advantages(grouped).ravel(), "base", nodes)

        searched: list[_Searched] = []
        if config.use_gpo:
            searched = self._choose_searched(base, grouped, nodes)
            if searched:
                with timer("search"):
                    self._search(searched, examples, grouped, seeds[-1], timer)
                with timer("reset"):
                    rows += self._reset(searched, examples, seeds, forest, timer)
        return Experience(
            rows,
            self._metrics(base, grouped, rows, searched, forest, timer),
            [self._describe(s, examples) for s in searched[: config.num_logged_trajectories]],
            forest,
        )

    def score_once(self, examples: Sequence[Example], temperature: float, seed: int = 0) -> np.ndarray:
        """Rewards of one completion of each example's prompt, shape (n,). The same seed draws the same."""
        prompts = [encode_prompt(e["prompt"], self.engine.tokenizer, self.max_length) for e in examples]
        requests = [
            Request(ids, 1, replace(self._sampling(len(ids)), temperature=temperature), seed=seed + i)
            for i, ids in enumerate(prompts)
        ]
        return self._score(self.engine.generate(requests), range(len(examples)), examples)

    def _sampling(self, prompt_length: int) -> Any:
        room = self.max_length - prompt_length
        return self.config.sampling_params(max_tokens=min(self.config.max_completion_length, room))

    def _score(
        self, completions: Sequence[Completion], owner: Sequence[int], examples: Sequence[Example]
    ) -> np.ndarray:
        """Rewards of whole completions; `owner[i]` is the example of completion i. float64, shape (n,)."""
        rows = [examples[i] for i in owner]
        texts: list[Any] = [decode_completion(c.token_ids, self.engine.tokenizer) for c in completions]
        prompts = [row["prompt"] for row in rows]
        shown = [
            [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
            for text, prompt in zip(texts, prompts)
        ]
        columns = columns_of(rows)
        return self.rewards(prompts, shown, [c.token_ids for c in completions], columns).total

    def _advantages(self, rewards: np.ndarray) -> np.ndarray:
        """Group-relative advantages of GRPO (arXiv 2402.03300): rewards (groups, n) -> (groups, n)."""
        centred = rewards - rewards.mean(axis=1, keepdims=True)
        if self.config.scale_rewards:
            centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
        return centred

    @staticmethod
    def _rows(
        completions: Sequence[Completion], advantages: Sequence[float] | np.ndarray, kind: Any, nodes: Sequence[int]
    ) -> list[TrainingRow]:
        return [
            TrainingRow(c.prompt_token_ids, c.token_ids, c.sampling_logprobs, float(a), kind, node)
            for c, a, node in zip(completions, advantages, nodes)
        ]

    def _choose_searched(
        self, base: Sequence[Completion], grouped: np.ndarray, nodes: Sequence[int]
    ) -> list[_Searched]:
        """Trajectories that are worth a search, in order, as many as `max_searches` and `search_budget` allow."""
        config, width = self.config, grouped.shape[1]
        chosen = [int(i) for i in _search_rule(config.search)(grouped)]
        if any(not 0 <= i < grouped.size for i in chosen):
            raise ValueError(f"search chose {chosen}, but there are only the trajectories 0 to {grouped.size - 1}")
        chosen = chosen[: config.max_searches]
        if config.search_budget is not None:
            left = config.search_budget * sum(len(c.token_ids) for c in base)
            finder = self._finder(lambda completions: [], 0)
            affordable = []
            for i in chosen:
                left -= finder.most_tokens(base[i])
                if left < 0:
                    break
                affordable.append(i)
            chosen = affordable
        return [_Searched(i // width, base[i], float(grouped.flat[i]), nodes[i]) for i in chosen]

    def _finder(self, outcome: OutcomeReward, seed: int) -> CriticalStepFinder:
        config = self.config
        return CriticalStepFinder(
            self.engine,
            outcome,
            self.splitter,
            n_samples=config.num_samples,
            criterion=config.criterion,  # type: ignore[arg-type]
            estimator=config.estimator,  # type: ignore[arg-type]
            reset=config.reset,  # type: ignore[arg-type]
            reuse=config.reuse,  # type: ignore[arg-type]
            sampling=config.sampling_params(),
            delta=config.delta,
            proposal=config.proposal,
            seed=seed,
        )

    def _search(
        self,
        searched: list[_Searched],
        examples: Sequence[Example],
        grouped: np.ndarray,
        seed: int,
        timer: PhaseTimer,
    ) -> None:
        def outcome(completions: Sequence[Completion]) -> Sequence[float]:
            with timer("reward"):
                owner = [searched[c.request_index].example for c in completions]
                return self._score(completions, owner, examples).tolist()

        found = self._finder(outcome, seed).find(
            [s.completion for s in searched],
            rewards=[s.reward for s in searched],
            root_values=[grouped[s.example].tolist() for s in searched],
        )
        for trajectory, critical in zip(searched, found):
            trajectory.critical = critical

    def _reset(
        self,
        searched: list[_Searched],
        examples: Sequence[Example],
        seeds: Sequence[int],
        forest: TokenForest,
        timer: PhaseTimer,
    ) -> list[TrainingRow]:
        """New rollouts from each critical step, as training rows."""
        requests = []
        for n, s in enumerate(searched):
            assert s.critical is not None
            cut = s.critical.token_position
            prompt = s.completion.prompt_token_ids
            room = max(1, min(self.config.max_completion_length, self.max_length - len(prompt)) - cut)
            requests.append(
                Request(
                    [*prompt, *s.completion.token_ids[:cut]],
                    self.config.num_resets,
                    self.config.sampling_params(max_tokens=room),
                    seed=seeds[len(examples)] + n,
                    trace=s.completion.trace,
                )
            )
        drawn = self.engine.generate(requests)
        whole = [CriticalStepFinder.whole(searched[c.request_index].completion, c) for c in drawn]
        with timer("reward"):
            rewards = self._score(whole, [searched[c.request_index].example for c in drawn], examples)
        rows: list[TrainingRow] = []
        width = self.config.num_resets
        for n, s in enumerate(searched):
            assert s.critical is not None
            mine = slice(n * width, (n + 1) * width)
            group, group_rewards = drawn[mine], rewards[mine].tolist()
            s.resets, s.reset_rewards = group, group_rewards
            at = len(s.completion.prompt_token_ids) + s.critical.token_position
            reused = s.critical.reusable
            group_rewards = [*group_rewards, *s.critical.reusable_rewards]
            nodes = [
                forest.branch(s.node, at, c.token_ids, logprobs=c.logprobs, reward=r)
                for c, r in zip([*group, *reused], group_rewards)
            ]
            if len(group_rewards) < 2:
                continue
            advantages = self._advantages(np.asarray([group_rewards]))[0]
            rows += self._rows(group, advantages[:width], "reset", nodes[:width])
            rows += self._rows(reused, advantages[width:], "search", nodes[width:])
        return rows

    def _metrics(
        self,
        base: Sequence[Completion],
        grouped: np.ndarray,
        rows: Sequence[TrainingRow],
        searched: Sequence[_Searched],
        forest: TokenForest,
        timer: PhaseTimer,
    ) -> dict[str, float]:
        lengths = [len(c.token_ids) for c in base]
        found = [s.critical for s in searched if s.critical is not None]
        search_tokens = sum(c.num_tokens for c in found)
        reset_rewards = [r for s in searched for r in s.reset_rewards]
        metrics = {
            "reward": float(grouped.mean()),
            "reward_std": float(grouped.std(axis=1).mean()),
            "mixed_groups": float((grouped.max(axis=1) > grouped.min(axis=1)).mean()),
            "completion_length": float(np.mean(lengths)),
            "truncated": float(np.mean([c.finish_reason == "length" for c in base])),
            "num_rollouts": float(len(base) + len(reset_rewards) + sum(c.num_rollouts for c in found)),
            "num_searches": float(len(found)),
            "num_search_tokens": float(search_tokens),
            "num_tokens": float(
                sum(lengths) + search_tokens + sum(len(r.token_ids) for r in rows if r.kind == "reset")
            ),
            "shared_tokens": 1 - forest.unique_tokens / max(1, forest.total_tokens),
        }
        if reset_rewards:
            metrics["reset_reward"] = float(np.mean(reset_rewards))
            advantages = [c.advantages[c.index] for c in found]
            metrics["critical_advantage"] = float(np.mean([a for a in advantages if np.isfinite(a)] or [0.0]))
            metrics["critical_position"] = float(np.mean([c.index / len(c.steps) for c in found]))
            metrics["critical_confidence"] = float(np.mean([c.confidence for c in found]))
            metrics["search_rollouts_saved"] = float(sum(c.rollouts_saved for c in found))
            metrics["search_tokens_saved"] = float(sum(c.tokens_saved for c in found))
            metrics["num_cancelled"] = float(sum(c.num_cancelled for c in found))
            metrics["num_reused"] = float(sum(len(c.reusable) for c in found))
        return metrics | {f"seconds/{phase}": spent for phase, spent in timer.seconds.items()}

    def _describe(self, s: _Searched, examples: Sequence[Example]) -> dict[str, Any]:
        """A searched trajectory as the report shows it."""
        assert s.critical is not None
        record = s.critical.record(s.completion, self.engine.tokenizer)
        resets = [branch_record(c, r, "reset", self.engine.tokenizer) for c, r in zip(s.resets, s.reset_rewards)]
        answer = examples[s.example].get("answer")
        return {
            **record,
            "branches": resets + record["branches"],
            "answer": None if answer is None else str(answer),
        }


def search_mixed(rewards: np.ndarray) -> list[int]:
    """The worst trajectory of each group whose outcomes differ: elsewhere no step has made a difference."""
    mixed = np.flatnonzero(rewards.max(axis=1) > rewards.min(axis=1))
    return [int(group) * rewards.shape[1] + int(rewards[group].argmin()) for group in mixed]


def search_all(rewards: np.ndarray) -> list[int]:
    """Every trajectory."""
    return list(range(rewards.size))


def _search_rule(search: Any) -> Callable[[np.ndarray], Sequence[int]]:
    """The rule of a name, or the function itself: rewards (groups, n) -> places of trajectories, row by row."""
    return search if callable(search) else {"mixed": search_mixed, "all": search_all}[search]
