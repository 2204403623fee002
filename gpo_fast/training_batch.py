"""Training rows as batches for one forward pass: one after the other and padded, or as trees that share tokens.

Both kinds give the losses the same thing, so loss and gradients do not depend on which is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpo_fast.experience import TrainingRow, inseparable
from gpo_fast.forest import TokenForest
from gpo_fast.losses import SharedRows
from gpo_fast.packing import pack_forest, plan_microbatches
from gpo_fast.tree_attention import TreeShape, tree_attention_of


@dataclass
class TrainingBatch:
    """B x W tokens and, for T loss tokens, what a loss needs beside the hidden states."""

    rows: list[TrainingRow]  # length S
    input_ids: Tensor  # int64 [B, W]
    position_ids: Tensor  # int64 [B, W]
    loss_rows: Tensor  # int64: the places in B x W that have a loss; their hidden states go to the head
    targets: Tensor  # int64 [T], sequence by sequence
    sequence_ids: Tensor  # int64 [T]
    shared: SharedRows | None = None  # None: loss token t belongs to the t-th hidden state
    tree: TreeShape | None = None  # None: ordinary causal attention

    @property
    def advantages(self) -> Tensor:
        """float32 [S], or [T] where a critic has given one for each token."""
        if all(row.token_advantages is None for row in self.rows):
            return self.targets.new_tensor([row.advantage for row in self.rows], dtype=torch.float32)
        return self.per_token("advantage_of_tokens")

    @property
    def desirable(self) -> Tensor:
        """bool [S]: the better ones of their pairs."""
        return torch.tensor([row.desirable for row in self.rows], device=self.targets.device)

    def per_token(self, name: str) -> Tensor:
        """float32 [T]: an attribute of the rows that holds a number for each token, such as `sampling_logprobs`."""
        flat = [value for row in self.rows for value in getattr(row, name)]
        return self.targets.new_tensor(flat, dtype=torch.float32)

    @property
    def is_off_policy(self) -> bool:
        """Whether another policy than the one that is trained sampled any of the rows."""
        return any(row.old_logprobs is not None for row in self.rows)

    @property
    def lengths(self) -> list[int]:
        """Loss tokens of each row."""
        return [len(row.token_ids) for row in self.rows]

    @property
    def row_of_token(self) -> Tensor:
        """int64 [T]: the row of the hidden states that predicts each loss token."""
        if self.shared is not None:
            return self.shared.row_of_token()
        return torch.arange(len(self.targets), device=self.targets.device)

    def attention(self, model: Any) -> AbstractContextManager[None]:
        """The attention of this batch; forward and backward belong inside."""
        return nullcontext() if self.tree is None else tree_attention_of(model)

    def hidden(self, decoder: Any) -> Tensor:
        """The decoder's hidden states that have a loss, [rows, H]."""
        options = {} if self.tree is None else {"tree": self.tree}
        hidden: Tensor = decoder(
            input_ids=self.input_ids, position_ids=self.position_ids, use_cache=False, **options
        ).last_hidden_state
        return hidden.flatten(0, 1)[self.loss_rows]


def padded_batches(
    rows: Sequence[TrainingRow], max_tokens: int, device: torch.device | str = "cpu"
) -> list[TrainingBatch]:
    """Rows of similar length together; a batch holds at most `max_tokens` tokens with padding, or one row or pair."""
    batches: list[list[TrainingRow]] = []
    width = 0
    for unit in sorted(inseparable(rows), key=lambda unit: max(map(_length, unit)), reverse=True):
        if not batches or width * (len(batches[-1]) + len(unit)) > max_tokens:
            batches.append([])
            width = max(map(_length, unit))
        batches[-1] += unit
    return [_padded_batch([batch[i] for i in _chosen_first(batch)], device) for batch in batches]


def _padded_batch(rows: list[TrainingRow], device: torch.device | str) -> TrainingBatch:
    width = max(map(_length, rows))
    # Padding stands on the right, so the causal mask alone keeps it from being seen: no mask is needed.
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    picked = []
    for i, row in enumerate(rows):
        input_ids[i, : _length(row)] = torch.tensor([*row.context_ids, *row.token_ids])
        picked.append(i * width + torch.arange(len(row.context_ids) - 1, _length(row) - 1))
    counts = torch.tensor([len(row.token_ids) for row in rows])
    return TrainingBatch(
        rows,
        input_ids.to(device),
        torch.arange(width, device=device).expand(len(rows), -1),
        torch.cat(picked).to(device),
        torch.tensor([t for row in rows for t in row.token_ids], device=device),
        torch.repeat_interleave(counts).to(device),
    )


def tree_batches(
    rows: Sequence[TrainingRow], forest: TokenForest, max_tokens: int, device: torch.device | str = "cpu"
) -> list[TrainingBatch]:
    """Rows as trees; a batch holds at most `max_tokens` unique tokens, or one row or pair.

    Args:
        forest: the one that the rows' nodes belong to. A row without a node shares nothing.

    Raises:
        ValueError: a row's tokens are not those of its node.
    """
    forest, branches = _branches(rows, forest)
    together = [place if row.pair is None else -1 - row.pair for place, row in enumerate(rows)]
    batches = []
    for part in plan_microbatches(forest, branches, max_tokens, together):
        places = [part[i] for i in _chosen_first([rows[p] for p in part])]
        packed = pack_forest(forest, [branches[p] for p in places])
        packed = (packed.filled() if torch.device(device).type == "cuda" else packed).to(device)
        batches.append(
            TrainingBatch(
                [rows[places[b]] for b in packed.branches],
                packed.input_ids,
                packed.position_ids,
                packed.rows,
                packed.targets,
                packed.sequence_ids,
                packed.shared,
                packed.tree,
            )
        )
    return batches


def _branches(rows: Sequence[TrainingRow], forest: TokenForest) -> tuple[TokenForest, list[int]]:
    """The forest with the rows that have no node in it as trees of their own, and each row's node."""
    whole = TokenForest()
    whole.nodes = [*forest.nodes]
    branches = []
    for row in rows:
        if row.node is None:
            branches.append(whole.branch(whole.add_prompt(row.context_ids), len(row.context_ids), row.token_ids))
            continue
        node = whole.nodes[row.node] if 0 <= row.node < len(forest.nodes) else None
        if node is None or (node.start, node.token_ids) != (len(row.context_ids), row.token_ids):
            raise ValueError(f"a training row's tokens are not those of its node {row.node}: it is of another forest")
        branches.append(row.node)
    return whole, branches


def _chosen_first(rows: Sequence[TrainingRow]) -> list[int]:
    """The order of a batch: as they are; of pairs the better ones, then the worse ones in the same order."""
    return sorted(range(len(rows)), key=lambda i: (not rows[i].desirable, -1 if (p := rows[i].pair) is None else p))


def _length(row: TrainingRow) -> int:
    return len(row.context_ids) + len(row.token_ids)
