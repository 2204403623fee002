"""Where resets can pay: progress per token over difficulty, length, and how the difficulty is spread.

A world that can be computed without a model. A chain has `steps` steps; each is one of FACTS facts, which the policy
gets right with a probability of its own, and a wrong step dooms the chain. There are three worlds: all steps are
equally hard; one step of each chain is hard; or all steps of a chain are equally hard, but not those of another, by a
normal shift of their logits. An algorithm's gradient is GRPO's (the advantage times the score of each step, divided by
the group's deviation), with respect to the facts' logits.

Progress: an update g of the largest useful size gains (G.g)^2 / (2 L |g|^2), where G is the true gradient of the solve
rate and L a bound on its curvature. Averaged over many prompts and where noise dominates |g|^2, as it does when
success is rare, that is (G.m)^2 / (trace of S) per prompt, m and S being mean and covariance of one prompt's gradient.
The figures are this by token, as multiples of GRPO's with 8 completions. A token counts once when it is sampled and
`price` times when it is trained on; a group with equal rewards is not trained on. loop_gradient.py measures the same
on a real model, per second.

The searches are the package's own, and what they have sampled at the step is reused (`reuse="all"`). A proposal is
modelled as one that names the right step with the probability `hit`, and otherwise any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np
from gpo_fast.bench.common import ReadmeRow, Table

from gpo_fast.baseline import optimal_baseline, without_minor
from gpo_fast.critical.bisect import BisectSearch
from gpo_fast.critical.racing import RacingSearch
from gpo_fast.critical.search import Search, SearchProblem, UniformSearch

FACTS = 60
EASY = 0.995  # the solve rate of an easy step where one is hard
STEP_TOKENS = 6
EVEN, ONE_HARD, UNEQUAL = "steps equally hard", "one hard step", "problems unequal"
KINDS = (EVEN, ONE_HARD, UNEQUAL)
SHIFTS = [NormalDist().inv_cdf((i + 0.5) / 100) for i in range(100)]  # of the logits of unequal problems
LENGTHS, RATES = (6, 12, 24), (0.5, 0.1, 0.03, 0.01)
SEARCHES: dict[str, type[Search]] = {"uniform": UniformSearch, "racing": RacingSearch, "bisect": BisectSearch}


@dataclass(frozen=True)
class Scheme:
    """An algorithm: how many completions, and where a failing one of which groups is reset, and how often."""

    generations: int = 8
    step: str = ""  # "" (no resets), a search, "random" or "proposal"
    groups: str = "mixed"  # that are reset: with mixed outcomes, those of which all failed, or every one
    resets: int = 8
    samples: int = 4
    optimal: bool = False  # the baseline that leaves the least noise, and what teaches next to nothing left out


SCHEMES = {
    "GRPO, 8": Scheme(),
    "GRPO, 4": Scheme(4),
    "uniform": Scheme(step="uniform"),
    "racing": Scheme(step="racing"),
    "bisect": Scheme(step="bisect"),
    "random": Scheme(step="random"),
    "proposal": Scheme(step="proposal"),
    "proposal, every group of 4": Scheme(4, "proposal", "every"),
    "optimal, 8": Scheme(optimal=True),
    "optimal, 4": Scheme(4, optimal=True),
    "random, optimal": Scheme(step="random", optimal=True),
    "every group, optimal": Scheme(4, "proposal", "every", resets=4, optimal=True),
    "failed groups, optimal": Scheme(4, "proposal", "failed", resets=4, optimal=True),
}
REFERENCE = "GRPO, 8"
# In the README, of chains of SHOWN_STEPS.
SHOWN = ("GRPO, 4", "racing", "random", "optimal, 4", "failed groups, optimal")
SHOWN_STEPS = 12


class World:
    """Chains of `steps` steps of which `rate` are solved."""

    def __init__(self, steps: int, rate: float, kind: str) -> None:
        self.steps, self.rate, self.kind = steps, rate, kind
        if kind == ONE_HARD:
            hard = np.arange(FACTS) < FACTS // 2
            self.rates = np.where(hard, rate / EASY ** (steps - 1), EASY)
            used = np.where(hard, 1, steps - 1) / (FACTS // 2)
            self.gradient = used * rate * (1 - self.rates)  # of the solve rate, with respect to the facts' logits
        else:
            self.shifts = np.array(SHIFTS if kind == UNEQUAL else [0.0])
            self.logit = self._solve(rate)
            right = _sigmoid(self.logit + self.shifts)
            self.gradient = np.full(FACTS, steps / FACTS * float((right**steps * (1 - right)).mean()))

    def problem(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The facts of one chain, int [steps], and how often each is right, float [steps]."""
        if self.kind == ONE_HARD:
            facts = rng.integers(FACTS // 2, FACTS, self.steps)
            facts[rng.integers(self.steps)] = rng.integers(0, FACTS // 2)
            return facts, self.rates[facts]
        right = _sigmoid(self.logit + rng.choice(self.shifts))
        return rng.integers(0, FACTS, self.steps), np.full(self.steps, right)

    def _solve(self, rate: float) -> float:
        """The logit of a step with which the share `rate` of all chains is right."""
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            too_low = (_sigmoid(middle + self.shifts) ** self.steps).mean() < rate
            low, high = (middle, high) if too_low else (low, middle)
        return low


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    probability: np.ndarray = 1 / (1 + np.exp(-logits))
    return probability


class Prompt:
    """One prompt's share of an update: its gradient and its tokens."""

    def __init__(self, world: World, scheme: Scheme, rng: np.random.Generator, price: float, hit: float) -> None:
        self.scheme, self.rng, self.price, self.hit = scheme, rng, price, hit
        self.gradient = np.zeros(FACTS)
        self.tokens = 0.0
        self.facts, self.rates = world.problem(rng)
        right = self._sample(0, scheme.generations)
        rewards = right.all(axis=1).astype(float)
        mixed = self._learn(0, right)
        wanted = {"mixed": mixed, "failed": not rewards.any(), "every": True}[scheme.groups]
        if scheme.step and wanted:
            worst = int(rewards.argmin())
            self._reset(right[worst], float(rewards[worst]), rewards)

    def _reset(self, right: np.ndarray, reward: float, rewards: np.ndarray) -> None:
        mistake = len(right) if right.all() else int(right.argmin())  # states up to this one are not lost
        self.samples: dict[int, list[np.ndarray]] = {}
        state = self._choose(mistake, reward, rewards)
        if state == 0:
            return  # the group's own rollouts start there
        nothing = np.empty((0, len(right) - state), dtype=bool)
        reused = np.concatenate([nothing, *self.samples.get(state, [])])[: self.scheme.resets]
        fresh = self._sample(state, self.scheme.resets - len(reused))
        if state <= mistake:  # from a lost state all fail
            self._learn(state, np.concatenate([reused, fresh]))

    def _choose(self, mistake: int, reward: float, rewards: np.ndarray) -> int:
        steps, step = len(self.facts), self.scheme.step
        if step == "random":
            return int(self.rng.integers(steps))
        if step == "proposal":
            return self._named(mistake, steps)
        prices = [STEP_TOKENS * (steps - state) for state in range(steps)]
        samples = [rewards.tolist(), *([] for _ in prices[1:])]
        problem = SearchProblem(reward, samples, prices, "min", steps, self.scheme.samples, True, self.rng)
        search = SEARCHES[step](problem)
        while wanted := search.plan({}):
            for state, count in wanted.items():
                drawn = self._sample(state, count)
                self.samples.setdefault(state, []).append(drawn)
                problem.samples[state] += (drawn.all(axis=1) & (state <= mistake)).astype(float).tolist()
        return search.choose().step

    def _named(self, mistake: int, steps: int) -> int:
        """The step that a proposal takes for the first mistake."""
        return min(mistake, steps - 1) if self.rng.random() < self.hit else int(self.rng.integers(steps))

    def _sample(self, state: int, n: int) -> np.ndarray:
        """Whether each step of continuations from a state is right, bool [n, steps - state]."""
        rates = self.rates[state:]
        self.tokens += n * STEP_TOKENS * len(rates)
        return self.rng.random((n, len(rates))) < rates

    def _learn(self, state: int, right: np.ndarray) -> bool:
        """Adds a group's gradient; whether its rewards differ."""
        rewards = right.all(axis=1).astype(float)
        if rewards.std() == 0:
            return False
        scores = right - self.rates[state:]
        centred = rewards - rewards.mean()
        if self.scheme.optimal:
            sizes = np.square(scores).sum(axis=1)
            centred = without_minor(rewards[None] - optimal_baseline(rewards[None], sizes[None]))[0]
        advantages = centred / (rewards.std(ddof=1) + 1e-4)
        trained = np.count_nonzero(advantages) * right.shape[1]
        np.add.at(self.gradient, self.facts[state:], advantages @ scores)
        self.tokens += self.price * trained * STEP_TOKENS
        return True


def progress(world: World, scheme: Scheme, prompts: int, price: float, hit: float, seed: int) -> float:
    """Progress per token, in the module's measure, up to a factor that is the world's.

    The square of the mean is estimated without the bias that its own noise adds.
    """
    rng = np.random.default_rng(seed)
    drawn = [Prompt(world, scheme, rng, price, hit) for _ in range(prompts)]
    gradients = np.array([p.gradient for p in drawn])
    tokens = float(np.mean([p.tokens for p in drawn]))
    noise = float(gradients.var(axis=0).sum())
    along = gradients @ world.gradient
    useful = float(along.mean() ** 2 - along.var(ddof=1) / prompts)
    return max(0.0, useful) / (noise * tokens) if noise else 0.0


def cells() -> Iterator[tuple[int, float, str]]:
    """The plane: (steps, solve rate, kind of world)."""
    yield from ((steps, rate, kind) for kind, steps, rate in product(KINDS, LENGTHS, RATES))


def measure(prompts: int, price: float, hit: float) -> list[dict[str, Any]]:
    """A record of each cell: every scheme's progress per token over the reference's."""
    records = []
    for steps, rate, kind in cells():
        world = World(steps, rate, kind)
        found = {name: progress(world, scheme, prompts, price, hit, seed=0) for name, scheme in SCHEMES.items()}
        ratios = {name: value / found[REFERENCE] for name, value in found.items()}
        records.append({"steps": steps, "rate": rate, "kind": kind, "progress": ratios})
        print(f"{steps} steps, {rate:.0%}, {kind}", flush=True)
    return records


def table(records: list[dict[str, Any]]) -> Table:
    """A row for each cell."""
    names = [name for name in SCHEMES if name != REFERENCE]
    shown = Table(f"Progress per token, {REFERENCE} = 1", ("world", "steps", "solved", *names))
    for record in records:
        cell = (record["kind"], str(record["steps"]), f"{record['rate']:.0%}")
        shown.add(*cell, *(f"{record['progress'][name]:.2f}" for name in names))
    return shown


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """A row for each solve rate: its three worlds."""
    by_cell = {(r["steps"], r["rate"], r["kind"]): r["progress"] for r in result["data"]["records"]}
    return [
        ReadmeRow(
            f"progress per token, GRPO with 8 completions = 1: chains of {SHOWN_STEPS} steps, {rate:.0%} solved, "
            f"{' / '.join(KINDS)} (computed, no model)",
            "loop.py plane",
            "; ".join(
                f"{name} " + " / ".join(f"{by_cell[SHOWN_STEPS, rate, kind][name]:.2f}" for kind in KINDS)
                for name in SHOWN
            ),
        )
        for rate in RATES
    ]
