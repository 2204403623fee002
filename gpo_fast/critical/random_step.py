"""A step chosen at random: resets without a search, as in Satori (arXiv 2502.02508). The paper's control."""

from __future__ import annotations

from collections.abc import Mapping

from gpo_fast.critical.search import Choice, Round, Search


class RandomChoice(Search):
    """Samples nothing; every step is as likely as any other."""

    def plan(self, pending: Mapping[int, int]) -> Round:
        return {}

    def choose(self) -> Choice:
        index = int(self.problem.rng.integers(self.problem.num_candidates))
        return super().choose()._replace(step=index)

    def most_rollouts(self) -> Round:
        return {}
