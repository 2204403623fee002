"""Branches that share tokens: one merged pass gives the loss and the gradients of all branches one by one."""

from __future__ import annotations

import pytest
import torch

from gpo_fast.losses import linear_branch_loss, linear_policy_loss, merge_branches

WIDTH, VOCAB = 12, 40
# A trunk of 6 tokens; branches leave it after 2, 4 and 6 of them with 3, 5 and 2 tokens of their own.
LEAVES = [(2, 3), (4, 5), (6, 2)]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.detach() - exact.detach()).norm() / exact.detach().norm())


class Tree:
    """Row t's hidden state predicts its next token; a branch point predicts one for each child."""

    def __init__(self) -> None:
        # Rows: the trunk's tokens 0..5, then the own tokens of each branch. Entry (row, target) = one unique token.
        self.rows, self.branches = [list(range(6))], []
        for keep, own in LEAVES:
            first = sum(map(len, self.rows))
            self.rows.append(list(range(first, first + own)))
            self.branches.append((list(range(keep)), self.rows[-1]))
        self.hidden = torch.randn(sum(map(len, self.rows)), WIDTH, dtype=torch.float64)
        self.weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64) / 3
        edges: set[tuple[int, int]] = set()
        for trunk, own in self.branches:
            path = trunk + own
            edges.update(zip(path, path[1:]))
        self.entries = sorted(edges)
        sources = torch.tensor([source for source, _ in self.entries])
        self.row_offsets = torch.searchsorted(sources, torch.arange(self.hidden.shape[0] + 1))
        # Children of one row get distinct tokens.
        self.token_of = {entry: 7 * index % VOCAB for index, entry in enumerate(self.entries)}
        self.targets = torch.tensor([self.token_of[entry] for entry in self.entries])
        unique = len(self.entries)
        self.old, self.ref, self.rollout = (-3.5 + 0.6 * torch.randn(unique, dtype=torch.float64) for _ in range(3))

    def flatten(self):
        """(source row, unique id, branch) of every token of every branch."""
        index_of = {entry: index for index, entry in enumerate(self.entries)}
        return [
            (entry[0], index_of[entry], branch)
            for branch, (trunk, own) in enumerate(self.branches)
            for entry in zip(trunk + own, (trunk + own)[1:])
        ]


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("ppo", {}),
        ("grpo", {"epsilon_high": 0.3}),
        ("dapo", {"dual_clip": 1.5, "epsilon": 0.1}),
        ("dr_grpo", {"max_completion_length": 11}),
        ("cispo", {"epsilon_high": 0.3}),
    ],
)
@pytest.mark.parametrize("trainable", [False, True])
def test_merged_branches_equal_all_branches(loss_type: str, options: dict, trainable: bool) -> None:
    tree = Tree()
    rows, unique_ids, branch = (torch.tensor(column) for column in zip(*tree.flatten()))
    advantages = torch.randn(rows.shape[0], dtype=torch.float64)
    lengths = torch.bincount(branch)
    common = {"beta": 0.2, **options}
    common.pop("max_completion_length", None)

    leaves = [tree.hidden.clone().requires_grad_(), tree.weight.clone().requires_grad_(trainable)]
    one_by_one = linear_policy_loss(
        leaves[0][rows], leaves[1], tree.targets[unique_ids], loss_type=loss_type, advantages=advantages,
        sequence_ids=branch, old_logprobs=tree.old[unique_ids], ref_logprobs=tree.ref[unique_ids],
        rollout_logprobs=tree.rollout[unique_ids], **{"beta": 0.2, **options},
    )  # fmt: skip
    one_by_one.loss.backward()

    count, tokens = len(tree.branches), rows.shape[0]
    share = {
        "grpo": 1.0 / (lengths[branch] * count).double(),
        "dr_grpo": torch.full((tokens,), 1.0 / (count * 11), dtype=torch.float64),
    }.get(loss_type, torch.full((tokens,), 1.0 / tokens, dtype=torch.float64))
    merged_leaves = [tree.hidden.clone().requires_grad_(), tree.weight.clone().requires_grad_(trainable)]
    merged = linear_branch_loss(
        *merged_leaves, tree.targets, loss_type="cispo" if loss_type == "cispo" else "ppo",
        advantages=merge_branches(advantages, share, unique_ids, len(tree.entries)), row_offsets=tree.row_offsets,
        old_logprobs=tree.old, ref_logprobs=tree.ref, rollout_logprobs=tree.rollout, **common,
    )  # fmt: skip
    merged.loss.backward()
    assert relative_error(merged.loss, one_by_one.loss) < 1e-12
    for leaf, exact in zip(merged_leaves, leaves):
        if exact.requires_grad:
            assert relative_error(leaf.grad, exact.grad) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(3), torch.rand(2), torch.tensor([0, 1, 1]), 2), "must be"),
        ((torch.randn(3), -torch.rand(3) - 1, torch.tensor([0, 1, 1]), 2), "negative"),
        ((torch.randn(3), torch.rand(3), torch.tensor([0, 1, 2]), 2), "unique_ids"),
    ],
)
def test_wrong_values_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_branches(*arguments)


def test_losses_with_a_ratio_per_sequence_are_refused() -> None:
    tree = Tree()
    nothing = torch.zeros(len(tree.entries), dtype=torch.float64)
    advantages = merge_branches(nothing, nothing, torch.arange(len(tree.entries)), len(tree.entries))
    with pytest.raises(ValueError, match="gspo"):
        linear_branch_loss(tree.hidden, tree.weight, tree.targets, loss_type="gspo", advantages=advantages)
