"""RolloutStream: the scheduler. Branches wait, are prefilled, decode together, and come out as they finish.

One step: admit what fits; one forward pass over a token of every running branch and a chunk of the prompts that
are being prefilled; sample where a next token is due; retire what has finished.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpo_fast.rollout.branch import Branch, Opened, Prefill, common_prefix
from gpo_fast.rollout.sampler import Drawn, stream_key
from gpo_fast.rollout.types import Completion, FinishReason, Request

if TYPE_CHECKING:
    from types import TracebackType

    from gpo_fast.rollout.engine import RolloutEngine

STOP_WINDOW = 64  # tokens that are decoded to look for a stop string: no stop string is longer in tokens


class RolloutStream(Iterator[Completion]):
    """Completions in the order of finishing; made by `RolloutEngine.stream`.

    More requests may be added and branches cancelled at any time until the stream is exhausted or closed. Closing
    it (explicitly, at the end of a `with` block, or by dropping it) releases all that its branches hold.
    """

    def __init__(self, engine: RolloutEngine, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._cache = engine.cache
        self._counters = engine.counters
        self._seconds = engine.seconds
        self._waiting: deque[Branch] = deque()
        self._prefilling: list[Prefill] = []
        self._running: list[Branch] = []
        self._finished: deque[Branch] = deque()
        self._num_requests = 0
        self._crowded = False  # something was preempted: nothing is admitted until a branch gives back its pages
        self._closed = False
        self.num_branches = 0
        self.add(requests)

    # -- the public face ------------------------------------------------------------------------------------

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Queues more requests; returns their request indices, which count on from those before.

        Raises:
            ValueError: a request that does not fit the model's context or the KV memory; none is queued then.
            RuntimeError: the stream is exhausted or closed.
        """
        if self._closed:
            raise RuntimeError("the stream has ended: open another with engine.stream(requests)")
        for number, request in enumerate(requests):
            self._engine.check_fits(number, request)
        first = self._num_requests
        branches = [b for n, request in enumerate(requests) for b in self._branches_of(first + n, request)]
        # Neighbours share prefixes, the longest of them first.
        self._waiting.extend(sorted(branches, key=lambda b: b.order, reverse=True))
        self._num_requests += len(requests)
        self.num_branches += len(branches)
        return list(range(first, self._num_requests))

    def cancel(self, request_index: int, branch_index: int | None = None) -> int:
        """Drops a branch, or all branches of a request, that have not finished; returns how many.

        Each comes out as a Completion with finish_reason "cancelled" and the tokens it had; its pages are free at
        once. A branch that has finished already is left alone.

        Raises:
            IndexError: no such request in this stream.
        """
        if not 0 <= request_index < self._num_requests:
            raise IndexError(f"request {request_index} is not one of this stream's {self._num_requests} requests")

        def hit(branch: Branch) -> bool:
            return branch.request == request_index and branch_index in (None, branch.index)

        dropped = [b for b in self._running if hit(b)]
        for entry in self._prefilling:
            dropped += [b for b in entry.branches if hit(b)]
            entry.branches = [b for b in entry.branches if not hit(b)]
        abandoned = [entry.sequence for entry in self._prefilling if not entry.branches]
        self._prefilling = [entry for entry in self._prefilling if entry.branches]
        self._running = [b for b in self._running if not hit(b)]
        dropped += [b for b in self._waiting if hit(b)]
        self._waiting = deque(b for b in self._waiting if not hit(b))
        self._cache.release([*abandoned, *(b.sequence for b in dropped if b.sequence >= 0)])
        for branch in dropped:
            branch.sequence = -1
            branch.finish_reason = "cancelled"
        self._finished.extend(dropped)
        self._counters["cancelled"] += len(dropped)
        return len(dropped)

    def close(self) -> None:
        """Ends the stream; what has not come out is dropped."""
        if self._closed:
            return
        self._closed = True
        self._cache.release([e.sequence for e in self._prefilling] + [b.sequence for b in self._running])
        self._waiting.clear()
        self._prefilling.clear()
        self._running.clear()
        self._finished.clear()
        self._engine.stream_ended(self)

    def __next__(self) -> Completion:
        try:
            while not self._finished and (self._waiting or self._prefilling or self._running):
                with self._engine.inference():
                    while not self._finished:
                        self._step()
        except BaseException:
            self.close()
            raise
        if not self._finished:
            self.close()
            raise StopIteration
        return self._finished.popleft().completion()

    def __enter__(self) -> RolloutStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    # -- one step -------------------------------------------------------------------------------------------

    def _step(self) -> None:
        start = time.perf_counter()
        self._make_room()
        self._admit()
        chunks = self._chunks()
        self._counters["steps"] += 1
        self._seconds["schedule"] += time.perf_counter() - start
        complete = [entry for entry, _ in chunks if entry.missing == 0]
        sampled = [*self._running, *(branch for entry in complete for branch in entry.branches)]
        copies = [1] * len(self._running) + [len(entry.branches) for entry in complete]
        rows = np.repeat(np.arange(len(copies)), copies)  # of the logits: where each branch takes its next token
        drawn = self._engine.step(self._running, chunks, sampled, rows)
        self._share(complete)
        self._running = sampled
        self._prefilling = [entry for entry in self._prefilling if entry.missing > 0]
        if sampled:
            self._record(sampled, drawn)
            self._retire()

    def _branches_of(self, number: int, request: Request) -> list[Branch]:
        prompt = [int(t) for t in request.token_ids]
        array = np.asarray(prompt, dtype=np.int32)
        order = array.astype(">i4").tobytes()
        seed = self._engine.next_seed() if request.seed is None else request.seed
        return [
            Branch(number, i, prompt, array, order, request.sampling, stream_key(seed, i), request.keep, request.trace)
            for i in range(request.n)
        ]

    def _admit(self) -> None:
        """Moves branches from waiting to prefilling as long as pages and rows last.

        Branches of equal tokens are one entry. An entry that shares a prefix with one that is being computed, of
        which the cache does not hold a page yet, is left waiting and finds it in the cache later: with the longest
        first, one trajectory is computed once for all its cut points. What continues a kept trace needs neither:
        it is forked from the trace's mark.
        """
        if self._crowded and self._running:
            return
        self._crowded = False
        room = self._engine.max_batch_size - len(self._running) - sum(len(e.branches) for e in self._prefilling)
        budget = self._engine.max_prefill_tokens - sum(e.missing for e in self._prefilling)
        forked = self._fork_traces(min(room, budget))
        room -= sum(len(opened.group) for opened in forked)
        budget -= len(forked)
        left = self._prefill(forked)
        deferred: list[Branch] = []
        while not left and self._waiting and room > 0 and budget > 0 and len(deferred) < self._engine.max_batch_size:
            group = self._next_group(room)
            tokens = group[0].all_tokens()
            if any(self._gains_by_waiting(entry, tokens) for entry in self._prefilling):
                deferred += group
                continue
            opened = Opened(group, *self._cache.open(tokens))
            left = self._prefill([opened])
            room -= len(group)
            budget -= len(tokens) - opened.hit
        self._waiting.extendleft(reversed([*deferred, *left]))
        if not self._running and not self._prefilling:
            raise RuntimeError("no branch can be admitted though none is running")

    def _fork_traces(self, room: int) -> list[Opened]:
        """Sequences for the first waiting branches, as long as they continue kept ones: all of them one fork."""
        groups: list[list[Branch]] = []
        marks: list[int] = []
        while self._waiting and room > 0:
            first = self._waiting[0]
            mark = self._engine.traces.mark_of(first.origin, first.prompt_array)
            if mark is None:
                break
            groups.append(self._next_group(room))
            marks.append(mark)
            room -= len(groups[-1])
        if not groups:
            return []
        self._counters["trace_forks"] += len(groups)
        hits = [len(group[0].prompt) - 1 for group in groups]
        sequences = self._cache.fork(marks, hits, [1] * len(groups)).tolist()
        return list(map(Opened, groups, sequences, hits))

    def _prefill(self, opened: Sequence[Opened]) -> list[Branch]:
        """Begins to compute groups of branches; returns those for which there are no pages."""
        for number, (group, sequence, hit) in enumerate(opened):
            tokens = group[0].all_tokens()
            missing = len(tokens) - hit
            if not self._reserve([sequence], missing):
                self._cache.release([o.sequence for o in opened[number:]])
                return [branch for o in opened[number:] for branch in o.group]
            slots = self._cache.append([sequence], tokens[hit:], [missing])
            pages = self._cache.block_table(sequence)
            for branch in group:
                branch.admitted = self._counters["steps"]
            self._prefilling.append(Prefill(group, sequence, tokens, slots, pages, hit, hit))
            self._counters["shared_tokens"] += hit + (len(group) - 1) * len(tokens)
        return []

    def _reserve(self, sequences: list[int], count: int) -> bool:
        """Room for so many more tokens in each sequence, at the cost of kept traces if need be."""
        while not self._cache.reserve(sequences, count):
            if not self._engine.traces.drop_oldest():
                return False
        return True

    def _next_group(self, room: int) -> list[Branch]:
        group = [self._waiting.popleft()]
        while self._waiting and len(group) < room and self._waiting[0].starts_like(group[0]):
            group.append(self._waiting.popleft())
        return group

    def _gains_by_waiting(self, entry: Prefill, tokens: np.ndarray) -> bool:
        """Whether an entry is about to compute a page or more of these tokens."""
        return common_prefix(entry.tokens, tokens) >= entry.hit + self._engine.block_size

    def _chunks(self) -> list[tuple[Prefill, int]]:
        """What to compute of the entries in this step, as (entry, first position); marks it as computed."""
        budget = self._engine.max_prefill_tokens
        chunks = []
        for entry in self._prefilling:
            if budget == 0:
                break
            count = min(entry.missing, budget)
            chunks.append((entry, entry.computed))
            entry.computed += count
            budget -= count
        return chunks

    def _share(self, entries: list[Prefill]) -> None:
        """The entries are computed: others may match them, and each of their branches gets a sequence."""
        if not entries:
            return
        sequences = [entry.sequence for entry in entries]
        self._cache.commit(sequences)
        counts = [len(entry.branches) - 1 for entry in entries]
        forks = iter(self._cache.fork(sequences, [len(entry.tokens) for entry in entries], counts).tolist())
        for entry in entries:
            entry.branches[0].sequence = entry.sequence
            for branch in entry.branches[1:]:
                branch.sequence = next(forks)

    def _make_room(self) -> None:
        """Preempts what was admitted last until each running branch has room for one more token."""
        while self._running and not self._reserve([b.sequence for b in self._running], 1):
            if self._prefilling:
                entry = self._prefilling.pop()
                self._cache.release([entry.sequence])
                self._waiting.extendleft(reversed(entry.branches))
            elif len(self._running) == 1:
                raise RuntimeError("one running branch does not fit the KV memory though it was checked to fit")
            else:
                victim = max(self._running, key=lambda b: (b.admitted, b.request, b.index))
                self._running.remove(victim)
                self._cache.release([victim.sequence])
                victim.sequence = -1
                self._waiting.appendleft(victim)  # its tokens stay; they are prefilled again
            self._counters["preemptions"] += 1
            self._crowded = True

    def _record(self, branches: list[Branch], drawn: Drawn) -> None:
        start = time.perf_counter()
        for branch, token, logprob, sampling_logprob in zip(branches, *(a.tolist() for a in drawn)):
            branch.tokens.append(token)
            branch.logprobs.append(logprob)
            branch.sampling_logprobs.append(sampling_logprob)
            branch.finish_reason = self._finish_reason(branch)
        self._seconds["sample"] += time.perf_counter() - start

    def _finish_reason(self, branch: Branch) -> FinishReason | None:
        params, token = branch.params, branch.tokens[-1]
        if token in params.stop_token_ids or (token in self._engine.end_tokens and not params.ignore_eos):
            return "stop"
        if params.stop:
            tail = self._engine.tokenizer.decode(branch.tokens[-STOP_WINDOW:])
            if any(stop in tail for stop in params.stop):
                return "stop"
        return "length" if len(branch.tokens) >= params.max_tokens else None

    def _retire(self) -> None:
        done = [b for b in self._running if b.finish_reason is not None]
        if not done:
            return
        sequences = [b.sequence for b in done]
        self._cache.commit(sequences)
        kept = [b for b in done if b.keep]
        traces = self._engine.traces.keep([b.sequence for b in kept], [b.all_tokens()[:-1] for b in kept])
        for branch, trace in zip(kept, traces):
            branch.trace = trace
        self._cache.release(sequences)
        self._crowded = False
        for branch in done:
            branch.sequence = -1
        self._running = [b for b in self._running if b.finish_reason is None]
        self._finished.extend(done)
