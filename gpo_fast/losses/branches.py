"""Policy losses on tokens that several branches share, each trained once.

Branches b that pass through one token have advantages A_b and loss weights w_b (their normalisers included), and one
ratio r = exp(l - l_old), for they share the token's logprob and its old one. The clipped objective is positively
homogeneous in A for either sign of it, so two sums per token say all that there is to know:

    sum_b w_b min(r A_b, clip(r) A_b) = A+ min(r, 1 + epsilon_high) + A- max(r, 1 - epsilon)
    A+ = sum_b w_b max(A_b, 0)        A- = sum_b w_b min(A_b, 0)

With a dual clip, max(r, 1 - epsilon) is at most `dual_clip` where A- is its factor. CISPO is linear in A: it needs
A+ + A- alone. The KL term of a token has the weight W = sum_b w_b.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gpo_fast.losses.head import IGNORED
from gpo_fast.losses.linear_logprob import HeadInputs, logprobs_and_entropy
from gpo_fast.losses.policy import MAX_LOG_RATIO, KLEstimator, PolicyOptions, kl_estimate, ratio_metrics
from gpo_fast.losses.sequences import LossOutput, masked_mean


class BranchAdvantages(NamedTuple):
    """What the branches of each unique token want of it, (U,) each."""

    positive: Tensor  # A+ = sum of w max(A, 0)
    negative: Tensor  # A- = sum of w min(A, 0)
    weight: Tensor  # W = sum of w


def merge_branches(advantages: Tensor, weights: Tensor, unique_ids: Tensor, num_unique: int) -> BranchAdvantages:
    """Sum branch tokens into the unique tokens that they are, exactly.

    Args:
        advantages: (M,), of each token of each branch.
        weights: (M,), not negative: its weight in the loss, normalisers included, such as
            1 / (length of the branch * number of branches) for GRPO or 1 / (tokens of the batch) for DAPO.
        unique_ids: (M,) int64 in [0, num_unique): which unique token it is. Any order.
        num_unique: U.

    Raises:
        ValueError: for shapes that differ, negative weights, or ids out of range.
    """
    if not advantages.shape == weights.shape == unique_ids.shape or unique_ids.dim() != 1:
        raise ValueError(
            "advantages, weights and unique_ids must be (M,), got "
            f"{tuple(advantages.shape)}, {tuple(weights.shape)} and {tuple(unique_ids.shape)}"
        )
    if bool((weights < 0).any()):
        raise ValueError(f"weights must not be negative, got {float(weights.min())}")
    if unique_ids.numel() and not 0 <= int(unique_ids.min()) <= int(unique_ids.max()) < num_unique:
        raise ValueError(
            f"unique_ids must be in [0, {num_unique}), got {int(unique_ids.min())} to {int(unique_ids.max())}"
        )
    # A stable order makes the sums the same on every run and every device.
    order = torch.argsort(unique_ids, stable=True)
    edges = torch.arange(num_unique + 1, device=unique_ids.device)
    offsets = torch.searchsorted(unique_ids[order], edges)

    def total(values: Tensor) -> Tensor:
        return torch.segment_reduce(values[order], "sum", offsets=offsets, initial=0.0)

    return BranchAdvantages(
        total(weights * advantages.clamp(min=0)), total(weights * advantages.clamp(max=0)), total(weights)
    )


def linear_branch_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_type: Literal["ppo", "cispo"],
    advantages: BranchAdvantages,
    row_offsets: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl: KLEstimator = "k3",
    importance_cap: float = 2.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> LossOutput:
    """The loss that `linear_policy_loss` gives on all branches, from their unique tokens. Minimise `loss`.

    Args:
        hidden, weight, targets, row_offsets and the head's options: as in `linear_logprob`: (U, H) and (U,), or, where
            rows have several targets (branch points), (T, H), (U,) and row_offsets (T + 1,).
        loss_type: "ppo" stands for every loss with a clipped ratio per token (ppo, grpo, bnpo, dapo, dr_grpo): they
            differ in their normalisers, which are in the weights. "gspo" and "rloo" have a ratio per sequence, which
            no sum over branches can carry.
        advantages: (U,) each, from `merge_branches`. The loss is the plain sum over the tokens.
        the others: per target, (U,), as in `linear_policy_loss`. A shared token has one of each.

    Raises:
        ValueError: for a value or a shape that does not fit; the message names it.
    """
    if loss_type not in ("ppo", "cispo"):
        raise ValueError(f"loss_type of merged branches must be ppo or cispo, got {loss_type!r}")
    if beta != 0.0 and ref_logprobs is None:
        raise ValueError(f"beta = {beta} needs ref_logprobs; pass them, or beta=0")
    for name, value in (
        ("advantages", advantages.positive),
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("rollout_logprobs", rollout_logprobs),
    ):
        if value is not None and value.shape != targets.shape:
            raise ValueError(f"{name} must have the shape {tuple(targets.shape)} of targets, got {tuple(value.shape)}")
    high = epsilon if epsilon_high is None else epsilon_high
    options = PolicyOptions(
        loss_type=loss_type,
        epsilon=epsilon,
        epsilon_high=high,
        dual_clip=dual_clip,
        kl=kl,
        importance_cap=importance_cap,
    )
    head = HeadInputs(weight, bias, temperature, softcap, lora, tp_group, vocab_start)
    new, entropy = logprobs_and_entropy(
        hidden, targets, head, row_offsets=row_offsets, want_entropy=True, entropy_needs_grad=False
    )
    mask = targets != IGNORED
    old = new.detach() if old_logprobs is None else torch.where(mask, old_logprobs.to(new.dtype), 0.0)
    log_ratio = (new - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    positive, negative, total_weight = (values.to(new.dtype) for values in advantages)
    if loss_type == "cispo":
        terms = -log_ratio.detach().exp().clamp(max=1 + high) * (positive + negative) * new
    else:
        terms = _clipped_terms(options, log_ratio.exp(), positive, negative)
    metrics = ratio_metrics(log_ratio.detach(), mask, options)
    metrics["entropy"] = entropy.detach().sum() / mask.sum().clamp(min=1)
    if rollout_logprobs is not None:
        mismatch = torch.where(mask, old.detach() - rollout_logprobs.to(new.dtype), 0.0)
        terms = terms * mismatch.clamp(max=MAX_LOG_RATIO).exp().clamp(max=importance_cap)
    if ref_logprobs is not None:
        divergence = kl_estimate(kl, new, torch.where(mask, ref_logprobs.to(new.dtype), 0.0))
        metrics["kl"] = masked_mean(divergence.detach(), mask)
        if beta != 0.0:
            terms = terms + beta * total_weight * divergence
    return LossOutput(torch.where(mask, terms, 0.0).sum(), new.detach(), entropy.detach(), metrics)


def _clipped_terms(options: PolicyOptions, ratio: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    raised = ratio.clamp(min=1 - options.epsilon, max=options.dual_clip)
    return -(positive * ratio.clamp(max=1 + options.epsilon_high) + negative * raised)
