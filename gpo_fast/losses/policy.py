"""Policy losses on log-probabilities, and `linear_policy_loss`, which computes those from hidden states.

With l the new log-probability of a token, r = exp(l - l_old) its ratio, A its advantage and w its weight:

    awr      -w exp(A / awr_beta) l                        advantage-weighted regression (GPO, Theorem 5.3)
    ppo      -w min(r A, clip(r) A), dual clip for A < 0   arXiv 1707.06347, 1912.09729
    grpo     the same, mean over each sequence, then mean over sequences   arXiv 2402.03300
    bnpo     the same, mean over the tokens of the batch   (the normaliser of TRL's "bnpo")
    dapo     the same, mean over all tokens, asymmetric clip   arXiv 2503.14476
    dr_grpo  the same, divided by sequences * max_completion_length   arXiv 2503.20783
    gspo     r is the geometric mean of its sequence's ratios, normalised as grpo   arXiv 2507.18071
    cispo    -w stop_gradient(min(r, 1 + epsilon_high)) A l, mean over all tokens   arXiv 2506.13585
    rloo     r is the product of its sequence's ratios, mean over sequences   arXiv 2402.14740

The expensive part is the log-probabilities; everything here is vector arithmetic on T numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gpo_fast.losses import one_pass, token_loss
from gpo_fast.losses.head import IGNORED
from gpo_fast.losses.linear_logprob import HeadInputs
from gpo_fast.losses.sequences import LossOutput, Sequences, count_or, masked_mean, sequences_of
from gpo_fast.losses.shared_rows import SharedRows, prepare_tokens, tokens_in_two_passes

PolicyLoss = Literal["awr", "ppo", "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"]
KLEstimator = Literal["k1", "k2", "k3"]

# exp(20) is 5e8: a ratio beyond it carries no information, only overflow. The gradient is zero where it is
# clamped.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyOptions:
    """The numbers of a policy loss; see `linear_policy_loss` for each."""

    loss_type: PolicyLoss
    epsilon: float
    epsilon_high: float
    dual_clip: float | None = None
    kl: KLEstimator = "k3"
    awr_beta: float = 1.0
    awr_max_exponent: float = 5.0
    importance_cap: float = 2.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(PolicyLoss):
            raise ValueError(f"loss_type must be one of {', '.join(get_args(PolicyLoss))}; got {self.loss_type!r}")
        if self.kl not in get_args(KLEstimator):
            raise ValueError(f"kl must be one of {', '.join(get_args(KLEstimator))}; got {self.kl!r}")
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon must be in [0, 1), got {self.epsilon}")
        if self.epsilon_high < 0:
            raise ValueError(f"epsilon_high must not be negative, got {self.epsilon_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1 or None, got {self.dual_clip}")
        if not self.awr_beta > 0:
            raise ValueError(f"awr_beta must be positive, got {self.awr_beta}")
        if not self.importance_cap > 0:
            raise ValueError(f"importance_cap must be positive, got {self.importance_cap}")
        length = self.max_completion_length
        if self.loss_type == "dr_grpo" and (length is None or length < 1):
            raise ValueError(f"dr_grpo needs max_completion_length, at least 1; got {length}")


@dataclass(frozen=True)
class Normalisers:
    """What the sums of a loss are divided by."""

    sequences: Tensor  # scalar
    tokens: Tensor  # scalar


class TokenInputs(NamedTuple):
    """What the loss of a token is made of beside its log-probability and its entropy; (T,) each, or absent."""

    advantage: Tensor
    share: Tensor  # of the token's term in the loss: 1 / normaliser, times its weight
    old: Tensor | None  # None: on-policy
    ref: Tensor | None
    rollout: Tensor | None
    entropy_share: Tensor | None  # of the token's entropy in the loss

    def at(self, index: Tensor) -> TokenInputs:
        """Those of some tokens."""
        return TokenInputs(*(None if values is None else values[index] for values in self))  # type: ignore[arg-type]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_type: PolicyLoss,
    advantages: Tensor,
    sequence_ids: Tensor | None = None,
    step_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl: KLEstimator = "k3",
    awr_beta: float = 1.0,
    awr_max_exponent: float = 5.0,
    importance_cap: float = 2.0,
    max_completion_length: int | None = None,
    entropy_coef: float = 0.0,
    return_entropy: bool = True,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    shared: SharedRows | None = None,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> LossOutput:
    """A policy-gradient loss straight from hidden states. Minimise `loss`.

    Args:
        hidden, weight, targets, bias, temperature, softcap, lora, tp_group, vocab_start: as in `linear_logprob`;
            (T, H) and (T,), or (B, T, H) and (B, T), where each row of the batch is one sequence.
            Targets of -100 are ignored.
        loss_type: see the head of this module for the formulas.
        advantages: (number of steps,) if `step_ids` is given; else per token if it has the shape of
            `targets`; else per sequence, (S,). "rloo" takes them per sequence only.
        sequence_ids: (T,) int64, ascending from 0, for flat rows; default: all rows are one sequence.
        step_ids: int64 of the shape of `targets`: the step of each token in one numbering for the whole
            batch. Ignored rows may have any number.
        old_logprobs: of the shape of `targets`: log-probabilities under the policy that the ratio is taken
            against. None: on-policy; the ratio is 1 and carries the gradient.
        ref_logprobs: of the shape of `targets`, for the KL term `beta * kl(l, l_ref)`: with d = l_ref - l,
            "k1" is -d, "k2" is d**2 / 2 and "k3" is exp(d) - d - 1 (exponent and gradient clamped at 20).
        rollout_logprobs: of the shape of `targets`: what the sampler recorded, where it differs from the
            trainer. The policy term of a token is multiplied by min(exp(l_old - l_rollout), importance_cap):
            truncated importance sampling. The KL and entropy terms are not.
        weights: of the shape of `targets`: multiplies all terms of a token. The counts below are not
            weighted.
        num_sequences, num_tokens: replace the batch's own number of sequences / of tokens in the normaliser.
            Under gradient accumulation pass the numbers of all micro-batches together and add up the losses;
            under data parallelism, where gradients are averaged, the global number divided by the number of
            ranks.
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high]; None: the same as
            epsilon.
        dual_clip: where A < 0, the policy term is at most dual_clip * |A|; greater than 1.
        beta, kl: weight and estimator of the KL term. It is averaged over tokens as the policy term is;
            "rloo" takes its mean over each sequence.
        awr_beta, awr_max_exponent: "awr" weighs a token with exp(min(A / awr_beta, awr_max_exponent)). Where
            the exponent is clamped, no gradient flows to the advantages.
        max_completion_length: of "dr_grpo".
        entropy_coef: the loss gets minus this times the mean (weighted) entropy of the tokens.
        return_entropy: compute the entropies even where the loss does not need them.
        shared: for the tokens of a packed forest (`pack_forest`): hidden is then (R, H), targets stays (T,), and
            each distinct pair of row and target is computed once.

    Returns:
        LossOutput with the metrics ratio_mean, clip_fraction_low, clip_fraction_high, approx_kl (between the
        old and the new policy, k3), and, where they exist, kl (to the reference), entropy and
        importance_weight_mean. All are means over the tokens of this batch.

    Raises:
        ValueError: for a value or a shape that does not fit; the message names it.
    """
    options = PolicyOptions(
        loss_type=loss_type,
        epsilon=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        dual_clip=dual_clip,
        kl=kl,
        awr_beta=awr_beta,
        awr_max_exponent=awr_max_exponent,
        importance_cap=importance_cap,
        max_completion_length=max_completion_length,
    )
    if beta != 0.0 and ref_logprobs is None:
        raise ValueError(f"beta = {beta} needs ref_logprobs; pass them, or beta=0")
    for name, value in (
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("rollout_logprobs", rollout_logprobs),
        ("weights", weights),
        ("step_ids", step_ids),
    ):
        if value is not None and value.shape != targets.shape:
            raise ValueError(f"{name} must have the shape {tuple(targets.shape)} of targets, got {tuple(value.shape)}")
    sequences = sequences_of(targets, sequence_ids)
    advantage = _token_advantages(advantages, targets, sequences, step_ids, loss_type)

    needed = targets
    if weights is not None and loss_type not in ("gspo", "rloo"):
        # A token without weight adds nothing; the sequence ratios of the other two losses are still made of
        # it.
        needed = torch.where(weights == 0, IGNORED, targets)
    prepared = prepare_tokens(
        hidden, needed, HeadInputs(weight, bias, temperature, softcap, lora, tp_group, vocab_start), shared
    )
    mask = (targets != IGNORED).reshape(-1)
    present = (needed != IGNORED).reshape(-1)
    like = hidden.new_empty((), dtype=prepared.wide_dtype)

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(present, values.reshape(-1).to(like.dtype), 0.0)

    normalisers = Normalisers(
        count_or(num_sequences, torch.tensor(sequences.count), like, "num_sequences"),
        count_or(num_tokens, mask.sum(), like, "num_tokens"),
    )
    token_weight = present.to(like.dtype) if weights is None else flat(weights)
    assert token_weight is not None
    tokens = TokenInputs(
        advantage.to(like.dtype),
        _token_share(options, sequences, mask, normalisers) * token_weight,
        flat(old_logprobs),
        flat(ref_logprobs),
        flat(rollout_logprobs),
        None if entropy_coef == 0.0 else entropy_coef * token_weight / normalisers.tokens,
    )

    def loss_of(logprobs: Tensor, entropies: Tensor, at: Tensor) -> Tensor:
        every = torch.ones_like(at, dtype=torch.bool)
        return _loss(options, beta, logprobs, entropies, tokens.at(at), sequences.at(at), every)

    want_entropy = return_entropy or entropy_coef != 0.0
    wants = {"want_entropy": want_entropy, "entropy_needs_grad": entropy_coef != 0.0 and torch.is_grad_enabled()}
    needs_sequences = loss_type in ("gspo", "rloo")
    once = one_pass.token_loss(
        prepared, needed, shared, loss_of, whole=sequences.ids if needs_sequences else None, constants=tokens, **wants
    )
    new, entropy = tokens_in_two_passes(prepared, needed, shared, **wants) if once is None else once[:2]
    loss = _loss(options, beta, new, entropy, tokens, sequences, present)
    if once is not None:
        loss = once.attach(loss)

    seen = new.detach()
    log_ratio = _log_ratio(options, seen, seen if tokens.old is None else tokens.old, sequences, present)
    metrics = ratio_metrics(log_ratio.detach(), present, options)
    if tokens.rollout is not None:
        metrics["importance_weight_mean"] = masked_mean(_importance(options, seen, tokens), present)
    if tokens.ref is not None:
        metrics["kl"] = masked_mean(kl_estimate(kl, seen, tokens.ref), present)
    if want_entropy:
        metrics["entropy"] = masked_mean(entropy.detach(), present)
    seen_entropy = entropy.detach().reshape(targets.shape) if want_entropy else None
    return LossOutput(loss, seen.reshape(targets.shape), seen_entropy, metrics)


def kl_estimate(kind: KLEstimator, new: Tensor, ref: Tensor) -> Tensor:
    """Per-token estimates of KL(new || ref) on tokens drawn from `new` (Schulman, 2020)."""
    difference = ref - new
    if kind == "k1":
        return -difference
    if kind == "k2":
        return 0.5 * difference * difference
    return difference.clamp(max=MAX_LOG_RATIO).exp() - difference - 1


def _loss(
    options: PolicyOptions,
    beta: float,
    new: Tensor,
    entropy: Tensor,
    tokens: TokenInputs,
    sequences: Sequences,
    present: Tensor,
) -> Tensor:
    """What tokens (t,) add to the loss, given their log-probabilities and entropies; `present` says which count."""
    old = new.detach() if tokens.old is None else tokens.old
    importance = None if tokens.rollout is None else _importance(options, new, tokens)
    if token_loss.supported(new, options.loss_type, [old, tokens.ref, tokens.advantage, importance, tokens.share]):
        loss = token_loss.fused_loss(
            new, old, tokens.ref, tokens.advantage, importance, tokens.share, options, beta, MAX_LOG_RATIO
        )
    else:
        terms = _policy_terms(options, new, old, tokens.advantage, sequences, present)
        if importance is not None:
            terms = terms * importance
        if tokens.ref is not None and beta != 0.0:
            terms = terms + beta * kl_estimate(options.kl, new, tokens.ref)
        loss = (torch.where(present, terms, 0.0) * tokens.share).sum()
    if tokens.entropy_share is not None:
        loss = loss - (entropy * tokens.entropy_share).sum()
    return loss


def _importance(options: PolicyOptions, new: Tensor, tokens: TokenInputs) -> Tensor:
    """min(old probability / sampler's probability, cap), (t,)."""
    assert tokens.rollout is not None
    old = new if tokens.old is None else tokens.old
    mismatch = old.detach() - tokens.rollout
    return mismatch.clamp(max=MAX_LOG_RATIO).exp().clamp(max=options.importance_cap)


def _policy_terms(
    options: PolicyOptions, new: Tensor, old: Tensor, advantage: Tensor, sequences: Sequences, mask: Tensor
) -> Tensor:
    """The policy term of each token (T,), to be minimised."""
    if options.loss_type == "awr":
        return -torch.exp((advantage / options.awr_beta).clamp(max=options.awr_max_exponent)) * new
    log_ratio = _log_ratio(options, new, old, sequences, mask)
    ratio = log_ratio.exp()
    if options.loss_type == "cispo":
        return -ratio.detach().clamp(max=1 + options.epsilon_high) * advantage * new
    clipped = ratio.clamp(1 - options.epsilon, 1 + options.epsilon_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    if options.dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, options.dual_clip * advantage), gain)
    return -gain


def _log_ratio(options: PolicyOptions, new: Tensor, old: Tensor, sequences: Sequences, mask: Tensor) -> Tensor:
    """The log of the ratio that the loss clips, (T,)."""
    if options.loss_type in ("gspo", "rloo"):
        return _sequence_log_ratio(new - old, sequences, mask, mean=options.loss_type == "gspo")
    return (new - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _sequence_log_ratio(token_log_ratio: Tensor, sequences: Sequences, mask: Tensor, *, mean: bool) -> Tensor:
    """The log-ratio of each token's sequence (T,): the mean or the sum over its tokens.

    With `mean`, each token carries the gradient of its own log-probability alone (GSPO's token form, arXiv
    2507.18071, section 4.3): where the advantage is one per sequence, this has the gradient of the sequence
    form, and it also admits advantages per token. With the sum, each copy carries the gradient of the whole
    sequence.
    """
    kept = torch.where(mask, token_log_ratio, 0.0)
    if not mean:
        return sequences.sum(kept)[sequences.ids].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    average = sequences.sum(kept.detach()) / sequences.sum(mask.to(kept.dtype)).clamp(min=1.0)
    own = token_log_ratio - token_log_ratio.detach()
    return (average[sequences.ids] + own).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _token_share(options: PolicyOptions, sequences: Sequences, mask: Tensor, normalisers: Normalisers) -> Tensor:
    """What each token's term is multiplied by in the loss: (T,) or a scalar."""
    if options.loss_type in ("ppo", "bnpo", "dapo", "cispo"):
        return 1.0 / normalisers.tokens
    if options.loss_type == "awr":
        return 1.0 / normalisers.sequences
    if options.loss_type == "dr_grpo":
        return 1.0 / (normalisers.sequences * float(options.max_completion_length or 1))
    lengths = sequences.sum(mask.to(normalisers.sequences.dtype)).clamp(min=1.0)
    return 1.0 / (lengths[sequences.ids] * normalisers.sequences)


def _token_advantages(
    advantages: Tensor, targets: Tensor, sequences: Sequences, step_ids: Tensor | None, loss_type: PolicyLoss
) -> Tensor:
    """One advantage for each token, (T,)."""
    if step_ids is not None:
        if advantages.dim() != 1:
            raise ValueError(f"with step_ids, advantages must be (steps,), got {tuple(advantages.shape)}")
        _forbid_rloo(loss_type, "step")
        kept = torch.where(targets == IGNORED, 0, step_ids).reshape(-1)
        if advantages.shape[0] == 0:
            if bool((targets != IGNORED).any()):
                raise ValueError("step_ids name steps, but advantages is empty")
            return advantages.new_zeros(kept.shape)
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= advantages.shape[0]):
            raise ValueError(
                f"step_ids of tokens with a target must be in [0, {advantages.shape[0]}), the number of "
                f"advantages; got {int(kept.min())} to {int(kept.max())}"
            )
        return advantages[kept]
    if advantages.shape == targets.shape:
        if sequences.count != advantages.numel():
            _forbid_rloo(loss_type, "token")
        return advantages.reshape(-1)
    if advantages.shape == (sequences.count,):
        return advantages[sequences.ids]
    raise ValueError(
        f"advantages must be per sequence ({sequences.count},) or per token {tuple(targets.shape)}, or per "
        f"step with step_ids; got {tuple(advantages.shape)}"
    )


def _forbid_rloo(loss_type: PolicyLoss, unit: str) -> None:
    if loss_type == "rloo":
        raise ValueError(f"rloo has one ratio per sequence and takes advantages per sequence, not per {unit}")


def ratio_metrics(log_ratio: Tensor, mask: Tensor, options: PolicyOptions) -> dict[str, Tensor]:
    ratio = log_ratio.exp()
    return {
        "ratio_mean": masked_mean(ratio, mask),
        "clip_fraction_low": masked_mean((ratio < 1 - options.epsilon).to(ratio.dtype), mask),
        "clip_fraction_high": masked_mean((ratio > 1 + options.epsilon_high).to(ratio.dtype), mask),
        "approx_kl": masked_mean(ratio - 1 - log_ratio, mask),
    }
