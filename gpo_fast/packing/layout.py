"""Where each token of a forest stands in the packed row, and which ranges of it attend to which.

A node's tokens stay together as one *run*. Its children follow it, those from the deepest branch point first, each
with its own subtree. In that order (depth-first, a run's own continuation being the first child of each of its
tokens) the descendants of a token are the positions from its own up to `subtree_end`, without a gap:

    prompt p0 p1 p2; trajectory a from depth 3; branch b off a at depth 4; branch c off the prompt at depth 2

    position      0  1  2  3  4  5  6  7
    token         p0 p1 p2 a3 a4 b4 c2 c3
    depth         0  1  2  3  4  4  2  3
    subtree_end   8  8  6  6  5  6  8  8

Key j is visible to query i exactly when j <= i < subtree_end[j].
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import numpy as np

from gpo_fast.forest import TokenForest


class Run(NamedTuple):
    """A node's tokens: positions `start <= p < end`. `before` is the position of the token before the first one."""

    node: int
    start: int
    end: int
    before: int  # -1: there is none


class Span(NamedTuple):
    """Positions `start <= p < end` that attend to each other causally: a run, or a chain of runs without a branch."""

    start: int
    end: int


class Block(NamedTuple):
    """Every query in [query_start, query_end) sees every key in [key_start, key_end)."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int


class Layout(NamedTuple):
    """The packed row. What a query sees is its own span up to itself and, once each, the blocks that it is in."""

    runs: list[Run]  # in the order of their nodes; empty ones are left out
    spans: list[Span]
    blocks: list[Block]
    subtree_end: np.ndarray  # int32 [N]


def needed_ends(forest: TokenForest, branches: Iterable[int]) -> dict[int, int]:
    """For each node on the paths of `branches`, the depth up to which its tokens are needed."""
    ends: dict[int, int] = {}
    nodes = forest.nodes
    for branch in branches:
        node, end = branch, nodes[branch].end
        while node != -1 and ends.get(node, -1) < end:
            ends[node] = end
            node, end = nodes[node].parent, nodes[node].start
    return ends


def lay_out(forest: TokenForest, branches: Iterable[int]) -> Layout:
    """The tokens on the paths of `branches`, each once."""
    nodes, ends = forest.nodes, needed_ends(forest, branches)
    order = sorted(ends)  # a node is younger than its parent
    sizes = {node: ends[node] - nodes[node].start for node in order}  # tokens of each subtree
    children: dict[int, list[int]] = {node: [] for node in order}
    roots = []
    for node in reversed(order):
        parent = nodes[node].parent
        if parent == -1:
            roots.append(node)
        else:
            sizes[parent] += sizes[node]
            children[parent].append(node)

    places: dict[int, int] = {}  # where each subtree begins
    free = 0
    for root in reversed(roots):
        places[root], free = free, free + sizes[root]
    layout = Layout([], [], [], np.empty(free, dtype=np.int32))
    before = dict.fromkeys(roots, -1)
    span_of: dict[int, int] = {}  # for a node whose run goes on with its parent's span: which one it is
    seen: list[tuple[Block, int]] = []  # blocks, and the span of their keys
    for node in order:
        start = places[node]
        end = free = start + ends[node] - nodes[node].start
        if start == end:
            continue
        layout.runs.append(Run(node, start, end, before[node]))
        span = span_of.get(node, len(layout.spans))
        layout.spans[span : span + 1] = [Span(layout.spans[span].start if node in span_of else start, end)]

        unseen = end  # positions below it have no subtree_end yet
        for at, group in groupby(sorted(children[node], key=lambda c: -nodes[c].start), lambda c: nodes[c].start):
            cut = start + at - nodes[node].start
            layout.subtree_end[cut:unseen], unseen = free, cut
            first_query = free
            for child in group:
                places[child], before[child], free = free, cut - 1, free + sizes[child]
                if places[child] == cut:  # right behind the run's last token
                    span_of[child] = span
            seen.append((Block(first_query, free, start, cut), span))
        layout.subtree_end[start:unseen] = free
    for block, span in seen:
        # Descendants that go on with the span see these keys in it.
        first_query = max(block.query_start, layout.spans[span].end)
        if first_query < block.query_end:
            layout.blocks.append(block._replace(query_start=first_query))
    return layout
