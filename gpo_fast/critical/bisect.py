"""Bisection: a heuristic search for the step that lost a failing trajectory (OmegaPRM's, arXiv 2406.06592)."""

from __future__ import annotations

from collections.abc import Mapping

from gpo_fast.critical.search import Choice, Round, Search, SearchProblem


class BisectSearch(Search):
    """Looks for the last state from which success is still reached, in about log2(H) rounds of N continuations.

    Success is a reward above the trajectory's own. Exact where a mistake is never repaired and N samples do not
    miss a success that is possible; a heuristic everywhere else. With a proposal, a bracket is not halved by its
    number of steps but by their weight, half of which is their scores'.
    """

    def __init__(self, problem: SearchProblem) -> None:
        super().__init__(problem)
        self.alive = 0  # success is reached from here (s_0: taken for granted), ...
        self.lost = problem.num_states  # ... and not from here
        self._asked: int | None = None

    def plan(self, pending: Mapping[int, int]) -> Round:
        if pending:
            return {}
        problem = self.problem
        first = self._asked is None
        if first and problem.root_is_known and not self._succeeds(0):
            return {}  # no success is known from the start: no step lost it
        if self._asked is not None:
            if self._succeeds(self._asked):
                self.alive = self._asked
            else:
                self.lost = self._asked
        if self.lost - self.alive <= 1:
            return {0: problem.n_samples} if first and not problem.root_is_known else {}
        self._asked = self._middle()
        wanted = {self._asked: problem.n_samples}
        return {0: problem.n_samples, **wanted} if first and not problem.root_is_known else wanted

    def choose(self) -> Choice:
        plain = super().choose()
        return Choice(self.alive, plain.values, plain.standard_errors)

    def most_rollouts(self) -> Round:
        """About log2(H) states; the dearest ones stand for those that will be asked."""
        problem = self.problem
        rounds = (problem.num_states - 1).bit_length()
        inner = sorted(range(1, problem.num_states), key=lambda i: -problem.prices[i])[:rounds]
        return dict.fromkeys([*([] if problem.root_is_known else [0]), *inner], problem.n_samples)

    def _succeeds(self, state: int) -> bool:
        return any(r > self.problem.reward for r in self.problem.samples[state])

    def _middle(self) -> int:
        """A state strictly between the ends with half of the bracket's weight on either side."""
        scores = self.problem.proposal
        if scores is None or sum(scores) == 0:
            return (self.alive + self.lost) // 2
        # Half of the weight is spread evenly, so that a wrong proposal costs a few rounds and not a walk.
        weights = [score / sum(scores) + 1 / len(scores) for score in scores][self.alive : self.lost]
        half = sum(weights) / 2
        inner = range(self.alive + 1, self.lost)
        return min(inner, key=lambda state: abs(sum(weights[: state - self.alive]) - half))
