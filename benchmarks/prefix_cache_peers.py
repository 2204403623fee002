"""Other prefix caches behind one small interface, for benchmarks/prefix_cache.py.

Each does what a scheduler asks of it in a rollout: open a prompt (match, hold, take pages for the rest), grow by a
token, fork, commit, release, forget everything. They manage pages only; no keys or values are moved. Written for
this benchmark, except that `TransformersCache` drives the block manager of transformers' continuous batching itself.
"""

from __future__ import annotations

import hashlib
import heapq
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from gpo_fast import PrefixCache


class RolloutCache(ABC):
    """One sequence is one integer. Token ids come as lists; a batch grows by one token for each sequence."""

    name: str

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size

    @abstractmethod
    def open(self, tokens: list[int]) -> int: ...

    @abstractmethod
    def grow(self, sequences: list[int], tokens: list[int]) -> None: ...

    @abstractmethod
    def fork(self, sequence: int, position: int, count: int) -> list[int]: ...

    @abstractmethod
    def commit(self, sequences: list[int]) -> None: ...

    @abstractmethod
    def release(self, sequences: list[int]) -> None: ...

    @abstractmethod
    def forget(self) -> None:
        """The weights have changed: nothing cached may match."""


class Ours(RolloutCache):
    name = "gpo-fast"

    def __init__(self, num_blocks: int, block_size: int, *, plan: bool = False) -> None:
        super().__init__(num_blocks, block_size)
        self.cache = PrefixCache(num_blocks, block_size)
        self.plan, self.epoch = plan, 0
        self.batch: tuple[list[int], np.ndarray] = ([], np.empty(0, dtype=np.int64))

    def open(self, tokens: list[int]) -> int:
        ids = np.array(tokens, dtype=np.int32)
        sequence, hit = self.cache.open(ids)
        self.cache.append(sequence, ids[hit:], len(ids) - hit)
        self._copy()
        return sequence

    def grow(self, sequences: list[int], tokens: list[int]) -> None:
        if self.batch[0] is not sequences:
            self.batch = (sequences, np.array(sequences, dtype=np.int64))
        self.cache.append(self.batch[1], np.array(tokens, dtype=np.int32), 1)
        self._copy()
        if self.plan:
            self.cache.plan(self.batch[1])

    def fork(self, sequence: int, position: int, count: int) -> list[int]:
        return self.cache.fork(sequence, position, count).tolist()

    def commit(self, sequences: list[int]) -> None:
        self.cache.commit(sequences)

    def release(self, sequences: list[int]) -> None:
        self.cache.release(sequences)

    def forget(self) -> None:
        self.epoch += 1
        self.cache.begin_epoch(self.epoch)

    def _copy(self) -> None:
        self.cache.take_copies()
        self.cache.acknowledge_copies()


class OursWithPlan(Ours):
    name = "gpo-fast, a plan each step"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size, plan=True)


class PagedPeer(RolloutCache):
    """Tokens and pages of each sequence, as the Python peers keep them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.next = 0
        self.tokens: dict[int, list[int]] = {}
        self.pages: dict[int, list[int]] = {}

    def new(self, tokens: list[int], pages: list[int]) -> int:
        self.next += 1
        self.tokens[self.next], self.pages[self.next] = tokens, pages
        return self.next

    @abstractmethod
    def take_page(self) -> int: ...

    def fill(self, sequence: int) -> None:
        """Pages for all tokens of the sequence."""
        pages = self.pages[sequence]
        for _ in range(-(-len(self.tokens[sequence]) // self.block_size) - len(pages)):
            pages.append(self.take_page())

    def grow(self, sequences: list[int], tokens: list[int]) -> None:
        size = self.block_size
        for sequence, token in zip(sequences, tokens):
            own = self.tokens[sequence]
            if len(own) % size == 0:
                self.pages[sequence].append(self.take_page())
            own.append(token)


class ChainedHash(PagedPeer):
    """vLLM's way: the hash of a full page chains its parent's; counts per page; free pages in the order of last use."""

    digest: Callable[[bytes], bytes]

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.count = [0] * num_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.page_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}
        self.hashes: dict[int, list[bytes]] = {}

    def hash_pages(self, tokens: list[int], known: list[bytes]) -> list[bytes]:
        size, parent = self.block_size, known[-1] if known else b""
        for start in range(len(known) * size, len(tokens) // size * size, size):
            parent = self.digest(parent + array("i", tokens[start : start + size]).tobytes())
            known.append(parent)
        return known

    def take_page(self) -> int:
        page, _ = self.free.popitem(last=False)
        digest = self.hash_of.pop(page, None)
        if digest is not None:
            del self.page_of[digest]
        self.count[page] = 1
        return page

    def hold(self, pages: list[int]) -> None:
        for page in pages:
            if self.count[page] == 0:
                del self.free[page]
            self.count[page] += 1

    def open(self, tokens: list[int]) -> int:
        hashes = self.hash_pages(tokens, [])
        pages: list[int] = []
        for digest in hashes[: (len(tokens) - 1) // self.block_size]:
            page = self.page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        self.hold(pages)
        sequence = self.new(list(tokens), pages)
        self.hashes[sequence] = hashes
        self.fill(sequence)
        return sequence

    def fork(self, sequence: int, position: int, count: int) -> list[int]:
        shared = position // self.block_size
        forks = []
        for _ in range(count):
            pages = self.pages[sequence][:shared]
            self.hold(pages)
            forks.append(self.new(self.tokens[sequence][:position], pages))
            self.hashes[forks[-1]] = self.hashes[sequence][:shared]
            self.fill(forks[-1])
        return forks

    def commit(self, sequences: list[int]) -> None:
        for sequence in sequences:
            hashes = self.hash_pages(self.tokens[sequence], self.hashes[sequence])
            for digest, page in zip(hashes, self.pages[sequence]):
                if page not in self.hash_of and digest not in self.page_of:
                    self.page_of[digest], self.hash_of[page] = page, digest

    def release(self, sequences: list[int]) -> None:
        for sequence in sequences:
            for page in reversed(self.pages.pop(sequence)):
                self.count[page] -= 1
                if self.count[page] == 0:
                    self.free[page] = None
            del self.tokens[sequence], self.hashes[sequence]

    def forget(self) -> None:
        self.page_of.clear()
        self.hash_of.clear()


class ChainedSha256(ChainedHash):
    name = "chained hash, sha256"

    @staticmethod
    def digest(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()


class ChainedXxhash(ChainedHash):
    name = "chained hash, xxhash"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        import xxhash

        self.digest = xxhash.xxh3_128_digest


class _Node:
    __slots__ = ("children", "locks", "pages", "parent", "tokens", "used")

    def __init__(self, parent: _Node | None, tokens: tuple[int, ...], pages: list[int]) -> None:
        self.parent, self.tokens, self.pages = parent, tokens, pages
        self.children: dict[tuple[int, ...], _Node] = {}
        self.locks, self.used = 0, 0


class RadixTree(PagedPeer):
    """A radix tree of pages: children by their first page, split on a partial match, leaves evicted from a heap."""

    name = "radix tree in Python"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.free = list(range(num_blocks))
        self.root = _Node(None, (), [])
        self.clock = 0
        self.owned: dict[int, tuple[_Node, int]] = {}  # the locked node, and how many pages are the tree's

    def match(self, tokens: tuple[int, ...]) -> tuple[_Node, list[int]]:
        size, node, pages, at = self.block_size, self.root, [], 0
        self.clock += 1
        while (child := node.children.get(tokens[at : at + size])) is not None and at + size <= len(tokens):
            child.used = self.clock
            run, same = child.tokens, size
            while same < len(run) and run[same : same + size] == tokens[at + same : at + same + size]:
                same += size
            if same < len(run):
                child = self.split(child, same)
            pages += child.pages
            node, at = child, at + same
        return node, pages

    def split(self, node: _Node, at: int) -> _Node:
        size = self.block_size
        upper = _Node(node.parent, node.tokens[:at], node.pages[: at // size])
        upper.locks, upper.used = node.locks, node.used
        assert node.parent is not None
        node.parent.children[node.tokens[:size]] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[at:], node.pages[at // size :]
        upper.children[node.tokens[:size]] = node
        return upper

    def lock(self, node: _Node | None, by: int) -> None:
        while node is not None:
            node.locks += by
            node = node.parent

    def take_page(self) -> int:
        if not self.free:
            self.evict(64)
        return self.free.pop()

    def evict(self, count: int) -> None:
        stack, leaves = [self.root], []
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if not node.children and node.locks == 0 and node is not self.root:
                leaves.append((node.used, id(node), node))
        heapq.heapify(leaves)
        while leaves and count > 0:
            _, _, node = heapq.heappop(leaves)
            self.free += node.pages
            count -= len(node.pages)
            parent = node.parent
            del parent.children[node.tokens[: self.block_size]]
            if not parent.children and parent.locks == 0 and parent is not self.root:
                heapq.heappush(leaves, (parent.used, id(parent), parent))

    def open(self, tokens: list[int]) -> int:
        node, pages = self.match(tuple(tokens[: (len(tokens) - 1) // self.block_size * self.block_size]))
        self.lock(node, 1)
        sequence = self.new(list(tokens), list(pages))
        self.owned[sequence] = (node, len(pages))
        self.fill(sequence)
        return sequence

    def fork(self, sequence: int, position: int, count: int) -> list[int]:
        prefix = self.tokens[sequence][:position]
        self.commit([sequence])
        forks = []
        for _ in range(count):
            node, pages = self.match(tuple(prefix[: position // self.block_size * self.block_size]))
            self.lock(node, 1)
            forks.append(self.new(list(prefix), list(pages)))
            self.owned[forks[-1]] = (node, len(pages))
            self.fill(forks[-1])
        return forks

    def commit(self, sequences: list[int]) -> None:
        size = self.block_size
        for sequence in sequences:
            tokens = tuple(self.tokens[sequence][: len(self.tokens[sequence]) // size * size])
            node, found = self.match(tokens)
            old_node, owned = self.owned[sequence]
            pages = self.pages[sequence]
            self.free += pages[owned : len(found)]  # said already
            pages[: len(found)] = found
            if len(found) * size < len(tokens):
                rest = tokens[len(found) * size :]
                child = _Node(node, rest, pages[len(found) : len(tokens) // size])
                child.used = self.clock
                node.children[rest[:size]] = child
                node = child
            self.lock(node, 1)
            self.lock(old_node, -1)
            self.owned[sequence] = (node, len(tokens) // size)

    def release(self, sequences: list[int]) -> None:
        for sequence in sequences:
            node, owned = self.owned.pop(sequence)
            self.lock(node, -1)
            self.free += self.pages.pop(sequence)[owned:]
            del self.tokens[sequence]

    def forget(self) -> None:
        self.evict(self.num_blocks)


class TransformersCache(RolloutCache):
    """The block manager of transformers' continuous batching: chained blake2b over pages, counts per page.

    It forks a request at its end only, so a fork at a mark is a new request with the prefix as its prompt, and the
    other forks of the mark are its forks. It has no partial eviction: all unreferenced pages go when none is free.
    """

    name = "transformers' block manager"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        import torch
        from transformers import PreTrainedConfig
        from transformers.generation.continuous_batching.cache_allocators.cache_pool import CachePool
        from transformers.generation.continuous_batching.cache_allocators.full_attention import (
            FullAttentionCacheAllocator,
        )

        config = PreTrainedConfig()
        config.head_dim = 1
        self.blocks: Any = FullAttentionCacheAllocator(0, config, 1, torch.int8, block_size, [0], True)
        pool = CachePool(num_blocks, 1)
        size = self.blocks.bytes_per_block
        self.blocks.register_cache_tensor(
            size, num_blocks * size, torch.zeros((num_blocks + 2) * size).to(torch.int8), pool
        )
        for _ in range(num_blocks):
            pool.allocate_sector(0)
        self.pool = pool
        self.next = 0
        self.tokens: dict[int, list[int]] = {}

    def room(self, pages: int) -> None:
        if self.pool.count_free_blocks(0) < pages:
            self.pool.free_blocks(0, self.blocks.ledger.evict_cached_blocks())

    def open(self, tokens: list[int]) -> int:
        self.next += 1
        matched = self.blocks.match_prefix_blocks(tokens)
        held = len(matched) * self.block_size
        self.blocks.acquire_prefix_blocks(str(self.next), held, matched)
        self.room(-(-len(tokens) // self.block_size) - len(matched))
        self.blocks.allocate_cache_to_request(str(self.next), held, len(tokens) - held)
        self.tokens[self.next] = list(tokens)
        return self.next

    def grow(self, sequences: list[int], tokens: list[int]) -> None:
        self.room(len(sequences))
        for sequence, token in zip(sequences, tokens):
            own = self.tokens[sequence]
            self.blocks.allocate_cache_to_request(str(sequence), len(own), 1)
            own.append(token)

    def fork(self, sequence: int, position: int, count: int) -> list[int]:
        forks = [self.open(self.tokens[sequence][:position])]
        for _ in range(count - 1):
            self.next += 1
            self.room(1)
            self.blocks.fork_blocks(str(forks[0]), str(self.next), position)
            self.tokens[self.next] = list(self.tokens[forks[0]])
            forks.append(self.next)
        return forks

    def commit(self, sequences: list[int]) -> None:
        for sequence in sequences:
            self.blocks.mark_complete_blocks(str(sequence), self.tokens[sequence], self.num_blocks)

    def release(self, sequences: list[int]) -> None:
        for sequence in sequences:
            self.blocks.free_blocks(str(sequence))
            del self.tokens[sequence]

    def forget(self) -> None:
        self.pool.free_blocks(0, self.blocks.ledger.evict_cached_blocks())


CACHES: tuple[type[RolloutCache], ...] = (
    Ours,
    OursWithPlan,
    TransformersCache,
    RadixTree,
    ChainedXxhash,
    ChainedSha256,
)
