"""The search of one trajectory, as a plan of rounds: `Search` and its plainest kind, the paper's uniform one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gpo_fast.critical.step import SCORES, Criterion, mean, standard_error
from gpo_fast.critical.value_model import sample_paths

Round = dict[int, int]  # state -> continuations to sample from it
NUM_PATHS = 1024  # draws from the posterior: probabilities are known to about 1.5 %


class Choice(NamedTuple):
    """The chosen step with the values behind the choice: H + 1 values and standard errors."""

    step: int
    values: list[float]
    standard_errors: list[float]


@dataclass
class SearchProblem:
    """One trajectory of H steps, and what is known of its states so far."""

    reward: float  # the trajectory's own outcome, V(s_H)
    samples: list[list[float]]  # rewards of continuations of each of the H states
    prices: list[int]  # tokens that the trajectory had left after each state: the expected price of a continuation
    criterion: Criterion
    num_candidates: int  # steps that may be chosen: the first so many
    n_samples: int  # N of the uniform search that sets the budget
    root_is_known: bool  # V(s_0) has samples already and gets no more
    rng: np.random.Generator
    delta: float = 0.1
    reward_range: tuple[float, float] | None = None
    proposal: Sequence[float] | None = None  # a score of each step, at least 0: where to look first
    _paths: tuple[int, np.ndarray] = field(default=(-1, np.empty(0)), init=False)

    @property
    def num_states(self) -> int:
        return len(self.samples)

    @property
    def open_states(self) -> range:
        """The states that have to be sampled."""
        return range(int(self.root_is_known), self.num_states)

    def posterior_paths(self) -> np.ndarray:
        """Draws of (V(s_0), ..., V(s_H)) given all samples so far, rewards scaled to [0, 1]: (NUM_PATHS, H + 1)."""
        count = sum(map(len, self.samples))
        if self._paths[0] != count:
            low, high = self.scale()
            scaled = [(np.asarray(s) - low) / (high - low) for s in self.samples]
            successes = np.array([s.sum() for s in scaled])
            failures = np.array([len(s) for s in scaled]) - successes
            own = (self.reward - low) / (high - low)
            self._paths = (count, sample_paths(successes, failures, own, NUM_PATHS, self.rng))
        return self._paths[1]

    def winners(self) -> np.ndarray:
        """The best candidate step of each posterior path."""
        return self.best_steps(self.posterior_paths())

    def best_steps(self, paths: np.ndarray) -> np.ndarray:
        """The best candidate step of each path of H + 1 values; equals are told apart by chance."""
        scores = SCORES[self.criterion](np.diff(paths, axis=1)[:, : self.num_candidates])
        best: np.ndarray = np.argmax(scores + 1e-9 * self.rng.random(scores.shape), axis=1)
        return best

    def scale(self) -> tuple[float, float]:
        """(lowest, highest) reward: what is 0 and 1 to the posterior."""
        if self.reward_range is not None:
            return self.reward_range
        seen = [self.reward, *(r for s in self.samples for r in s)]
        return min(0.0, *seen), max(1.0, *seen)


class Search(ABC):
    """Decides, round by round, from which states to sample. Subclasses see complete rounds only."""

    def __init__(self, problem: SearchProblem) -> None:
        self.problem = problem

    @abstractmethod
    def plan(self, pending: Mapping[int, int]) -> Round:
        """The next round; empty when the search is over.

        Args:
            pending: continuations of each state that are running already (a round planned ahead of their outcome).
        """

    def wants(self, state: int) -> bool:
        """Whether running continuations of a state can still matter."""
        return True

    def choose(self) -> Choice:
        """The step with the best difference of mean rewards."""
        problem = self.problem
        values = [mean(s) for s in problem.samples] + [problem.reward]
        advantages = [then - before for before, then in zip(values, values[1:])]
        index = max(range(problem.num_candidates), key=lambda i: SCORES[problem.criterion](advantages[i]))
        return Choice(index, values, [standard_error(s) for s in problem.samples] + [0.0])

    def most_rollouts(self) -> Round:
        """The most continuations that the search may ever ask for."""
        return dict.fromkeys(self.problem.open_states, self.problem.n_samples)


class UniformSearch(Search):
    """The paper's: N continuations from every state, in one round."""

    def plan(self, pending: Mapping[int, int]) -> Round:
        if pending or any(self.problem.samples[state] for state in self.problem.open_states):
            return {}
        return self.most_rollouts()
