"""Preference losses on sequence log-probabilities, straight from hidden states.

With L the sum of a sequence's log-probabilities, M their mean, w and l the chosen and the rejected sequence of a pair,
and s(x) = (1 - label_smoothing) log sigmoid(x) + label_smoothing log sigmoid(-x):

    dpo    -s(beta ((L_w - Lref_w) - (L_l - Lref_l)))       arXiv 2305.18290
    simpo  -s(beta (M_w - M_l) - gamma)                     arXiv 2405.14734
    orpo   -M over all chosen tokens - beta log sigmoid(log odds ratio of exp(M_w), exp(M_l))   arXiv 2403.07691
    kto    w (1 - sigmoid(beta (+-(L - Lref - reference_kl))))   arXiv 2402.01306, + for a desirable sequence
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from gpo_fast.losses import one_pass
from gpo_fast.losses.head import IGNORED
from gpo_fast.losses.linear_logprob import HeadInputs
from gpo_fast.losses.sequences import LossOutput, Sequences, count_or, sequences_of
from gpo_fast.losses.shared_rows import SharedRows, prepare_tokens, tokens_in_two_passes

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
    prepared = prepare_tokens(
        hidden, targets, HeadInputs(weight, bias, temperature, softcap, lora, tp_group, vocab_start), shared
    )
    like = hidden.new_empty((), dtype=prepared.wide_dtype)
    mask = (targets != IGNORED).reshape(-1)
    lengths = sequences.sum(mask.to(like.dtype))
    half = sequences.count // 2
    reference, labels = None, None
    if loss_type in ("dpo", "kto"):
        reference = _reference_sums(ref_logprobs, targets, sequences, mask, loss_type).to(like.dtype)
    if loss_type == "kto":
        labels = _labels(desirable, reference_kl, desirable_weight, undesirable_weight, like, sequences.count)
        examples = count_or(num_examples, torch.tensor(sequences.count), like, "num_examples")
    else:
        examples = count_or(num_examples, torch.tensor(half), like, "num_examples")
    chosen_tokens = count_or(num_tokens, lengths[:half].sum(), like, "num_tokens")

    def scores_of(sums: Tensor, index: Tensor) -> Tensor:
        return sums / lengths[index].clamp(min=1.0) if reference is None else sums - reference[index]

    def loss_of_sequences(sums: Tensor, index: Tensor) -> Tensor:
        """Of some sequences' sums of log-probabilities; of pairs, all the chosen ones come first."""
        scores = scores_of(sums, index)
        if labels is not None:
            return _kto_terms(scores, labels.at(index), beta).sum() / examples
        chosen, rejected = scores.chunk(2)
        if loss_type == "orpo":
            likelihood = sums[: chosen.shape[0]].sum() / chosen_tokens
            return _odds_ratio_terms(chosen, rejected, beta).sum() / examples - likelihood
        margin = beta * (chosen - rejected) - (gamma if loss_type == "simpo" else 0.0)
        terms = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
        return terms.sum() / examples

    in_pairs = loss_type != "kto"
    # A pair is spoken of by its chosen sequence.
    whole = sequences.ids % half if in_pairs and half else sequences.ids

    def loss_of_tokens(logprobs: Tensor, _: Tensor, at: Tensor) -> Tensor:
        """Of some whole pairs' tokens, pair by pair, or of some whole sequences' tokens."""
        units, place = torch.unique_consecutive(whole[at], return_inverse=True)
        if not in_pairs:
            return loss_of_sequences(_sums(logprobs, place, units.shape[0]), units)
        sums = _sums(logprobs, 2 * place + sequences.ids[at] // half, 2 * units.shape[0])
        return loss_of_sequences(sums.reshape(-1, 2).t().flatten(), torch.cat([units, units + half]))

    wants = {"want_entropy": return_entropy, "entropy_needs_grad": False}
    once = one_pass.token_loss(prepared, targets, shared, loss_of_tokens, whole=whole, constants=[reference], **wants)
    logprobs, entropy = tokens_in_two_passes(prepared, targets, shared, **wants) if once is None else once[:2]
    every = torch.arange(sequences.count, device=targets.device)
    sums = sequences.sum(logprobs)
    loss = loss_of_sequences(sums, every)
    if once is not None:
        loss = once.attach(loss)

    rewards = beta * scores_of(sums.detach(), every)
    if labels is None:
        metrics = _pair_metrics(*rewards.chunk(2))
    else:
        metrics = {
            "rewards_chosen": _mean_where(rewards, labels.desirable),
            "rewards_rejected": _mean_where(rewards, ~labels.desirable),
        }
    if return_entropy:
        metrics["entropy"] = entropy.detach().sum() / mask.sum().clamp(min=1)
    seen_entropy = entropy.detach().reshape(targets.shape) if return_entropy else None
    return LossOutput(loss, logprobs.detach().reshape(targets.shape), seen_entropy, metrics)


def _sums(values: Tensor, group: Tensor, count: int) -> Tensor:
    """(t,) -> (count,): sums over the ascending `group`."""
    offsets = torch.searchsorted(group, torch.arange(count + 1, device=group.device))
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0)


class Labels(NamedTuple):
    """What "kto" is told of its sequences."""

    desirable: Tensor  # (S,) bool
    importance: Tensor  # (S,)
    baseline: Tensor  # scalar

    def at(self, index: Tensor) -> Labels:
        """Those of some sequences."""
        return Labels(self.desirable[index], self.importance[index], self.baseline)


def _labels(
    desirable: Tensor | None,
    reference_kl: float | Tensor,
    desirable_weight: float,
    undesirable_weight: float,
    like: Tensor,
    count: int,
) -> Labels:
    if desirable is None or desirable.dtype != torch.bool or desirable.shape != (count,):
        found = None if desirable is None else (desirable.dtype, tuple(desirable.shape))
        raise ValueError(f"kto needs desirable, bool of shape ({count},); got {found}")
    baseline = torch.as_tensor(reference_kl, dtype=like.dtype, device=like.device).detach()
    if baseline.dim() != 0 or not bool(baseline >= 0):
        raise ValueError(f"reference_kl must be one number, not negative; got {reference_kl}")
    good = desirable.to(like.dtype)
    return Labels(desirable, desirable_weight * good + undesirable_weight * (1 - good), baseline)


def _kto_terms(scores: Tensor, labels: Labels, beta: float) -> Tensor:
    sign = 2 * labels.desirable.to(scores.dtype) - 1
    return labels.importance * (1 - torch.sigmoid(beta * sign * (scores - labels.baseline)))


def _odds_ratio_terms(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """log(p / (1 - p)) of the mean token probability, with log(1 - p) = log(-expm1(log p))."""
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -beta * F.logsigmoid(log_odds)


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
