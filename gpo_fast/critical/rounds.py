"""Runs the rounds of many searches on one backend.

On a backend with `stream` each search goes on as soon as its own round is complete, and while the engine has too
little to do a search's next round is begun before this one has ended; what the outcome makes useless is cancelled. On
any other backend the rounds of all searches are one call of `generate`, in step.

Short continuations finish first, and length may go with correctness. So a search sees complete rounds only, in
their order, and of a state's continuations of one round either all or, if one of them was cancelled, none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpo_fast.critical.search import Search
from gpo_fast.rollout.types import Completion, Request

MakeRequest = Callable[["SearchRun", int, int], Request]  # run, state, continuations
Score = Callable[[list[tuple["SearchRun", Completion]]], Sequence[float]]

# So many running branches keep an engine busy; more rounds begun early would only be planned on less than could be
# known. Steps of benchmarks/critical.py on two cores: 2.0 ms for a token with 8 to 15 branches, 1.1 to 1.2 with 16 to
# 31, 0.8 to 0.9 with 32 to 63, 0.7 to 0.9 with more. Filling all 256 places took a fifth more tokens there than filling
# none, and more time.
BUSY = 64


@dataclass
class SampledRound:
    """Continuations that were asked for together."""

    run: SearchRun
    cells: dict[int, int]  # state -> continuations asked for
    arrived: dict[int, list[Completion]] = field(default_factory=dict)
    requests: dict[int, int] = field(default_factory=dict)  # request index of the backend -> state

    def receive(self, completion: Completion) -> None:
        self.arrived.setdefault(self.requests[completion.request_index], []).append(completion)

    @property
    def is_complete(self) -> bool:
        return all(len(self.arrived.get(state, ())) == count for state, count in self.cells.items())


@dataclass
class SearchRun:
    """A search with what was drawn for it.

    `copies` is 2 where each continuation that the search asks for is drawn with a twin that it never sees.
    """

    search: Search
    row: int
    copies: int = 1
    num_rounds: int = 0
    num_rollouts: int = 0
    num_tokens: int = 0
    num_cancelled: int = 0
    is_over: bool = False
    may_plan: bool = True  # False after an empty plan: only an outcome can change it
    open_rounds: list[SampledRound] = field(default_factory=list)  # the oldest first
    seen: dict[int, list[tuple[Completion, float]]] = field(default_factory=dict)  # by state
    held_out: dict[int, list[tuple[Completion, float]]] = field(default_factory=dict)

    def next_round(self) -> SampledRound | None:
        """The round that the search plans now; None when it is over."""
        pending: dict[int, int] = {}
        for round_ in self.open_rounds:
            for state, count in round_.cells.items():
                pending[state] = pending.get(state, 0) + count // self.copies
        cells = {state: count * self.copies for state, count in self.search.plan(pending).items()}
        if not cells:
            self.is_over = not self.open_rounds
            self.may_plan = False
            return None
        self.num_rounds += 1
        self.num_rollouts += sum(cells.values())
        self.open_rounds.append(SampledRound(self, cells))
        return self.open_rounds[-1]

    def whole_cells(self, round_: SampledRound) -> list[tuple[int, Completion]]:
        """A complete round's continuations, by state and branch, without the states in which one was cancelled."""
        whole = []
        for state, arrived in sorted(round_.arrived.items()):
            cancelled = sum(c.finish_reason == "cancelled" for c in arrived)
            self.num_cancelled += cancelled
            self.num_tokens += sum(len(c.token_ids) for c in arrived)
            if not cancelled:
                whole += [(state, c) for c in sorted(arrived, key=lambda c: c.branch_index)]
        return whole

    def learn(self, round_: SampledRound, outcomes: Sequence[tuple[int, Completion, float]]) -> None:
        """Hands a round's rewards to the search, those of the twins apart."""
        self.may_plan = True
        for state, completion, reward in outcomes:
            if completion.branch_index < round_.cells[state] // self.copies:
                self.search.problem.samples[state].append(reward)
                self.seen.setdefault(state, []).append((completion, reward))
            else:
                self.held_out.setdefault(state, []).append((completion, reward))


class RoundRunner:
    """See the module.

    Args:
        ahead: begin a search's next round early where the engine has fewer than BUSY branches.
    """

    def __init__(
        self, engine: Any, runs: Sequence[SearchRun], request: MakeRequest, score: Score, *, ahead: bool
    ) -> None:
        self.engine = engine
        self.runs = runs
        self.request = request
        self.score = score
        self.ahead = ahead

    def run_in_step(self) -> None:
        """All searches' rounds together, one call of `generate` for each round."""
        while True:
            rounds = [r for r in (run.next_round() for run in self.runs if not run.is_over) if r is not None]
            requests = [request for round_ in rounds for request in self._requests(round_)]
            if not requests:
                return
            owners = [(round_, state) for round_ in rounds for state in round_.cells]
            for completion in self.engine.generate(requests):
                round_, state = owners[completion.request_index]
                round_.arrived.setdefault(state, []).append(completion)
            self._close(rounds)

    def run_streaming(self) -> None:
        """Each search's rounds as soon as they can be."""
        with self.engine.stream([]) as stream:
            owners: dict[int, SampledRound] = {}
            running = self._submit(stream, owners, [run.next_round() for run in self.runs])
            for completion in stream:
                running -= 1
                round_ = owners[completion.request_index]
                round_.receive(completion)
                run = round_.run
                if run.open_rounds[0].is_complete:
                    while run.open_rounds and run.open_rounds[0].is_complete:
                        self._close([run.open_rounds[0]])
                    running += self._submit(stream, owners, [run.next_round()])
                    self._cancel_useless(stream, run)
                if self.ahead:
                    running += self._fill(stream, owners, running)

    def _requests(self, round_: SampledRound) -> list[Request]:
        return [self.request(round_.run, state, count) for state, count in round_.cells.items()]

    def _submit(self, stream: Any, owners: dict[int, SampledRound], rounds: Sequence[SampledRound | None]) -> int:
        """Adds rounds to the stream; returns the number of their continuations."""
        real = [r for r in rounds if r is not None]
        places = [(round_, state) for round_ in real for state in round_.cells]
        if not places:
            return 0
        for index, (round_, state) in zip(stream.add([q for r in real for q in self._requests(r)]), places):
            owners[index] = round_
            round_.requests[index] = state
        return sum(count for round_ in real for count in round_.cells.values())

    def _fill(self, stream: Any, owners: dict[int, SampledRound], running: int) -> int:
        """Begins next rounds early until the engine is busy; returns the continuations added."""
        added = 0
        for run in self.runs:
            if running + added >= min(BUSY, self.engine.max_batch_size):
                break
            if len(run.open_rounds) == 1 and run.may_plan:
                added += self._submit(stream, owners, [run.next_round()])
        return added

    def _cancel_useless(self, stream: Any, run: SearchRun) -> None:
        for round_ in run.open_rounds:
            for index, state in round_.requests.items():
                if not run.search.wants(state):
                    stream.cancel(index)

    def _close(self, rounds: Sequence[SampledRound]) -> None:
        """Scores complete rounds and hands them to their searches."""
        whole = [(round_, *cell) for round_ in rounds for cell in round_.run.whole_cells(round_)]
        rewards = self.score([(round_.run, completion) for round_, _, completion in whole]) if whole else []
        learned: dict[int, list[tuple[int, Completion, float]]] = {}
        for (round_, state, completion), reward in zip(whole, rewards):
            learned.setdefault(id(round_), []).append((state, completion, float(reward)))
        for round_ in rounds:
            round_.run.learn(round_, learned.get(id(round_), []))
            round_.run.open_rounds.remove(round_)
