"""A naive model of PrefixCache, and operations that drive the cache and the model side by side.

The model knows for every KV slot *whose* key stands there, as a prefix id: an integer that stands for one epoch, one
namespace and one sequence of tokens. A slot's id therefore says its token, its position and all that came before.
Copies are performed only when `take_copies` lists them, all sources being read before any target is written.
Every operation ends in `check`, which looks at every slot of every live handle.

Used by the tests (pytest and hypothesis) and by the soak run (benchmarks/soak_prefix_cache.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from gpo_fast._C import OutOfBlocks, PrefixCache

UNWRITTEN = -1


@dataclass
class Held:
    """What a handle must find: its tokens and, for each, the id of the prefix that ends there."""

    namespace: int
    epoch: int
    kind: str = "sequence"
    tokens: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    matchable: int = 0  # an open is sure to find the full pages of these many tokens while this handle lives
    priority: int = 0

    def prefix(self, length: int, kind: str = "sequence", priority: int = 0) -> Held:
        matchable = min(self.matchable, length)
        return Held(self.namespace, self.epoch, kind, self.tokens[:length], self.ids[:length], matchable, priority)


def common_prefix(a: list[int], b: list[int]) -> int:
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


class Oracle:
    """Drives a PrefixCache and checks it. Each operation takes three integers and reads its choices from them."""

    def __init__(self, num_blocks: int, block_size: int, *, plan_every: int = 4) -> None:
        self.cache = PrefixCache(num_blocks, block_size)
        self.num_blocks, self.block_size, self.plan_every = num_blocks, block_size, plan_every
        self.content = np.full(num_blocks * block_size, UNWRITTEN)
        self.held: dict[int, Held] = {}
        self.prefix_ids: dict[tuple[int, ...], int] = {}
        self.epoch = 0
        self.committed: list[Held] = []  # all of this epoch
        self.lost = False  # whether some of them may have been evicted
        self.pending: list[tuple[int, int, np.ndarray]] = []  # source, target, content of copies not acknowledged
        self.steps = 0

    # -- operations -----------------------------------------------------------------------------------------

    def open(self, a: int, b: int, c: int) -> None:
        namespace = c % 3 % 2
        tokens = [(a % 64 >> k) & 1 for k in range(b % 14 + 1)]
        known = self._some(a, "sequence")
        if c % 2 and known is not None:  # a later turn of a conversation
            tokens = self.held[known].tokens + tokens
            namespace = self.held[known].namespace
        handle, hit = self.cache.open(np.array(tokens, dtype=[np.int32, np.int64][c % 2]), namespace=namespace)
        own = Held(namespace, self.epoch)
        self._extend(own, tokens[:hit])
        own.matchable = hit
        assert handle not in self.held
        self._check_hit(own, tokens, hit)
        self.held[handle] = own
        self._check_slots(handle)
        if not self._append([handle], [tokens[hit:]]):
            self._release([handle])

    def append(self, a: int, b: int, c: int) -> None:
        handles = self._several(a, b % 4 + 1, "sequence")
        self._append(handles, [[((b + c) >> k) & 1 for k in range((c + i) % 6)] for i in range(len(handles))])

    def append_unclaimed(self, a: int, b: int, c: int) -> None:
        """A second sequence goes on from a page that the first has yet to copy into; one round of copies for both."""
        handle = self._some(a, "sequence")
        if handle is None or not self.held[handle].tokens:
            return
        length = len(self.held[handle].tokens)
        used = length % self.block_size
        if used == 0 or not self.cache.reserve([handle], 1):
            return
        first = self._append_only([handle], [[b & 1]])
        position = length - b % used if used > 1 else length
        (fork,) = self.cache.fork(handle, position).tolist()
        self.held[fork] = self.held[handle].prefix(position)
        second = self._append_only([fork], [[c & 1]])
        self._copy()
        self._write([handle], [[b & 1]], first)
        if second is None:
            self._release([fork])
        else:
            self._write([fork], [[c & 1]], second)
        self._acknowledge()

    def reserve_then_append(self, a: int, b: int, c: int) -> None:
        """What was reserved is there, whatever another sequence takes in between."""
        handle, other = self._some(a, "sequence"), self._some(b, "sequence")
        if handle is None or other is None or handle == other:
            return
        before = self.cache.snapshot()
        if not self.cache.reserve([handle], c % 9):
            assert self.cache.snapshot() == before
            self._evict(10**6)
            assert not self.cache.reserve(np.array([handle]), [c % 9])
            return
        self._append([other], [[(b >> k) & 1 for k in range(b % 9)]])
        assert self._append([handle], [[(a >> k) & 1 for k in range(c % 9)]])

    def fork(self, a: int, b: int, c: int) -> None:
        sources = self._several(a, c % 2 + 1)
        positions = [(b + i) % (len(self.held[s].tokens) + 1) for i, s in enumerate(sources)]
        counts = [(c + i) % 3 for i in range(len(sources))]
        forks = iter(self.cache.fork(sources, positions, counts).tolist())
        for source, position, count in zip(sources, positions, counts):
            for _ in range(count):
                self.held[next(forks)] = self.held[source].prefix(position)
        assert next(forks, None) is None

    def mark(self, a: int, b: int, c: int) -> None:
        handle = self._some(a)
        if handle is not None:
            position = b % (len(self.held[handle].tokens) + 1)
            mark = self.cache.mark(handle, position)
            self.held[mark] = self.held[handle].prefix(position, "mark")

    def pin(self, a: int, b: int, c: int) -> None:
        handle = self._some(a)
        if handle is not None:
            position = b % (len(self.held[handle].tokens) + 1)
            pin = self.cache.pin(handle, priority=c % 3, pos=position)
            self.held[pin] = self.held[handle].prefix(position, "pin", c % 3)

    def unpin(self, a: int, b: int, c: int) -> None:
        pins = self._several(a, 1, "pin")
        for pin in pins:
            self.cache.unpin(pin)
            del self.held[pin]

    def commit(self, a: int, b: int, c: int) -> None:
        handles = self._several(a, b % 3 + 1, "sequence")
        complete = not self.pending
        try:
            self.cache.commit(handles if b % 2 else np.array(handles, dtype=np.int64))
        except ValueError:
            assert self.pending  # a sequence waits for a copy
            return
        for handle in handles:
            own = self.held[handle]
            if own.epoch == self.epoch:
                self.committed.append(own.prefix(len(own.tokens)))
                if complete:
                    own.matchable = len(own.tokens)
                else:
                    self.lost = True  # perhaps: a page that a pending copy reads is not given up for another

    def truncate(self, a: int, b: int, c: int) -> None:
        handle = self._some(a, "sequence")
        if handle is not None:
            length = b % (len(self.held[handle].tokens) + 1)
            self.cache.truncate(handle, length)
            self.held[handle] = self.held[handle].prefix(length)

    def release(self, a: int, b: int, c: int) -> None:
        handles = self._several(a, b % 4 + 1, "sequence", "mark")
        self._release(handles)

    def evict(self, a: int, b: int, c: int) -> None:
        self._evict(a % 5)

    def evict_pins(self, a: int, b: int, c: int) -> None:
        """Pins below a priority go, lowest first, and only once nothing else is left."""
        before = self.cache.stats()
        self.cache.evict(a % 5, priority=c % 4)
        pins = sorted((h for h in self.held if self.held[h].kind == "pin"), key=lambda h: self.held[h].priority)
        given_up = [h for h in pins if self.held[h].tokens and self.cache.length(h) == 0]
        if given_up:
            assert before["cached"] < a % 5
            worst = max(self.held[h].priority for h in given_up)
            assert worst < c % 4
            kept = [h for h in pins if self.held[h].tokens and h not in given_up]
            assert all(self.held[h].priority >= worst for h in kept)
        for handle in given_up:
            self.held[handle] = self.held[handle].prefix(0, "pin", self.held[handle].priority)

    def begin_epoch(self, a: int, b: int, c: int) -> None:
        self.epoch += 1 + a % 2
        self.cache.begin_epoch(self.epoch)
        self.committed, self.lost = [], False
        for handle, own in self.held.items():
            if own.kind == "pin":
                self.held[handle] = own.prefix(0, "pin", own.priority)

    def acknowledge(self, a: int, b: int, c: int) -> None:
        self._acknowledge()

    def misuse(self, a: int, b: int, c: int) -> None:
        """A call with a wrong argument raises ValueError and changes nothing."""
        cache, bad = self.cache, (a % 7 + 1 << 32) + b % 8 if a % 2 else -1 - b
        if bad in self.held:
            return
        handle = self._some(c, "sequence")
        wrong: list[Callable[[], object]] = [
            lambda: cache.release([bad]),
            lambda: cache.fork(bad, 0, 1),
            lambda: cache.plan([bad]),
            lambda: cache.open([]),
            lambda: cache.begin_epoch(self.epoch),
            lambda: cache.unpin(bad),
        ]
        if handle is not None:
            length = len(self.held[handle].tokens)
            wrong += [
                lambda: cache.release([handle, handle]),
                lambda: cache.release([handle, bad]),
                lambda: cache.append([handle, bad], [0, 1], 1),
                lambda: cache.append([handle, handle], [0, 1], 1),
                lambda: cache.append(handle, [0, 1], 1),
                lambda: cache.fork([handle, handle], [0, length + 1], 1),
                lambda: cache.mark(handle, -1),
                lambda: cache.truncate(handle, length + 1),
                lambda: cache.reserve([handle, bad], 1),
                lambda: cache.commit([handle, bad]),
                lambda: cache.unpin(handle),
                lambda: cache.evict(-1),
            ]
        before = cache.snapshot(), cache.stats()
        with pytest.raises(ValueError, match=r"."):
            wrong[c % len(wrong)]()
        assert (cache.snapshot(), cache.stats()) == before

    OPERATIONS = (
        *("open",) * 4,
        *("append",) * 6,
        *("fork",) * 3,
        *("commit",) * 3,
        *("release",) * 3,
        *("mark", "truncate", "evict", "reserve_then_append", "append_unclaimed", "acknowledge"),
        *("pin", "unpin", "evict_pins", "misuse"),
    )

    def step(self, name: str, a: int, b: int, c: int) -> None:
        """One operation and its check."""
        evicted = self.cache.stats()["evicted"]
        getattr(self, name)(a, b, c)
        self.lost |= self.cache.stats()["evicted"] > evicted
        self.steps += 1
        self.check()

    def random_steps(self, count: int, seed: int) -> None:
        """Random operations; a new epoch once in 150, and most handles let go where too many live."""
        rng = random.Random(seed)
        for _ in range(count):
            name = "begin_epoch" if rng.random() < 1 / 150 else rng.choice(self.OPERATIONS)
            if len(self.held) > 24:
                name = rng.choice(("release", "unpin"))
            self.step(name, rng.getrandbits(30), rng.getrandbits(20), rng.getrandbits(20))

    # -- the two sides of an operation -----------------------------------------------------------------------

    def _append(self, handles: list[int], new: list[list[int]]) -> bool:
        slots = self._append_only(handles, new)
        if slots is None:
            return False
        self._copy()
        self._write(handles, new, slots)
        if self.steps % 3:
            self._acknowledge()
        return True

    def _append_only(self, handles: list[int], new: list[list[int]]) -> np.ndarray | None:
        flat = np.array([t for tokens in new for t in tokens], dtype=np.int32)
        before = self.cache.snapshot()
        try:
            slots = self.cache.append(np.array(handles, dtype=np.int64), flat, [len(t) for t in new])
        except OutOfBlocks:
            assert self.cache.snapshot() == before
            return None
        return slots

    def _copy(self) -> None:
        jobs = [(int(s), int(t), int(n)) for s, t, n in zip(*self.cache.take_copies())]
        sources = [self.content[s : s + n].copy() for s, _, n in jobs]
        for (source, target, length), ids in zip(jobs, sources):
            assert 0 < length < self.block_size
            assert source // self.block_size != target // self.block_size
            self.content[target : target + length] = ids
            self.pending.append((source, target, ids))

    def _write(self, handles: list[int], new: list[list[int]], slots: np.ndarray) -> None:
        at = iter(slots.tolist())
        for handle, tokens in zip(handles, new):
            own = self.held[handle]
            start = len(own.ids)
            self._extend(own, tokens)
            for prefix_id in own.ids[start:]:
                self.content[next(at)] = prefix_id

    def _acknowledge(self) -> None:
        for source, target, ids in self.pending:  # both were kept until now
            assert (self.content[source : source + len(ids)] == ids).all()
            assert (self.content[target : target + len(ids)] == ids).all()
        self.cache.acknowledge_copies()
        self.pending = []

    def _release(self, handles: list[int]) -> None:
        self.cache.release(handles)
        for handle in handles:
            del self.held[handle]

    def _evict(self, count: int) -> None:
        before = self.cache.stats()
        done = self.cache.evict(count)
        after = self.cache.stats()
        assert done == min(count, before["cached"]) == after["free"] - before["free"]
        assert after["live"] == before["live"]

    def _extend(self, own: Held, tokens: list[int]) -> None:
        for token in tokens:
            above = own.ids[-1:] or [-2 - own.epoch, own.namespace]
            key = (*above, token)
            own.ids.append(self.prefix_ids.setdefault(key, len(self.prefix_ids)))
            own.tokens.append(token)

    def _some(self, choice: int, *kinds: str) -> int | None:
        handles = [h for h, own in self.held.items() if own.kind in (kinds or ("sequence", "mark", "pin"))]
        return handles[choice % len(handles)] if handles else None

    def _several(self, choice: int, count: int, *kinds: str) -> list[int]:
        handles = [h for h, own in self.held.items() if own.kind in (kinds or ("sequence", "mark", "pin"))]
        return [handles.pop((choice >> i) % len(handles)) for i in range(min(count, len(handles)))]

    # -- checks -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.cache.check_integrity()
        stats = self.cache.stats()
        assert stats["free"] + stats["cached"] + stats["live"] == stats["num_blocks"] == self.num_blocks
        kinds = [own.kind for own in self.held.values()]
        assert [stats[k + "s"] for k in ("sequence", "mark", "pin")] == [
            kinds.count(k) for k in ("sequence", "mark", "pin")
        ]
        pages = {slot // self.block_size for s, t, _ in self.pending for slot in (s, t)}
        for handle in self.held:
            pages |= self._check_slots(handle)
        live = len(pages) + stats["reserved"]  # a pending copy keeps what is above its pages as well
        assert stats["live"] >= live if self.pending else stats["live"] == live
        if self.held and self.steps % self.plan_every == 0:
            self._check_plan()

    def _check_slots(self, handle: int) -> set[int]:
        own = self.held[handle]
        table = self.cache.block_table(handle)
        length = len(own.tokens)
        assert self.cache.length(handle) == length
        assert len(table) == -(-length // self.block_size)
        assert self.cache.tokens(handle).tolist() == own.tokens
        slots = (table[:, None] * self.block_size + np.arange(self.block_size)).reshape(-1)[:length]
        assert (self.content[slots] == own.ids).all()
        return set(table.tolist())

    def _check_hit(self, own: Held, tokens: list[int], hit: int) -> None:
        """The hit is the longest that can have been committed and, unless some was evicted, just that."""

        def longest(candidates: list[tuple[Held, int]]) -> int:
            matches = [
                common_prefix(tokens[:-1], other.tokens[:length])
                for other, length in candidates
                if other.namespace == own.namespace and other.epoch == self.epoch
            ]
            return max(matches, default=0)

        size = self.block_size
        most = longest([(other, len(other.tokens)) for other in self.committed])
        least = longest([(other, other.matchable // size * size) for other in self.held.values()])
        assert least <= hit <= most
        if not self.lost:
            assert hit == most

    def _check_plan(self) -> None:
        rng = random.Random(self.steps)
        handles = rng.sample(list(self.held), rng.randint(0, len(self.held)))
        plan = self.cache.plan(handles)
        assert self.cache.plan(handles) is plan
        check_plan(self.cache, handles, plan)


def naive_plan(cache: PrefixCache, handles: list[int]) -> tuple[list[tuple], list[tuple]]:
    """Groups (start, pages, rows) and tails (start, pages), from the block tables alone."""
    size = cache.block_size
    tables = [cache.block_table(h).tolist() for h in handles]
    full = [cache.length(h) // size for h in handles]
    sharers: dict[tuple[int, int], list[int]] = {}
    for row, table in enumerate(tables):
        for depth, page in enumerate(table[: full[row]]):
            sharers.setdefault((depth, page), []).append(row)
    groups: dict[tuple, None] = {}
    tails = []
    for row, table in enumerate(tables):
        depth = 0
        while depth < full[row] and len(sharers[depth, table[depth]]) > 1:
            rows, start = sharers[depth, table[depth]], depth
            while depth < full[row] and sharers[depth, table[depth]] == rows:
                depth += 1
            groups[start * size, tuple(table[start:depth]), tuple(rows)] = None
        tails.append((depth * size, tuple(table[depth:])))
    return list(groups), tails


def check_plan(cache: PrefixCache, handles: list[int], plan: object) -> None:
    """The plan is the naive one, in depth-first order, as int32 arrays in compressed-row form."""
    p = plan
    names = ("group_starts", "group_lengths", "page_offsets", "pages", "row_offsets", "rows")
    for name in (*names, "tail_starts", "tail_offsets", "tail_pages"):
        assert getattr(p, name).dtype == np.int32, name
    split = np.split
    pages = [tuple(x.tolist()) for x in split(p.pages, p.page_offsets[1:-1])] if len(p.group_starts) else []
    rows = [tuple(x.tolist()) for x in split(p.rows, p.row_offsets[1:-1])] if len(p.group_starts) else []
    groups = list(zip(p.group_starts.tolist(), pages, rows, strict=True))
    tails = [
        (int(start), tuple(p.tail_pages[p.tail_offsets[i] : p.tail_offsets[i + 1]].tolist()))
        for i, start in enumerate(p.tail_starts)
    ]
    expected_groups, expected_tails = naive_plan(cache, handles)
    assert p.group_lengths.tolist() == [len(x) * cache.block_size for x in pages]
    assert sorted(groups) == sorted(expected_groups)
    assert tails == expected_tails
    open_groups: list[tuple] = []  # the groups above the present one: depth first means that rows only ever narrow
    for start, group_pages, group_rows in groups:
        while open_groups and open_groups[-1][0] != start:
            open_groups.pop()
        while open_groups and not set(group_rows) <= set(open_groups[-1][1]):
            open_groups.pop()
            while open_groups and open_groups[-1][0] != start:
                open_groups.pop()
        assert start == 0 or open_groups, "a group comes after the one above it"
        open_groups.append((start + len(group_pages) * cache.block_size, group_rows))
