"""Steps chosen without Monte Carlo samples: by chance, the paper's control, or by a proposal alone."""

from __future__ import annotations

from collections.abc import Mapping

from gpo_fast.critical.search import Choice, Round, Search


class UnsampledChoice(Search):
    """Samples nothing."""

    def plan(self, pending: Mapping[int, int]) -> Round:
        return {}

    def most_rollouts(self) -> Round:
        return {}

    def _chosen(self, step: int) -> Choice:
        return super().choose()._replace(step=step)


class RandomChoice(UnsampledChoice):
    """Every step is as likely as any other: resets without a search, as in Satori (arXiv 2502.02508)."""

    def choose(self) -> Choice:
        return self._chosen(int(self.problem.rng.integers(self.problem.num_candidates)))


class ProposedChoice(UnsampledChoice):
    """The candidate that the proposal scores highest, the first of equals. It has no advantages: not GPO's choice."""

    def choose(self) -> Choice:
        assert self.problem.proposal is not None
        scores = self.problem.proposal[: self.problem.num_candidates]
        return self._chosen(max(range(len(scores)), key=scores.__getitem__))
