"""Racing: samples go to the states that tell most about which step is the critical one, until that is sure enough.

What is known of the values is a posterior over their whole path (`value_model`), so a value that two advantages
share moves both. From its draws come, for each step, the probability of being the critical one. The search ends when
the likeliest is as sure as a uniform search with the same N would be, or has 1 - delta. What uniform would be worth
is read from the same draws: on each path it is played through, N outcomes of every state, and how often it names the
path's best step is counted. So N sets how good the answer has to be, and delta the certainty that is always enough.

Until then a state is worth the information that one more continuation brings about *which* step is best (the mutual
information between its outcome and the winner), per token that it costs. A step whose probability falls below
delta / (2 H) is out: it draws no samples any more, and together all steps that were put out wrongly weigh less than
half of delta.

The budget is that of a uniform search with the same N, in continuations and in tokens at the trajectory's own
remaining length; the search never plans beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpo_fast.critical.search import Choice, Round, Search, SearchProblem, UniformSearch
from gpo_fast.critical.step import mean

FIRST_ROUND = 4
GROWTH = 0.25  # a round's continuations as a share of all before it, so that their number grows like a logarithm


class RacingSearch(Search):
    """See the module. The choice is the step that most posterior paths call best."""

    def __init__(self, problem: SearchProblem) -> None:
        super().__init__(problem)
        self.in_race = np.ones(problem.num_candidates, dtype=bool)
        self._planned = np.zeros(problem.num_states, dtype=np.int64)
        self._budget = self._cap(np.ones(problem.num_states, dtype=np.int64)) * problem.n_samples

    def plan(self, pending: Mapping[int, int]) -> Round:
        problem = self.problem
        winners = problem.winners()
        probability = np.bincount(winners, minlength=problem.num_candidates) / len(winners)
        self.in_race &= probability >= problem.delta / (2 * problem.num_candidates)
        if self._is_sure(float(probability.max()), winners):
            self.in_race[:] = False  # decided: nothing that runs can matter
            return {}
        worth = self._information(problem.posterior_paths(), winners, probability) / np.maximum(problem.prices, 1)
        worth *= self._order()
        worth[[state for state in range(problem.num_states) if not self.wants(state)]] = 0.0
        worth[: problem.open_states.start] = 0.0
        return self._allocate(worth, pending)

    def wants(self, state: int) -> bool:
        """A value matters to the step that ends in its state and to the one that begins there."""
        return bool(self.in_race[max(0, state - 1) : state + 1].any())

    def choose(self) -> Choice:
        return likeliest(self.problem)

    def _is_sure(self, confidence: float, winners: np.ndarray) -> bool:
        """Whether enough is known. The prior is no answer: before the first outcomes only 1 - delta ends a search."""
        problem = self.problem
        if confidence >= 1 - problem.delta:
            return True
        seen = any(problem.samples[state] for state in problem.open_states)
        return seen and confidence >= self._certainty_of_uniform(winners)

    def _certainty_of_uniform(self, winners: np.ndarray) -> float:
        """Probability that a uniform search with N continuations of each state would name the winner."""
        problem = self.problem
        paths = problem.posterior_paths()
        means = np.array(paths)
        for state in problem.open_states:
            means[:, state] = problem.rng.binomial(problem.n_samples, paths[:, state]) / problem.n_samples
        if problem.root_is_known:
            low, high = problem.scale()
            means[:, 0] = (mean(problem.samples[0]) - low) / (high - low)
        return float((problem.best_steps(means) == winners).mean())

    def _information(self, paths: np.ndarray, winners: np.ndarray, probability: np.ndarray) -> np.ndarray:
        """Mutual information (nats) of the winner and the outcome of one continuation of each state: shape (H,)."""
        values = paths[:, :-1]
        won = winners[:, None] == np.arange(len(probability))  # (paths, candidates)
        given = won.T.astype(float) @ values / np.maximum(won.sum(axis=0), 1)[:, None]  # mean values by winner
        information: np.ndarray = np.maximum(_entropy(values.mean(axis=0)) - probability @ _entropy(given), 0.0)
        return information

    def _order(self) -> np.ndarray:
        """A proposal's share in the order of the search: 1 to 2 for each state. It never enters the posterior."""
        scores = np.asarray(self.problem.proposal or np.zeros(self.problem.num_states), dtype=float)
        scores = scores / (scores.max() or 1.0)
        share: np.ndarray = 1.0 + np.maximum(scores, np.concatenate([[0.0], scores[:-1]]))
        return share

    def _allocate(self, worth: np.ndarray, pending: Mapping[int, int]) -> Round:
        """The round's continuations, each to the state that is worth most after those it has already got."""
        size = max(FIRST_ROUND, int(GROWTH * self._planned.sum()))
        given = np.array([pending.get(state, 0) for state in range(self.problem.num_states)], dtype=np.int64)
        allocated = np.zeros_like(self._planned)
        for _ in range(size):
            room = self._budget - self._cap(self._planned + allocated)
            affordable = (room[0] >= 1) & (np.asarray(self.problem.prices) <= room[1])
            gain = np.where(affordable, worth / (1 + given + allocated), 0.0)
            if gain.max() <= 0:
                break
            allocated[int(gain.argmax())] += 1
        self._planned += allocated
        return {int(state): int(allocated[state]) for state in np.flatnonzero(allocated)}

    def _cap(self, counts: np.ndarray) -> np.ndarray:
        """(continuations, tokens) of so many continuations of each open state."""
        open_states = list(self.problem.open_states)
        return np.array([counts[open_states].sum(), np.dot(counts, self.problem.prices) - self._known_part(counts)])

    def _known_part(self, counts: np.ndarray) -> int:
        return int(counts[0] * self.problem.prices[0]) if self.problem.root_is_known else 0


class PosteriorSearch(UniformSearch):
    """The continuations of a uniform search, with racing's choice."""

    def choose(self) -> Choice:
        return likeliest(self.problem)


def likeliest(problem: SearchProblem) -> Choice:
    """The step that most posterior paths call best; posterior means and standard deviations of the values."""
    paths = problem.posterior_paths()
    index = int(np.bincount(problem.winners(), minlength=problem.num_candidates).argmax())
    low, high = problem.scale()
    values = low + (high - low) * paths.mean(axis=0)
    return Choice(index, values.tolist(), ((high - low) * paths.std(axis=0, ddof=1)).tolist())


def _entropy(probability: np.ndarray) -> np.ndarray:
    """Entropy (nats) of right-or-wrong outcomes."""
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    entropy: np.ndarray = -p * np.log(p) - (1 - p) * np.log1p(-p)
    return entropy
