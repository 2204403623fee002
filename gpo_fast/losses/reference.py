"""Per-token log-probabilities in plain torch: the logits are materialised and autograd does the rest.

The other paths are tested against this one in float64. It is not dispatched to: it needs T * V memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpo_fast.losses.head import IGNORED


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T,) of `targets` and entropies (T,), 0 at ignored rows, in the dtype of `hidden`.

    Args: hidden (T, H), weight (V, H), targets (T,) with -100 = ignored, bias (V,).
    """
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    kept = targets != IGNORED
    chosen = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)
    return chosen * kept, entropy * kept
