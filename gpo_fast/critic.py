"""Critics: what a state is worth, and how much better than that each token did (GAE, arXiv 1506.02438).

A critic's values are Monte Carlo ones, which the search for the critical step has measured at the boundaries of
steps, or a linear head's on the last hidden state, at every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from gpo_fast.config import GPOConfig
from gpo_fast.critical import CriticalStep
from gpo_fast.experience import TrainingRow
from gpo_fast.losses import LossOutput
from gpo_fast.ranks import Ranks
from gpo_fast.training_batch import TrainingBatch


def generalized_advantages(
    values: Sequence[float] | np.ndarray, reward: float, gamma: float, gae_lambda: float
) -> np.ndarray:
    """Advantages (n,) of n actions with the values (n,) of the states before them and one reward after the last.

    With d_i = gamma V_{i+1} - V_i, and reward - V for the last one: A_i = d_i + gamma gae_lambda A_{i+1}.
    """
    values = np.asarray(values, dtype=np.float64)
    deltas = -values
    deltas[:-1] += gamma * values[1:]
    deltas[-1:] += reward
    advantages = np.empty_like(deltas)
    later = 0.0
    for i in range(len(deltas) - 1, -1, -1):
        later = deltas[i] + gamma * gae_lambda * later
        advantages[i] = later
    return advantages


def monte_carlo_advantages(critical: CriticalStep, gamma: float, gae_lambda: float) -> list[float]:
    """An advantage for each token of a searched trajectory: that of its step.

    Steps before which the search took no sample are one step with the one before.

    Raises:
        ValueError: V(s_0) is not known.
    """
    if not math.isfinite(critical.values[0]):
        raise ValueError("the value of the prompt is not known: search with root_values")
    known = [i for i in range(len(critical.steps)) if math.isfinite(critical.values[i])]
    advantages = generalized_advantages([critical.values[i] for i in known], critical.reward, gamma, gae_lambda)
    starts = [critical.steps[i].start for i in known]
    lengths = np.diff([*starts, critical.steps[-1].end])
    return np.repeat(advantages, lengths).tolist()


def scale_advantages(rows: Sequence[TrainingRow], ranks: Ranks, *, centre: bool) -> None:
    """Divides a critic's advantages by their root mean square over all tokens of all processes' rows.

    Args:
        centre: subtract their mean first, as is usual with a learned critic, whose values lag behind. Measured ones
            do not, and a token with the advantage 0 stays one from which nothing is to be learned.
    """
    per_row = [np.asarray(row.advantage_of_tokens, dtype=np.float64) for row in rows]
    flat = np.concatenate([np.zeros(0), *per_row])
    count, total = ranks.sum([float(len(flat)), float(flat.sum())])
    shift = total / count if centre and count else 0.0
    squares = ranks.sum([float(np.square(flat - shift).sum())])[0]
    size = float(np.sqrt(squares / max(1.0, count))) + 1e-8
    for row, advantages in zip(rows, per_row):
        row.token_advantages = ((advantages - shift) / size).tolist()


class ValueHead(nn.Module):
    """V(s) = w h + b on the last hidden state of a state's last token; float32, 0 everywhere at the start."""

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32, device=device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> values [R]."""
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.linear(hidden.float())
        return values[:, 0]

    def with_loss(
        self, output: LossOutput, batch: TrainingBatch, hidden: Tensor, args: GPOConfig, num_tokens: float
    ) -> LossOutput:
        """A policy loss with `vf_coef` times the mean value loss over `num_tokens` tokens added to it."""
        values = self(hidden)[batch.row_of_token]
        error = value_loss(values, batch.per_token("values"), batch.per_token("returns"), args.cliprange_value)
        metrics = {**output.metrics, "value_loss": error.detach() / len(values)}
        return replace(output, loss=output.loss + args.vf_coef * error / num_tokens, metrics=metrics)


def set_advantages(row: TrainingRow, values: Sequence[float], gamma: float, gae_lambda: float) -> None:
    """What a value head's values (one for each token's state) make of a row: advantages and returns."""
    advantages = generalized_advantages(values, row.reward, gamma, gae_lambda)
    row.token_advantages = advantages.tolist()
    row.values = list(values)
    row.returns = (advantages + np.asarray(values)).tolist()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Sum over tokens (T,) of half the squared error, clipped as in PPO (arXiv 1707.06347's reference code).

    The error counts as at least that of the value moved from `old_values` by no more than `cliprange`.
    """
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square()).sum()


def explained_variance(rows: Sequence[TrainingRow]) -> float:
    """Share of the variance of the rewards that the values explain, token by token; 0 where no reward differs."""
    values = np.concatenate([np.asarray(row.values) for row in rows])
    rewards = np.concatenate([np.full(len(row.token_ids), row.reward) for row in rows])
    total = float(rewards.var())
    return 1 - float((rewards - values).var()) / total if total > 0 else 0.0
