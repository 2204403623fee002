"""Procedure I of GPO (arXiv 2509.16456): sample, find critical steps, reset there and sample again, score.

What comes out is ordinary experience for an unchanged policy-gradient algorithm. Rollouts from a critical step
form a group of their own: they share the state s_m, so their mean reward is the baseline of that state. For a
preference loss (Procedure II) each group is paired within itself instead, the prompt's as well as the critical step's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpo_fast.baseline import gradient_size, optimal_baseline, without_minor
from gpo_fast.config import AVERAGED_LOSSES, GPOConfig
from gpo_fast.critic import monte_carlo_advantages, scale_advantages
from gpo_fast.critical import CriticalStep, CriticalStepFinder, OutcomeReward
from gpo_fast.critical.step import SCORES, branch_record
from gpo_fast.data import Example, columns_of, decode_completion, encode_prompt, is_conversation
from gpo_fast.dynamic_sampling import BaseRollouts, mixed_groups, resample
from gpo_fast.experience import Experience, TrainingRow
from gpo_fast.forest import TokenForest
from gpo_fast.pairs import preference_rows
from gpo_fast.ranks import ALONE, Ranks
from gpo_fast.rewards import RewardFunctions, overlong_punishment
from gpo_fast.rollout.types import Completion, Request

PhaseCallback = Callable[[str], None]


@dataclass
class _Searched:
    """A trajectory chosen for the search: its example, its place in the base rollouts, and what was found."""

    example: int
    completion: Completion
    reward: float
    row: TrainingRow
    critical: CriticalStep | None = None
    reused: list[Completion] = field(default_factory=list)  # of the search, as the first rollouts from its step
    resets: list[Completion] = field(default_factory=list)  # the others
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.engine = engine
        self.rewards = rewards
        self.config = config
        self.max_length = max_length
        self.on_phase = on_phase
        self.ranks = ranks
        self.splitter = config.splitter()

    def collect(self, examples: Sequence[Example], seed: int, pool: Any = None) -> Experience:
        """One iteration's experience. The same seed and weights give the same experience.

        Args:
            pool: the data set from which dynamic sampling takes other prompts; the examples themselves if None.
        """
        config, timer = self.config, PhaseTimer(self.on_phase)
        forest = TokenForest()
        seeds = np.random.SeedSequence([seed, 0x6770]).generate_state(2 * len(examples) + 2).tolist()
        base = self._sample_base(examples, seeds, timer)
        if config.dynamic_sampling_rounds:
            self._resample(base, examples if pool is None else pool, seed, timer)
        examples = base.examples
        roots = [forest.add_prompt(base.prompt(group)) for group in range(len(examples))]
        nodes = [
            forest.branch(
                roots[c.request_index], len(c.prompt_token_ids), c.token_ids, logprobs=c.logprobs, reward=float(r)
            )
            for c, r in zip(base.completions, base.rewards.ravel())
        ]
        rows = self._rows(base.completions, base.rewards, "base", nodes)
        groups = [rows[i : i + config.num_generations] for i in range(0, len(rows), config.num_generations)]

        searched: list[_Searched] = []
        if config.use_gpo:
            searched = self._choose_searched(base, rows)
            if searched:
                with timer("search"):
                    self._search(searched, base, seeds[-1], timer)
                with timer("reset"):
                    groups += self._reset(searched, examples, seeds, forest, timer)
        rows = self._trained(groups)
        metrics = self._metrics(base, rows, searched, forest, timer)
        return Experience(
            rows,
            metrics,
            [self._describe(s, examples) for s in searched[: config.num_logged_trajectories]],
            forest,
        )

    def score_once(self, examples: Sequence[Example], temperature: float, seeds: Sequence[int]) -> np.ndarray:
        """Rewards of one completion of each example's prompt, shape (n,). The same seeds draw the same."""
        prompts = [encode_prompt(e["prompt"], self.engine.tokenizer, self.max_length) for e in examples]
        requests = [
            Request(ids, 1, replace(self._sampling(len(ids)), temperature=temperature), seed=seed)
            for ids, seed in zip(prompts, seeds)
        ]
        return self._outcomes(self.engine.generate(requests), range(len(examples)), examples)

    def _sample_base(self, examples: Sequence[Example], seeds: Sequence[int], timer: PhaseTimer) -> BaseRollouts:
        """`num_generations` completions of each example, and their rewards."""
        prompts = [encode_prompt(e["prompt"], self.engine.tokenizer, self.max_length) for e in examples]
        requests = [
            Request(ids, self.config.num_generations, self._sampling(len(ids)), seed=seed, keep=self.config.use_gpo)
            for ids, seed in zip(prompts, seeds)
        ]
        with timer("rollout"):
            drawn = self.engine.generate(requests)
        with timer("reward"):
            outcomes = self._outcomes(drawn, [c.request_index for c in drawn], examples)
        shape = (len(examples), self.config.num_generations)
        rewards = (outcomes + self._punishment(drawn)).reshape(shape)
        return BaseRollouts(
            list(examples),
            drawn,
            outcomes.reshape(shape),
            rewards,
            len(drawn),
            sum(len(c.token_ids) for c in drawn),
        )

    def _resample(self, base: BaseRollouts, pool: Any, seed: int, timer: PhaseTimer) -> None:
        def draw(examples: Sequence[Example], round_: int) -> BaseRollouts:
            seeds = np.random.SeedSequence([seed, 0x6461, round_]).generate_state(len(examples)).tolist()
            return self._sample_base(examples, seeds, timer)

        resample(base, draw, pool, np.random.default_rng([seed, 0x6461]), self.config.dynamic_sampling_rounds)

    def _sampling(self, prompt_length: int) -> Any:
        room = self.max_length - prompt_length
        return self.config.sampling_params(max_tokens=min(self.config.max_completion_length, room))

    def _score(
        self, completions: Sequence[Completion], owner: Sequence[int], examples: Sequence[Example]
    ) -> np.ndarray:
        """What is trained on: the outcomes with the punishment of long completions. float64, shape (n,)."""
        scores: np.ndarray = self._outcomes(completions, owner, examples) + self._punishment(completions)
        return scores

    def _punishment(self, completions: Sequence[Completion]) -> np.ndarray:
        lengths = [len(c.token_ids) for c in completions]
        return overlong_punishment(lengths, self.config.max_completion_length, self.config.soft_punish_cache)

    def _outcomes(
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

    def _advantages(self, rewards: np.ndarray, completions: Sequence[Completion]) -> np.ndarray:
        """Advantages relative to the group (GRPO, arXiv 2402.03300): rewards (groups, n) -> (groups, n).

        Of "rloo" relative to the group's other completions (arXiv 2402.14740). A critic's are scaled later, all
        together.
        """
        config, width = self.config, rewards.shape[1]
        if config.baseline == "optimal":
            averaged = config.loss_type in AVERAGED_LOSSES
            sizes = np.asarray([gradient_size(c.sampling_logprobs, averaged=averaged) for c in completions])
            centred = without_minor(rewards - optimal_baseline(rewards, sizes.reshape(rewards.shape)))
        else:
            centred = rewards - rewards.mean(axis=1, keepdims=True)
        if config.loss_type == "rloo":
            centred = centred * (width / (width - 1))  # r - (the others' mean)
        if config.scale_rewards and config.critic == "group":
            centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
        return centred

    def _rows(
        self, completions: Sequence[Completion], rewards: np.ndarray, kind: Any, nodes: Sequence[int]
    ) -> list[TrainingRow]:
        """Rows of groups of completions with the rewards (groups, n)."""
        advantages = self._advantages(rewards, completions).ravel()
        return [
            TrainingRow(
                c.prompt_token_ids,
                c.token_ids,
                c.sampling_logprobs,
                float(a),
                kind,
                node,
                reward=float(r),
                truncated=c.finish_reason == "length",
            )
            for c, a, r, node in zip(completions, advantages, rewards.ravel(), nodes)
        ]

    def _trained(self, groups: Sequence[Sequence[TrainingRow]]) -> list[TrainingRow]:
        """The rows of the groups as the base algorithm learns from them."""
        config = self.config
        if config.mask_truncated_completions:
            groups = [[row for row in group if not row.truncated] for group in groups]
        if config.learns_from_pairs:
            return preference_rows(groups, config.max_pairs)
        rows = [row for group in groups for row in group]
        if config.critic == "monte_carlo" and config.scale_rewards:
            scale_advantages(rows, self.ranks, centre=False)
        return rows

    def _choose_searched(self, base: BaseRollouts, rows: Sequence[TrainingRow]) -> list[_Searched]:
        """Trajectories that are worth a search, in order, as many as `max_searches` and `search_budget` allow."""
        grouped, completions = base.rewards, base.completions
        width = grouped.shape[1]
        finder = self._finder(lambda completions: [], 0)
        chosen = choose_searches(grouped, completions, self.config, finder)
        return [_Searched(i // width, completions[i], float(grouped.flat[i]), rows[i]) for i in chosen]

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
        base: BaseRollouts,
        seed: int,
        timer: PhaseTimer,
    ) -> None:
        def outcome(completions: Sequence[Completion]) -> Sequence[float]:
            with timer("reward"):
                owner = [searched[c.request_index].example for c in completions]
                return [float(score) for score in self._score(completions, owner, base.examples)]

        finder = self._finder(outcome, seed)
        finder.learn(base.completions, base.rewards.ravel().tolist())
        found = finder.find(
            [s.completion for s in searched],
            rewards=[s.reward for s in searched],
            root_values=[base.rewards[s.example].tolist() for s in searched],
        )
        for trajectory, critical in zip(searched, found):
            trajectory.critical = critical
            if self.config.critic == "monte_carlo":
                trajectory.row.token_advantages = monte_carlo_advantages(
                    critical, self.config.gamma, self.config.gae_lambda
                )

    def _reset(
        self,
        searched: list[_Searched],
        examples: Sequence[Example],
        seeds: Sequence[int],
        forest: TokenForest,
        timer: PhaseTimer,
    ) -> list[list[TrainingRow]]:
        """`num_resets` rollouts from each critical step, as groups of training rows.

        What the search lets be reused comes first; only what is missing is sampled. The group's own rollouts are
        samples of the prompt's state, and trained on already.
        """
        requests, owner = [], []
        for n, s in enumerate(searched):
            assert s.critical is not None
            s.reused = s.critical.reusable[: self.config.num_resets]
            missing = self.config.num_resets - len(s.reused)
            if missing == 0 or self._has_resets(s.critical):
                continue
            owner.append(n)
            requests.append(
                CriticalStepFinder.continuation(
                    s.completion,
                    s.critical.token_position,
                    missing,
                    self.config.sampling_params(),
                    seed=seeds[len(examples)] + n,
                    max_length=self.max_length,
                )
            )
        drawn = self.engine.generate(requests) if requests else []
        owners = [searched[owner[c.request_index]] for c in drawn]
        whole = [CriticalStepFinder.whole(s.completion, c) for s, c in zip(owners, drawn)]
        with timer("reward"):
            rewards = self._score(whole, [s.example for s in owners], examples) if drawn else np.empty(0)
        for s, completion, reward in zip(owners, drawn, rewards.tolist()):
            s.resets.append(completion)
            s.reset_rewards.append(reward)
        return [group for s in searched if len(group := self._reset_group(s, forest)) > 1]

    def _has_resets(self, critical: CriticalStep) -> bool:
        """Whether the group's own rollouts start at the critical step, so that reuse leaves nothing to sample."""
        return self.config.reuse != "none" and critical.token_position == 0

    def _reset_group(self, s: _Searched, forest: TokenForest) -> list[TrainingRow]:
        """The rows of one critical step."""
        assert s.critical is not None
        assert s.row.node is not None
        at = len(s.completion.prompt_token_ids) + s.critical.token_position
        completions = [*s.reused, *s.resets]
        rewards = [*s.critical.reusable_rewards[: len(s.reused)], *s.reset_rewards]
        nodes = [
            forest.branch(s.row.node, at, c.token_ids, logprobs=c.logprobs, reward=r)
            for c, r in zip(completions, rewards)
        ]
        if len(rewards) < 2:
            return []
        rows = self._rows(completions, np.asarray([rewards]), "reset", nodes)
        for place, row in enumerate(rows):
            row.kind = "search" if place < len(s.reused) else "reset"
            row.priority = max(0.0, float(SCORES[self.config.criterion](s.critical.advantages[s.critical.index])))
        return rows

    def _metrics(
        self,
        base: BaseRollouts,
        rows: Sequence[TrainingRow],
        searched: Sequence[_Searched],
        forest: TokenForest,
        timer: PhaseTimer,
    ) -> dict[str, float]:
        completions, outcomes = base.completions, base.outcomes
        lengths = [len(c.token_ids) for c in completions]
        found = [s.critical for s in searched if s.critical is not None]
        search_tokens = sum(c.num_tokens for c in found)
        reset_rewards = [r for s in searched for r in s.reset_rewards]
        metrics = {
            "reward": float(outcomes.mean()),
            "reward_std": float(outcomes.std(axis=1).mean()),
            "mixed_groups": float(base.is_mixed().mean()),
            "completion_length": float(np.mean(lengths)),
            "truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
            "num_rollouts": float(base.sampled_rollouts + len(reset_rewards) + sum(c.num_rollouts for c in found)),
            "num_searches": float(len(found)),
            "num_search_tokens": float(search_tokens),
            "num_tokens": float(
                base.sampled_tokens + search_tokens + sum(len(c.token_ids) for s in searched for c in s.resets)
            ),
            "shared_tokens": 1 - forest.unique_tokens / max(1, forest.total_tokens),
        }
        if self.config.dynamic_sampling_rounds:
            metrics["resampling_rounds"] = float(base.rounds)
        if self.config.soft_punish_cache:
            metrics["overlong_punishment"] = float((base.rewards - outcomes).mean())
        if self.config.learns_from_pairs:
            metrics["num_pairs"] = len(rows) / 2
        if found:
            reused_rewards = [r for s in searched if s.critical for r in s.critical.reusable_rewards[: len(s.reused)]]
            if reset_rewards or reused_rewards:  # none where all critical steps are at the prompt
                metrics["reset_reward"] = float(np.mean(reset_rewards + reused_rewards))
            advantages = [c.advantages[c.index] for c in found]
            metrics["critical_advantage"] = float(np.mean([a for a in advantages if np.isfinite(a)] or [0.0]))
            metrics["critical_position"] = float(np.mean([c.index / len(c.steps) for c in found]))
            if np.isfinite(found[0].confidence):  # else the estimator takes no samples
                metrics["critical_confidence"] = float(np.mean([c.confidence for c in found]))
            metrics["search_rollouts_saved"] = float(sum(c.rollouts_saved for c in found))
            metrics["search_tokens_saved"] = float(sum(c.tokens_saved for c in found))
            metrics["num_cancelled"] = float(sum(c.num_cancelled for c in found))
            metrics["num_reused"] = float(sum(len(s.reused) for s in searched))
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


def choose_searches(
    rewards: np.ndarray, completions: Sequence[Completion], config: Any, finder: CriticalStepFinder
) -> list[int]:
    """Places of the trajectories to be searched, by the options `search`, `max_searches` and `search_budget`.

    Args:
        rewards: (groups, n), those of the completions.

    Raises:
        ValueError: the option `search` is a function that gave a place which is none.
    """
    chosen = [int(i) for i in _search_rule(config.search)(rewards)]
    if any(not 0 <= i < rewards.size for i in chosen):
        raise ValueError(f"search chose {chosen}, but there are only the trajectories 0 to {rewards.size - 1}")
    chosen = chosen[: config.max_searches]
    if config.search_budget is None:
        return chosen
    left = config.search_budget * sum(len(c.token_ids) for c in completions)
    affordable: list[int] = []
    for i in chosen:
        left -= finder.most_tokens(completions[i])
        if left < 0 and (affordable or config.search_budget == 0):
            break
        affordable.append(i)
    return affordable


def search_mixed(rewards: np.ndarray) -> list[int]:
    """The worst trajectory of each group whose outcomes differ: elsewhere no step has made a difference."""
    worst = search_worst(rewards)
    return [worst[group] for group in np.flatnonzero(mixed_groups(rewards))]


def search_worst(rewards: np.ndarray) -> list[int]:
    """The worst trajectory of every group."""
    return [group * rewards.shape[1] + int(worst) for group, worst in enumerate(rewards.argmin(axis=1))]


def search_failed(rewards: np.ndarray) -> list[int]:
    """A trajectory of each group that failed as a whole: all have one reward, and another group has a better one.

    Such a group teaches nothing by itself, and its rollouts from a later state may. Where no rewards differ at all,
    it cannot be told whether they are good or bad, and every group is searched.
    """
    worst, alike = search_worst(rewards), ~mixed_groups(rewards)
    failed = alike & (rewards[:, 0] < rewards.max())
    return [worst[group] for group in np.flatnonzero(failed if np.ptp(rewards) > 0 else alike)]


def search_all(rewards: np.ndarray) -> list[int]:
    """Every trajectory."""
    return list(range(rewards.size))


def _search_rule(search: Any) -> Callable[[np.ndarray], Sequence[int]]:
    """The rule of a name, or the function itself: rewards (groups, n) -> places of trajectories, row by row."""
    return search if callable(search) else SEARCH_RULES[search]


SEARCH_RULES = {"mixed": search_mixed, "failed": search_failed, "worst": search_worst, "all": search_all}
