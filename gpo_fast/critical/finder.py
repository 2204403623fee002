"""CriticalStepFinder: the public face of the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gpo_fast.critical.bisect import BisectSearch
from gpo_fast.critical.proposals import Proposal, named_proposal
from gpo_fast.critical.racing import PosteriorSearch, RacingSearch
from gpo_fast.critical.rounds import RoundRunner, SearchRun
from gpo_fast.critical.search import Search, SearchProblem, UniformSearch
from gpo_fast.critical.step import SCORES, Criterion, CriticalStep, Estimator, Reset, Reuse, mean
from gpo_fast.critical.unsampled import ProposedChoice, RandomChoice, UnsampledChoice
from gpo_fast.rollout.types import Completion, Request, RolloutBackend, SamplingParams
from gpo_fast.steps import Step, StepSplitter

OutcomeReward = Callable[[Sequence[Completion]], Sequence[float]]

ONE_ROUND = 256  # continuations that an engine draws sooner at once than in rounds of a part of them
_SEARCHES: dict[str, type[Search]] = {
    "uniform": UniformSearch,
    "posterior": PosteriorSearch,
    "racing": RacingSearch,
    "bisect": BisectSearch,
    "random": RandomChoice,
    "proposal": ProposedChoice,
}
ESTIMATORS = tuple(_SEARCHES)


class CriticalStepFinder:
    """Finds the critical steps of trajectories by Monte Carlo continuations of their states.

    Args:
        engine: a rollout backend with the attribute `tokenizer`.
        reward_fn: outcome rewards of whole completions (`token_ids` from the end of the prompt on). The
            `request_index` of each is the place of its trajectory in the list given to `find`.
        splitter: cuts a trajectory into steps.
        n_samples: N, continuations per state. The paper's default is 4; accuracy is flat beyond 12. "racing" wants
            to be as sure as "uniform" with this N, for never more continuations, nor more expected tokens.
        criterion: "max" (the paper's: largest gain), "min" (largest fall), "abs" (largest change).
        estimator: "uniform", the paper's: N continuations of every state, in one batch; the step with the best
            difference of their means. "posterior": the same continuations; the step that is likeliest to be the
            critical one, given them. "racing": samples go where they tell most about which step that is, until it
            is as sure as "uniform" with this N would be, or has the probability 1 - `delta`. "bisect": a
            heuristic for the step that lost a failing trajectory (criterion "min", reset "before"). "random": no
            search, a step chosen by chance: the control. "proposal": no search, the step that `proposal` scores
            highest ("mistake" if none is given): a guess for nothing, where success is too rare to be sampled.
        reset: keep the tokens "before" the critical step (the step itself is sampled anew) or "after" it; the last
            step cannot be kept, and a trajectory of one step is always reset to its start.
        reuse: which continuations of the reset state are handed on for training as `CriticalStep.reusable`:
            "none", "all", or "split": N / 2 choose the step and N / 2, which the choice never saw, are handed on.
            With "all" their mean reward is biased by the choice.
        sampling: how continuations are drawn. `max_tokens` is the limit of the *whole* completion, so a
            continuation gets what its prefix left of it.
        delta: "racing" stops when the probability of another step being better is at most this, whatever N.
        reward_range: lowest and highest reward, for the posterior; by default 0 and 1, widened by what is seen.
        proposal: orders the search of "racing" and "bisect", and decides only with the estimator "proposal":
            "logprob", "mistake", "entropy", "gradient" or a function `(completions, steps) -> scores of each
            trajectory's steps` (`proposals`).
        ahead: let "racing" sample more than it must where the engine has little to do: begin next rounds early, and
            take all of a uniform search's continuations in one round if they are at most 256. More tokens, less time
            where few trajectories are searched at once.
        seed: first seed of the search; every state of every trajectory has streams of its own.

    Raises:
        ValueError: an option that is none of the above, or two that do not go together.
    """

    def __init__(
        self,
        engine: RolloutBackend,
        reward_fn: OutcomeReward,
        splitter: StepSplitter | None = None,
        *,
        n_samples: int = 4,
        criterion: Criterion = "max",
        estimator: Estimator = "uniform",
        reset: Reset = "before",
        reuse: Reuse = "none",
        sampling: SamplingParams | None = None,
        delta: float = 0.1,
        reward_range: tuple[float, float] | None = None,
        proposal: str | Proposal | None = None,
        ahead: bool = True,
        seed: int = 0,
    ) -> None:
        check_options(n_samples, criterion, estimator, reset, reuse, delta)
        if reward_range is not None and not reward_range[0] < reward_range[1]:
            raise ValueError(f"reward_range must be (lowest, highest), got {reward_range}")
        self.engine = engine
        self.reward_fn = reward_fn
        self.splitter = splitter or StepSplitter()
        self.n_samples = n_samples
        self.criterion: Criterion = criterion
        self.estimator: Estimator = estimator
        self.reset = reset
        self.reuse = reuse
        self.sampling = sampling or SamplingParams()
        self.delta = delta
        self.reward_range = reward_range
        self.proposal = named_proposal("mistake" if proposal is None and estimator == "proposal" else proposal, engine)
        self.ahead = ahead
        self._has_learned = False
        self.seed = seed

    def learn(self, completions: Sequence[Completion], rewards: Sequence[float]) -> None:
        """Tells a proposal that learns how rollouts ended, more than `find` is given: good ones and bad ones."""
        learn = getattr(self.proposal, "learn", None)
        if learn is not None:
            learn(completions, [self._split(c) for c in completions], rewards)
            self._has_learned = True

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

        Raises:
            ValueError: lengths that differ, or a reward outside `reward_range`.
        """
        trajectories = [replace(c, request_index=row) for row, c in enumerate(completions)]
        own = list(self.reward_fn(trajectories)) if rewards is None else [float(r) for r in rewards]
        roots = [list(r or ()) for r in root_values] if root_values is not None else [[] for _ in completions]
        if not len(own) == len(roots) == len(completions):
            raise ValueError(f"{len(completions)} completions, {len(own)} rewards, {len(roots)} root values")
        steps = [self._split(c) for c in trajectories]
        if not self._has_learned:
            self.learn(trajectories, own)
        scores = self.proposal(trajectories, steps) if self.proposal else [None] * len(steps)
        problems = [self._problem(*known, row) for row, known in enumerate(zip(trajectories, steps, own, roots))]
        for problem, score_of_steps in zip(problems, scores):
            problem.proposal = score_of_steps
        search = self._search_of(problems)
        runs = [SearchRun(search(problem), row, copies=self._copies) for row, problem in enumerate(problems)]

        def request(run: SearchRun, state: int, count: int) -> Request:
            return self._request(trajectories[run.row], run, steps[run.row][state].start, state, count)

        def score(drawn: list[tuple[SearchRun, Completion]]) -> Sequence[float]:
            outcomes = self.reward_fn([self.whole(trajectories[run.row], c) for run, c in drawn])
            self._check_range(outcomes)
            return outcomes

        self._check_range([*own, *(r for root in roots for r in root)])
        runner = RoundRunner(self.engine, runs, request, score, ahead=self.ahead and search is RacingSearch)
        # A search of one round has nothing to gain from a stream.
        if issubclass(search, UniformSearch) or not hasattr(self.engine, "stream"):
            runner.run_in_step()
        else:
            runner.run_streaming()
        return [self._result(run, steps[run.row]) for run in runs]

    def _search_of(self, problems: Sequence[SearchProblem]) -> type[Search]:
        """The estimator's search; in place of racing one round of all that it may sample, where that is not much."""
        search = _SEARCHES[self.estimator]
        if search is RacingSearch and self.ahead:
            most = self._copies * sum(problem.n_samples * len(problem.open_states) for problem in problems)
            return PosteriorSearch if most <= ONE_ROUND else search
        return search

    def most_tokens(self, completion: Completion, *, root_is_known: bool = True) -> int:
        """The most tokens that a search of this trajectory may take, at the trajectory's own remaining length."""
        problem = self._problem(completion, self._split(completion), 0.0, [0.0] if root_is_known else [], 0)
        wanted = _SEARCHES[self.estimator](problem).most_rollouts()
        return self._copies * sum(count * problem.prices[state] for state, count in wanted.items())

    @staticmethod
    def continuation(
        trajectory: Completion, cut: int, n: int, sampling: SamplingParams, *, seed: int, max_length: int | None = None
    ) -> Request:
        """A request for `n` continuations of the trajectory's first `cut` tokens.

        `sampling.max_tokens` is the limit of the whole completion: a continuation gets what its prefix left of it,
        and of a context of `max_length` tokens, but one token at least.
        """
        prompt, most = trajectory.prompt_token_ids, sampling.max_tokens
        if max_length is not None:
            most = min(most, max_length - len(prompt))
        return Request(
            [*prompt, *trajectory.token_ids[:cut]],
            n,
            replace(sampling, max_tokens=max(1, most - cut)),
            seed=seed,
            trace=trajectory.trace,
        )

    @staticmethod
    def whole(trajectory: Completion, continuation: Completion) -> Completion:
        """The continuation as a completion of the trajectory's prompt, so that rewards see all of it.

        Its `request_index` is the trajectory's.
        """
        cut = len(continuation.prompt_token_ids) - len(trajectory.prompt_token_ids)
        return replace(
            continuation,
            request_index=trajectory.request_index,
            prompt_token_ids=trajectory.prompt_token_ids,
            token_ids=[*trajectory.token_ids[:cut], *continuation.token_ids],
            logprobs=[*trajectory.logprobs[:cut], *continuation.logprobs],
            sampling_logprobs=[*trajectory.sampling_logprobs[:cut], *continuation.sampling_logprobs],
        )

    @property
    def _copies(self) -> int:
        return 2 if self.reuse == "split" else 1

    @property
    def _tokenizer(self) -> Any:
        return self.engine.tokenizer  # type: ignore[attr-defined]

    def _split(self, completion: Completion) -> list[Step]:
        return self.splitter.split(completion.token_ids, self._tokenizer)

    def _problem(
        self, completion: Completion, steps: list[Step], reward: float, root: list[float], row: int
    ) -> SearchProblem:
        # A reset needs an unfinished state: after the last step there is nothing left to sample.
        after = self.reset == "after" and len(steps) > 1
        length = len(completion.token_ids)
        return SearchProblem(
            reward=float(reward),
            samples=[[float(r) for r in root], *([] for _ in steps[1:])],
            prices=[max(1, length - step.start) for step in steps],
            criterion=self.criterion,
            num_candidates=len(steps) - after,
            n_samples=self.n_samples // self._copies,
            root_is_known=bool(root),
            rng=np.random.default_rng([self.seed, row]),
            delta=self.delta,
            reward_range=self.reward_range,
        )

    def _request(self, trajectory: Completion, run: SearchRun, cut: int, state: int, count: int) -> Request:
        seed = np.random.SeedSequence([self.seed, run.row, state, run.num_rounds]).generate_state(1)
        limit = getattr(self.engine, "max_length", None)
        return self.continuation(trajectory, cut, count, self.sampling, seed=int(seed[0]), max_length=limit)

    def _check_range(self, rewards: Sequence[float]) -> None:
        if self.reward_range is None:
            return
        low, high = self.reward_range
        for reward in rewards:
            if not low <= reward <= high:
                raise ValueError(f"a reward of {reward} is outside reward_range, {low} to {high}: widen the range")

    def _result(self, run: SearchRun, steps: list[Step]) -> CriticalStep:
        problem = run.search.problem
        choice = run.search.choose()
        after = self.reset == "after" and len(steps) > 1
        reset_state = choice.step + after
        states = range(len(steps))
        reusable = {"none": {}, "split": run.held_out, "all": run.seen}[self.reuse].get(reset_state, [])
        drawn = [[*run.seen.get(i, ()), *run.held_out.get(i, ())] for i in states]
        uniform = [self.n_samples * (i in problem.open_states) for i in states]
        lengths = [mean([len(c.token_ids) for c, _ in d]) if d else problem.prices[i] for i, d in enumerate(drawn)]
        return CriticalStep(
            index=choice.step,
            token_position=steps[reset_state].start,
            steps=steps,
            advantages=[then - before for before, then in zip(choice.values, choice.values[1:])],
            values=choice.values,
            standard_errors=choice.standard_errors,
            reward=problem.reward,
            num_rollouts=run.num_rollouts,
            num_tokens=run.num_tokens,
            reset_state=reset_state,
            continuations=[[c for c, _ in d] for d in drawn],
            continuation_rewards=[[r for _, r in d] for d in drawn],
            estimator=self.estimator,
            criterion=self.criterion,
            confidence=_confidence(run.search, choice.step),
            rollouts_saved=sum(uniform) - run.num_rollouts,
            tokens_saved=float(np.dot(uniform, lengths)) - run.num_tokens,
            num_rounds=run.num_rounds,
            num_cancelled=run.num_cancelled,
            reusable=[c for c, _ in reusable],
            reusable_rewards=[r for _, r in reusable],
        )


def _confidence(search: Search, step: int) -> float:
    """The posterior probability of the step; NaN where no sample was meant to tell."""
    if isinstance(search, UnsampledChoice):
        return math.nan
    return float((search.problem.winners() == step).mean())


def check_options(n_samples: int, criterion: str, estimator: str, reset: str, reuse: str, delta: float) -> None:
    """Raises ValueError for an option of the search that is none of the known ones, or two that do not go together."""
    for name, value, known in (
        ("criterion", criterion, tuple(SCORES)),
        ("estimator", estimator, ESTIMATORS),
        ("reset", reset, ("before", "after")),
        ("reuse", reuse, ("none", "split", "all")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    if reuse == "split" and n_samples % 2:
        raise ValueError(f"reuse='split' halves the samples: n_samples must be even, got {n_samples}")
    if estimator == "bisect" and (criterion != "min" or reset != "before"):
        raise ValueError(
            "estimator='bisect' looks for the step that lost a trajectory: it needs criterion='min' and "
            f"reset='before', got {criterion!r} and {reset!r}"
        )
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, got {delta}")
