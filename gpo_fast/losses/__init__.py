"""Fused losses: hidden states in, loss and gradients out, logits never materialised for the whole batch."""

from gpo_fast.losses.branches import BranchAdvantages, linear_branch_loss, merge_branches
from gpo_fast.losses.linear_logprob import linear_logprob
from gpo_fast.losses.policy import linear_policy_loss
from gpo_fast.losses.preference import linear_preference_loss
from gpo_fast.losses.sequences import LossOutput
from gpo_fast.losses.shared_rows import SharedRows

__all__ = [
    "BranchAdvantages",
    "LossOutput",
    "SharedRows",
    "linear_branch_loss",
    "linear_logprob",
    "linear_policy_loss",
    "linear_preference_loss",
    "merge_branches",
]
