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
from gpo_fast.rollout.memory import Reused
from gpo_fast.tree_attention import TreeShape

_memory = Reused()


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
    nodes = np.array([(node.parent, node.start, node.end) for node in forest.nodes], dtype=np.int64).reshape(-1, 3)
    layout = _C.PackedLayout(nodes, branches, loss_starts)
    arrays = _arrays(layout)
    rows, pairs = layout.fill(
        [node.tokens for node in forest.nodes], {name: array.data_ptr() for name, array in arrays.items()}
    )
    return PackedBatch(
        input_ids=arrays["input_ids"][None],
        position_ids=arrays["position_ids"][None],
        tree=TreeShape(arrays["subtree_end"], layout.spans, layout.blocks),
        rows=arrays["rows"][:rows],
        shared=SharedRows(arrays["pair_targets"][:pairs], arrays["row_offsets"][: rows + 1], arrays["pair_of_token"]),
        targets=arrays["targets"],
        sequence_ids=arrays["sequence_ids"],
        branches=layout.kept,
        padded_tokens=layout.padded_tokens,
    )


def _arrays(layout: _C.PackedLayout) -> dict[str, Tensor]:
    """Room for what csrc/packing.h names, one-dimensional: int64, and int32 for two.

    All in one block, that of an earlier batch if nothing is on it any more.
    """
    tokens, losses = layout.tokens, layout.losses
    sizes = {"input_ids": tokens, "position_ids": tokens, "row_offsets": losses + 1}
    sizes |= dict.fromkeys(("rows", "pair_targets", "pair_of_token", "targets", "sequence_ids"), losses)
    sizes |= dict.fromkeys(("subtree_end", "scratch"), tokens // 2 + 1)
    block = _memory.empty(sum(sizes.values()), torch.int64)
    arrays = dict(zip(sizes, block.split(list(sizes.values()))))
    arrays["subtree_end"] = arrays["subtree_end"].view(torch.int32)[:tokens]
    return arrays
