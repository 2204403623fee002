"""The prefix cache against a naive oracle: every slot holds the token that its sequence expects, always."""

from __future__ import annotations

import numpy as np
import pytest
from gpo_fast._C import OutOfBlocks
from hypothesis import given, settings
from hypothesis import strategies as st

from gpo_fast import PrefixCache


class Oracle:
    """Mirrors the KV pool: `content[slot]` is the token prefix (with epoch) whose key would stand there."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.cache = PrefixCache(num_blocks, block_size)
        self.block_size, self.epoch = block_size, 0
        self.content: dict[int, tuple] = {}
        self.live: dict[int, tuple[int, list[int]]] = {}  # handle -> epoch, tokens

    def expect(self, handle: int) -> None:
        epoch, tokens = self.live[handle]
        table = self.cache.block_table(handle)
        assert self.cache.length(handle) == len(tokens)
        assert self.cache.tokens(handle).tolist() == tokens
        for position in range(len(tokens)):
            slot = int(table[position // self.block_size]) * self.block_size + position % self.block_size
            assert self.content[slot] == (epoch, tuple(tokens[: position + 1]))

    def write(self, handles: list[int], new: list[list[int]]) -> bool:
        flat = np.array([t for tokens in new for t in tokens], dtype=np.int32)
        before = self.cache.stats()
        try:
            slots = self.cache.append(handles, flat, [len(t) for t in new])
        except OutOfBlocks:
            after = self.cache.stats()
            assert (before["live"], before["sequences"]) == (after["live"], after["sequences"])
            return False
        for source, target, length in zip(*self.cache.take_copies()):
            for offset in range(length):
                self.content[int(target) + offset] = self.content[int(source) + offset]
        self.cache.acknowledge_copies()
        at = iter(slots.tolist())
        for handle, tokens in zip(handles, new):
            epoch, own = self.live[handle]
            for token in tokens:
                own.append(token)
                self.content[next(at)] = (epoch, tuple(own))
        return True

    def check(self) -> None:
        self.cache.check_integrity()
        stats = self.cache.stats()
        assert stats["free"] + stats["cached"] + stats["live"] == stats["num_blocks"]
        assert stats["sequences"] == len(self.live)
        for handle in self.live:
            self.expect(handle)


OPERATION = st.tuples(
    st.sampled_from(["open", "append", "append", "fork", "commit", "release", "truncate", "evict", "epoch"]),
    st.integers(0, 10**6),
    st.integers(0, 7),
)


@given(st.lists(OPERATION, max_size=60), st.integers(1, 4), st.integers(3, 14))
@settings(max_examples=250, deadline=None)
def test_every_slot_holds_what_its_sequence_expects(operations, block_size: int, num_blocks: int) -> None:
    oracle = Oracle(num_blocks, block_size)
    cache = oracle.cache
    for name, choice, amount in operations:
        handles = list(oracle.live)
        handle = handles[choice % len(handles)] if handles else None
        tokens = [(choice >> k) & 1 for k in range(amount + 1)]
        if name == "open":
            opened, hit = cache.open(tokens)
            assert hit < len(tokens)
            oracle.live[opened] = (oracle.epoch, tokens[:hit])
            oracle.expect(opened)
            if not oracle.write([opened], [tokens[hit:]]):
                cache.release([opened])
                del oracle.live[opened]
        elif name == "epoch":
            oracle.epoch += 1
            cache.begin_epoch(oracle.epoch)
            opened, hit = cache.open([0, 0, 1, 0])
            assert hit == 0
            cache.release(opened)
        elif name == "evict":
            assert 0 <= cache.evict(amount) <= amount
        elif handle is None:
            continue
        elif name == "append":
            other = handles[(choice // 7) % len(handles)]
            pair = [handle] if other == handle else [handle, other]
            oracle.write(pair, [tokens[: 1 + i] for i in range(len(pair))])
        elif name == "fork":
            position = choice % (len(oracle.live[handle][1]) + 1)
            for fork in cache.fork(handle, position, amount % 3):
                oracle.live[int(fork)] = (oracle.live[handle][0], oracle.live[handle][1][:position])
        elif name == "commit":
            cache.commit(handle)
        elif name == "truncate":
            length = choice % (len(oracle.live[handle][1]) + 1)
            cache.truncate(handle, length)
            del oracle.live[handle][1][length:]
        elif name == "release":
            cache.release([handle])
            del oracle.live[handle]
        oracle.check()


def test_a_committed_prefix_is_found_token_by_token() -> None:
    oracle = Oracle(32, 4)
    tokens = list(range(100, 111))
    handle, _ = oracle.cache.open(tokens)
    oracle.live[handle] = (0, [])
    oracle.write([handle], [tokens])
    assert oracle.cache.open(tokens)[1] == 0  # not computed yet, so not to be matched
    oracle.cache.commit(handle)
    for length in range(1, 12):
        assert oracle.cache.open(tokens[:length])[1] == length - 1
        assert oracle.cache.open([*tokens[:length], 7, 7])[1] == length


def test_misuse_is_refused_and_changes_nothing() -> None:
    cache = PrefixCache(4, 2)
    handle, _ = cache.open([1, 2, 3])
    cache.append([handle], [1, 2, 3], [3])
    for call in (
        lambda: cache.release([handle + 1]),
        lambda: cache.release([handle, handle]),
        lambda: cache.fork(handle, 4, 1),
        lambda: cache.truncate(handle, 9),
        lambda: cache.append([handle], [1, 2], [3]),
        lambda: cache.open([]),
        lambda: cache.begin_epoch(0),
        lambda: cache.reserve([handle], [-1]),
        lambda: PrefixCache(0, 4),
        lambda: PrefixCache(4, 0),
    ):
        before = cache.stats()
        with pytest.raises(ValueError, match=r"."):
            call()
        assert cache.stats() == before
        cache.check_integrity()
    with pytest.raises(MemoryError):
        cache.append([handle], [5] * 20, [20])
    assert not cache.reserve([handle], 20)
    cache.check_integrity()
    cache.release(handle)
    with pytest.raises(ValueError, match="no live sequence"):
        cache.length(handle)
