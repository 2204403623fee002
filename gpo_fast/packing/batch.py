"""`pack_forest`: a forest as one row of tokens in which every shared token stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gpo_fast import _C
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
    kept = [place for place, branch in enumerate(branches) if starts[place] < forest.nodes[branch].end]
    ranges = _loss_ranges(forest, layout, [branches[i] for i in kept], [starts[i] for i in kept])
    arrays = _fill(forest, layout, ranges)
    return PackedBatch(
        input_ids=arrays["input_ids"][None],
        position_ids=arrays["position_ids"][None],
        tree=TreeShape(torch.from_numpy(layout.subtree_end), layout.spans, layout.blocks),
        rows=arrays["rows"],
        shared=SharedRows(arrays["pair_targets"], arrays["row_offsets"], arrays["pair_of_token"]),
        targets=arrays["targets"],
        sequence_ids=arrays["sequence_ids"],
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


def _loss_ranges(
    forest: TokenForest, layout: Layout, branches: Sequence[int], starts: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Start, end and sequence of ranges of positions, which in turn hold the loss tokens of each branch."""
    first = {run.node: run.start for run in layout.runs}
    ranges: list[tuple[int, int, int]] = []
    for sequence, (branch, start) in enumerate(zip(branches, starts)):
        own: list[tuple[int, int, int]] = []
        node, end = branch, forest.nodes[branch].end
        while node != -1 and end > start:
            begin = forest.nodes[node].start
            if end > begin:
                offset = first[node] - begin
                own.append((max(begin, start) + offset, end + offset, sequence))
            node, end = forest.nodes[node].parent, min(end, begin)
        ranges += reversed(own)
    return ranges


def _fill(forest: TokenForest, layout: Layout, ranges: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
    """The batch's int64 arrays, one-dimensional; the C++ side says what they hold (csrc/packing.h)."""
    tokens = len(layout.subtree_end)
    losses = sum(end - start for start, end, _ in ranges)
    sizes = {"input_ids": tokens, "position_ids": tokens, "row_offsets": losses + 1}
    for name in ("rows", "pair_targets", "pair_of_token", "targets", "sequence_ids"):
        sizes[name] = losses
    arrays = {name: torch.empty(size, dtype=torch.int64) for name, size in sizes.items()}
    rows, pairs = _C.fill_packed_arrays(
        np.array([(run.start, run.end, run.before, forest.nodes[run.node].start) for run in layout.runs]),
        [forest.nodes[run.node].tokens for run in layout.runs],
        np.array(ranges),
        tokens,
        {name: array.data_ptr() for name, array in arrays.items()},
    )
    arrays["rows"], arrays["row_offsets"] = arrays["rows"][:rows], arrays["row_offsets"][: rows + 1]
    arrays["pair_targets"] = arrays["pair_targets"][:pairs]
    return arrays
