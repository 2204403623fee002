"""Preference losses on sequence log-probabilities, straight from hidden states.

With L the sum of a sequence's log-probabilities, M their mean, w and l the chosen and the rejected sequence of a pair,
and s(x) = (1 - label_smoothing) log sigmoid(x) + label_smoothing log sigmoid(-x):

    dpo    -s(beta ((L_w - Lref_w) - (L_l - Lref_l)))       arXiv 2305.18290
    simpo  -s(beta (M_w - M_l) - gamma)                     arXiv 2405.14734
    orpo   -M over all chosen tokens - beta log sigmoid(log odds ratio of exp(M_w), exp(M_l))   arXiv 2403.07691
    kto    w (1 - sigmoid(beta (+-(L - Lref - reference_kl))))   arXiv 2402.01306, + for a desirable sequence
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from gpo_fast.losses.head import IGNORED
from gpo_fast.losses.linear_logprob import HeadInputs
from gpo_fast.losses.sequences import LossOutput, Sequences, count_or, sequences_of
from gpo_fast.losses.shared_rows import SharedRows, token_logprobs

PreferenceLoss = Literal["dpo", "kto", "simpo", "orpo"]


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_type: PreferenceLoss,
    sequence_ids: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    desirable: Tensor | None = None,
    reference_kl: float | Tensor = 0.0,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    num_examples: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    return_entropy: bool = True,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    shared: SharedRows | None = None,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> LossOutput:
    """A preference loss straight from hidden states; the formulas are at the head of this module.

    Args:
        hidden, weight, targets, bias, temperature, softcap, lora, tp_group, vocab_start: as in `linear_logprob`;
            (T, H) and (T,) with `sequence_ids` (T,) ascending from 0, or (B, T, H) and (B, T) with a sequence in each
            row. The targets of the context are -100.
        loss_type: of "dpo", "simpo" and "orpo", the first half of the sequences are the chosen ones and the second
            half, in the same order, the rejected ones. "kto" takes single sequences.
        ref_logprobs: for "dpo" and "kto": per token, of the shape of `targets`, or their sums per sequence, (S,).
        desirable: for "kto": (S,) bool.
        reference_kl: for "kto": the estimate of KL(policy || reference) that the sequences are measured against, not
            negative. No gradient flows to it.
        beta: strength; of "orpo" the weight of the odds-ratio term.
        gamma: the margin of "simpo", the paper's gamma (TRL's `simpo_gamma`).
        label_smoothing: probability that a label is wrong, in [0, 0.5), for "dpo" and "simpo".
        desirable_weight, undesirable_weight: for "kto".
        num_examples, num_tokens: replace the number of pairs (of sequences for "kto") and, in the likelihood term
            of "orpo", of chosen tokens, as the counts of `linear_policy_loss` do.
        shared: for the tokens of a packed forest (`pack_forest`): hidden is then (R, H), targets stays (T,), and
            each distinct pair of row and target is computed once.

    Returns:
        LossOutput with the metrics rewards_chosen, rewards_rejected (means of beta times the log-ratio, of beta
        times the mean log-probability without a reference), margin and accuracy (pairs only), and entropy.

    Raises:
        ValueError: for a value or a shape that does not fit; the message names it.
    """
    _check_options(loss_type, beta, label_smoothing)
    sequences = sequences_of(targets, sequence_ids)
    if loss_type != "kto" and sequences.count % 2:
        raise ValueError(f"{loss_type} needs pairs: the number of sequences must be even, got {sequences.count}")
    logprobs, entropy = token_logprobs(
        hidden,
        targets,
        HeadInputs(weight, bias, temperature, softcap, lora, tp_group, vocab_start),
        shared,
        want_entropy=return_entropy,
        entropy_needs_grad=False,
    )
    mask = (targets != IGNORED).reshape(-1)
    sums = sequences.sum(logprobs.reshape(-1))
    lengths = sequences.sum(mask.to(sums.dtype))
    if loss_type in ("dpo", "kto"):
        scores = sums - _reference_sums(ref_logprobs, targets, sequences, mask, loss_type).to(sums.dtype)
    else:
        scores = sums / lengths.clamp(min=1.0)

    if loss_type == "kto":
        loss, metrics = _kto(scores, desirable, reference_kl, beta, desirable_weight, undesirable_weight, num_examples)
    else:
        chosen, rejected = scores.chunk(2)
        if loss_type == "orpo":
            # log(p / (1 - p)) of the mean token probability, with log(1 - p) = log(-expm1(log p)).
            log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
            terms = -beta * F.logsigmoid(log_odds)
        else:
            margin = beta * (chosen - rejected) - (gamma if loss_type == "simpo" else 0.0)
            terms = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
        pairs = count_or(num_examples, torch.tensor(chosen.shape[0]), sums, "num_examples")
        loss = terms.sum() / pairs
        if loss_type == "orpo":
            half = chosen.shape[0]
            loss = loss - sums[:half].sum() / count_or(num_tokens, lengths[:half].sum(), sums, "num_tokens")
        metrics = _pair_metrics(beta * chosen.detach(), beta * rejected.detach())
    if return_entropy:
        metrics["entropy"] = entropy.detach().sum() / mask.sum().clamp(min=1)
    return LossOutput(loss, logprobs.detach(), entropy.detach() if return_entropy else None, metrics)


def _kto(
    scores: Tensor,
    desirable: Tensor | None,
    reference_kl: float | Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    num_examples: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    if desirable is None or desirable.dtype != torch.bool or desirable.shape != scores.shape:
        found = None if desirable is None else (desirable.dtype, tuple(desirable.shape))
        raise ValueError(f"kto needs desirable, bool of shape ({scores.shape[0]},); got {found}")
    baseline = torch.as_tensor(reference_kl, dtype=scores.dtype, device=scores.device).detach()
    if baseline.dim() != 0 or not bool(baseline >= 0):
        raise ValueError(f"reference_kl must be one number, not negative; got {reference_kl}")
    good = desirable.to(scores.dtype)
    sign = 2 * good - 1
    importance = desirable_weight * good + undesirable_weight * (1 - good)
    terms = importance * (1 - torch.sigmoid(beta * sign * (scores - baseline)))
    loss = terms.sum() / count_or(num_examples, torch.tensor(scores.shape[0]), scores, "num_examples")
    rewards = beta * scores.detach()
    return loss, {
        "rewards_chosen": _mean_where(rewards, desirable),
        "rewards_rejected": _mean_where(rewards, ~desirable),
    }


def _pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        "rewards_chosen": chosen.mean(),
        "rewards_rejected": rejected.mean(),
        "margin": (chosen - rejected).mean(),
        "accuracy": (chosen > rejected).to(chosen.dtype).mean(),
    }


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Maechler, 2012); x = 0 counts as the number before it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    small = x > -0.6931472
    # Each branch is fed a harmless number where the other one is taken: 0 * inf would be NaN in the gradient.
    near = torch.log(-torch.expm1(torch.where(small, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(small, -1.0, x)))
    return torch.where(small, near, far)


def _reference_sums(
    ref_logprobs: Tensor | None, targets: Tensor, sequences: Sequences, mask: Tensor, loss_type: str
) -> Tensor:
    if ref_logprobs is None:
        raise ValueError(f"{loss_type} needs ref_logprobs, per token or summed per sequence")
    if ref_logprobs.shape == targets.shape:
        return sequences.sum(torch.where(mask, ref_logprobs.reshape(-1), 0.0).detach())
    if ref_logprobs.shape == (sequences.count,):
        return ref_logprobs.detach()
    raise ValueError(
        f"ref_logprobs must be per token {tuple(targets.shape)} or per sequence ({sequences.count},), got "
        f"{tuple(ref_logprobs.shape)}"
    )


def _check_options(loss_type: str, beta: float, label_smoothing: float) -> None:
    if loss_type not in get_args(PreferenceLoss):
        raise ValueError(f"loss_type must be one of {', '.join(get_args(PreferenceLoss))}; got {loss_type!r}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing and loss_type not in ("dpo", "simpo"):
        raise ValueError(f"label_smoothing is defined for dpo and simpo, not for {loss_type}")
