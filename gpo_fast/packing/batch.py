"""`pack_forest`: a forest as one row of tokens in which every shared token stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpo_fast.forest import TokenForest
from gpo_fast.losses.shared_rows import SharedRows
from gpo_fast.packing.layout import Layout, lay_out
from gpo_fast.tree_attention import TreeShape


@dataclass
class PackedBatch:
    """N tokens for one forward pass, and T loss tokens of S sequences on its hidden states.

    Only `rows` of the hidden states have a loss: `hidden[rows]` goes to the head, with `shared` as the losses take
    it. Loss token t is a token of the sequence `sequence_ids[t]`, which is the branch `branches[sequence_ids[t]]`;
    a branch without a loss token is none of them. Everything per branch (advantages) or per loss token (old
    log-probabilities) is kept as if nothing were shared: autograd adds up what meets in a shared token.
    """

    input_ids: Tensor  # int64 [1, N]
    position_ids: Tensor  # int64 [1, N]: depth in the tree
    tree: TreeShape
    rows: Tensor  # int64 [R], ascending
    shared: SharedRows
    targets: Tensor  # int64 [T], sequence by sequence
    sequence_ids: Tensor  # int64 [T]
    branches: list[int]  # length S: places in the list of branches that was packed
    padded_tokens: int  # tokens of the packed branches' paths, each counted for each branch

    @property
    def unique_tokens(self) -> int:
        return self.input_ids.shape[1]

    def filled(self) -> PackedBatch:
        """The same batch with unused tokens at its end, up to one of eight lengths between two powers of two.

        What is compiled for a length (FlexAttention) is then compiled for few of them; at most an eighth is added.
        """
        count = self.unique_tokens
        step = max(128, 1 << max(0, count.bit_length() - 4))
        length = -(-count // step) * step
        positions = torch.arange(length - count, device=self.position_ids.device)[None]
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, torch.zeros_like(positions)], dim=1),
            position_ids=torch.cat([self.position_ids, positions], dim=1),
            tree=self.tree.filled(length),
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.tree.to(device),
            self.rows.to(device),
            SharedRows(*(t.to(device) for t in self.shared)),
            self.targets.to(device),
            self.sequence_ids.to(device),
            self.branches,
            self.padded_tokens,
        )


def pack_forest(
    forest: TokenForest,
    branches: Sequence[int] | None = None,
    *,
    loss_starts: Sequence[int] | None = None,
) -> PackedBatch:
    """One row of tokens for the paths of `branches`; nothing else of the forest is in it.

    Args:
        branches: nodes of the forest; one may come more than once. Default: all that are not prompts.
        loss_starts: for each branch the depth of its first token with a loss, which is trained from there to its
            end. Default: where its own tokens begin.

    Raises:
        ValueError: no branch has a token with a loss, a node that the forest does not have, or a `loss_starts` of
            another length or outside [1, end of the branch].
    """
    branches = forest.leaves() if branches is None else branches
    for branch in branches:
        if not 0 <= branch < len(forest.nodes):
            raise ValueError(f"the forest has the nodes 0 to {len(forest.nodes) - 1}, got the branch {branch}")
    starts = [forest.nodes[b].start for b in branches] if loss_starts is None else loss_starts
    _check_starts(forest, branches, starts)
    layout = lay_out(forest, branches)
    tokens, depths = _tokens_and_depths(forest, layout)
    kept = [i for i, (b, start) in enumerate(zip(branches, starts)) if start < forest.nodes[b].end]
    ranges = _loss_ranges(forest, layout, [branches[i] for i in kept], [starts[i] for i in kept])
    pairs = _Pairs.of(layout, tokens, ranges)
    positions = np.concatenate([np.arange(start, end) for own in ranges for start, end in own])
    counts = [sum(end - start for start, end in own) for own in ranges]
    return PackedBatch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(depths)[None],
        tree=TreeShape(torch.from_numpy(layout.subtree_end), layout.spans, layout.blocks),
        rows=torch.from_numpy(pairs.rows),
        shared=SharedRows(
            torch.from_numpy(pairs.targets),
            torch.from_numpy(pairs.row_offsets),
            torch.from_numpy(pairs.of_position[positions]),
        ),
        targets=torch.from_numpy(tokens[positions]),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(kept)), counts)),
        branches=kept,
        padded_tokens=sum(forest.nodes[b].end for b in branches),
    )


def _check_starts(forest: TokenForest, branches: Sequence[int], starts: Sequence[int]) -> None:
    if len(starts) != len(branches):
        raise ValueError(f"{len(branches)} branches need as many loss_starts, got {len(starts)}")
    for branch, start in zip(branches, starts):
        if not 1 <= start <= forest.nodes[branch].end:
            raise ValueError(
                f"the path of node {branch} has {forest.nodes[branch].end} tokens; its loss must start at a depth "
                f"from 1 (the first token has nothing to be predicted from) to there, got {start}"
            )
    if not any(start < forest.nodes[branch].end for branch, start in zip(branches, starts)):
        raise ValueError("nothing to train: no branch has a token with a loss")


def _tokens_and_depths(forest: TokenForest, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.empty(len(layout.subtree_end), dtype=np.int64)
    depths = np.empty_like(tokens)
    for run in layout.runs:
        node, length = forest.nodes[run.node], run.end - run.start
        tokens[run.start : run.end] = node.tokens[:length]
        depths[run.start : run.end] = np.arange(node.start, node.start + length)
    return tokens, depths


def _loss_ranges(
    forest: TokenForest, layout: Layout, branches: Sequence[int], starts: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """For each branch the positions of its loss tokens, as ranges from the shallowest to the deepest."""
    first = {run.node: run.start for run in layout.runs}
    ranges = []
    for branch, start in zip(branches, starts):
        own: list[tuple[int, int]] = []
        node, end = branch, forest.nodes[branch].end
        while node != -1 and end > start:
            begin = forest.nodes[node].start
            if end > begin:
                offset = first[node] - begin
                own.append((max(begin, start) + offset, end + offset))
            node, end = forest.nodes[node].parent, min(end, begin)
        ranges.append(own[::-1])
    return ranges


class _Pairs(NamedTuple):
    """The distinct (row, target) pairs in the order of their rows."""

    rows: np.ndarray  # int64 [R], ascending
    row_offsets: np.ndarray  # int64 [R + 1]
    targets: np.ndarray  # int64 [K]
    of_position: np.ndarray  # int64 [N]: the pair whose target is the token at this position

    @staticmethod
    def of(layout: Layout, tokens: np.ndarray, ranges: list[list[tuple[int, int]]]) -> _Pairs:
        """A token within a run is predicted by the position before it and is that row's one target there.

        Only the first tokens of runs can double each other, as children that begin with the same token do, or the
        token with which their parent goes on. They are few, so sorting them costs nothing.
        """
        wanted = np.zeros(len(tokens), dtype=bool)
        for own in ranges:
            for start, end in own:
                wanted[start:end] = True
        heads = np.array([(run.start, run.before) for run in layout.runs], dtype=np.int64)
        heads = heads[wanted[heads[:, 0]]]
        wanted[heads[:, 0]] = False
        inner = np.flatnonzero(wanted)

        of_position = np.full(len(tokens), -1, dtype=np.int64)
        # A head that repeats its row's inner token shares that pair.
        doubles = wanted[heads[:, 1] + 1] & (tokens[heads[:, 0]] == tokens[heads[:, 1] + 1])
        doubled, heads = heads[doubles], heads[~doubles]
        order = np.lexsort((tokens[heads[:, 0]], heads[:, 1]))
        heads = heads[order]
        keys = np.stack([heads[:, 1], tokens[heads[:, 0]]], axis=1)
        new = np.ones(len(heads), dtype=bool)
        new[1:] = (keys[1:] != keys[:-1]).any(axis=1)

        # Merge the two ascending lists of rows; a row's inner target comes before its heads.
        places = np.searchsorted(inner, keys[new, 0] + 1, side="right") + np.arange(int(new.sum()))
        is_head = np.zeros(len(inner) + len(places), dtype=bool)
        is_head[places] = True
        rows = np.empty(len(is_head), dtype=np.int64)
        targets = np.empty_like(rows)
        rows[is_head], rows[~is_head] = keys[new, 0], inner - 1
        targets[is_head], targets[~is_head] = keys[new, 1], tokens[inner]
        of_position[inner] = np.flatnonzero(~is_head)
        of_position[heads[:, 0]] = places[np.cumsum(new) - 1]
        of_position[doubled[:, 0]] = of_position[doubled[:, 1] + 1]
        first = np.flatnonzero(np.diff(rows, prepend=-1))
        return _Pairs(rows[first], np.append(first, len(rows)), targets, of_position)
