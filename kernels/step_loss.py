"""Policy losses with one ratio per token: terms and gradients in one kernel.

With l a token's new log-probability, r = exp(l - l_old) clamped as the losses clamp it, A its advantage, i its
importance weight and s its share of the loss, a token's term is

    s (i P + beta KL(l, l_ref))      P as at the head of gpo_fast/losses/policy.py

and its derivative by l is known in closed form, so that forward and backward need one pass over T numbers: about
seventy launches of elementwise operations become one. Terms are summed by torch afterwards; no atomics. Sums over
steps and sequences are `torch.segment_reduce`: one deterministic kernel already.

Not handled: ratios per sequence (gspo, rloo), whose derivative needs the sums of the whole sequence first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CLIPPED, CISPO, AWR = 0, 1, 2
NO_KL, K1, K2, K3 = 0, 1, 2, 3


@dataclass(frozen=True)
class TokenLossOptions:
    """Which loss (CLIPPED, CISPO, AWR), which KL estimator, and their numbers."""

    kind: int
    kl: int
    epsilon: float
    epsilon_high: float
    dual_clip: float | None
    beta: float
    awr_beta: float
    awr_max_exponent: float
    max_log_ratio: float


def token_losses(
    new: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantage: Tensor,
    importance: Tensor | None,
    share: Tensor,
    options: TokenLossOptions,
) -> tuple[Tensor, Tensor]:
    """Terms (T,) and their derivatives by `new` (T,), float32. All tensors (T,) float32; `share` is 0 where ignored."""
    terms, derivatives = torch.empty_like(new), torch.empty_like(new)
    count, block = new.shape[0], 256
    if count:
        token_losses_kernel[(triton.cdiv(count, block),)](
            terms,
            derivatives,
            new,
            old,
            ref,
            advantage,
            importance,
            share,
            count,
            1.0 - options.epsilon,
            1.0 + options.epsilon_high,
            options.dual_clip or 0.0,
            options.beta,
            options.awr_beta,
            options.awr_max_exponent,
            options.max_log_ratio,
            KIND=options.kind,
            KL=options.kl if ref is not None else NO_KL,
            HAS_DUAL_CLIP=options.dual_clip is not None,
            HAS_IMPORTANCE=importance is not None,
            BLOCK=block,
        )
    return terms, derivatives


@triton.jit
def token_losses_kernel(
    terms,  # out (count,) float32
    derivatives,  # out (count,) float32
    new,
    old,
    ref,
    advantage,
    importance,
    share,
    count,
    low,
    high,
    dual_clip,
    beta,
    awr_beta,
    awr_max_exponent,
    max_log_ratio,
    KIND: tl.constexpr,
    KL: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tokens: reads four to six numbers of each, writes two."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    logprob = tl.load(new + at, mask=inside, other=0.0)
    gain = tl.load(advantage + at, mask=inside, other=0.0)
    weight = tl.load(share + at, mask=inside, other=0.0)
    difference = logprob - tl.load(old + at, mask=inside, other=0.0)
    log_ratio = tl.minimum(tl.maximum(difference, -max_log_ratio), max_log_ratio)
    ratio = tl.exp(log_ratio)
    if KIND == 2:
        factor = tl.exp(tl.minimum(gain / awr_beta, awr_max_exponent))
        term, slope = -factor * logprob, -factor
    elif KIND == 1:
        factor = tl.minimum(ratio, high) * gain
        term, slope = -factor * logprob, -factor
    else:
        clipped = tl.minimum(tl.maximum(ratio, low), high)
        value, bound = ratio * gain, clipped * gain
        # Within the clip both are the same number, and the derivative is the ratio's.
        free = value <= bound
        objective = tl.minimum(value, bound)
        if HAS_DUAL_CLIP:
            floor = dual_clip * gain
            held = (gain < 0) & (objective < floor)
            objective = tl.where(held, floor, objective)
            free = free & (held == 0)
        unclamped = tl.abs(difference) <= max_log_ratio
        term, slope = -objective, tl.where(free & unclamped, -value, 0.0)
    if HAS_IMPORTANCE:
        scale = tl.load(importance + at, mask=inside, other=0.0)
        term, slope = term * scale, slope * scale
    if KL != 0:
        distance = tl.load(ref + at, mask=inside, other=0.0) - logprob
        if KL == 1:
            term, slope = term - beta * distance, slope + beta
        elif KL == 2:
            term, slope = term + 0.5 * beta * distance * distance, slope - beta * distance
        else:
            growth = tl.exp(tl.minimum(distance, max_log_ratio))
            term += beta * (growth - distance - 1.0)
            slope += beta * (1.0 - tl.where(distance <= max_log_ratio, growth, 0.0))
    used = weight != 0.0
    tl.store(terms + at, tl.where(used, term * weight, 0.0), mask=inside)
    tl.store(derivatives + at, tl.where(used, slope * weight, 0.0), mask=inside)
