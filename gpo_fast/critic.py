"""Critics: what a state is worth, and how much better than that each token did (GAE, arXiv 1506.02438).

A critic's values are Monte Carlo ones, which the search for the critical step has measured at the boundaries of
steps, or a linear head's on the last hidden state, at every token. The head is fitted in closed form. With gradient
steps it explained far less at a small learning rate, and did great harm first at a large one
(benchmarks/value_head.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gpo_fast.critical import CriticalStep
from gpo_fast.experience import TrainingRow
from gpo_fast.ranks import Ranks

FADING = 0.9  # what a state counts for in the value head an iteration later
RIDGE = 0.1  # the value head's penalty, relative to the mean square of each component


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
    """V(s) = w h + b on the last hidden state h of a state's last token; 0 until it has learned.

    (w, b) is the ridge regression of the returns on the states of all iterations, those of k iterations ago with the
    weight `FADING**k`. The penalty of a component of w is in proportion to that component's mean square. The head
    only reads hidden states: no gradient of it reaches the model. It takes 4 (H + 1)^2 bytes, 51 MB for H = 3,584.
    """

    moments: Tensor  # [H + 1, H + 2]: x^T (x, return) over states, with x = (h, 1); the last of x^T x is their number
    coefficients: Tensor  # [H + 1]

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(hidden_size + 1, hidden_size + 2, device=device))
        self.register_buffer("coefficients", torch.zeros(hidden_size + 1, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> values [T]."""
        return _with_one(hidden) @ self.coefficients

    def products(self, hidden: Tensor, returns: Tensor) -> Tensor:
        """What T states with their returns [T] add to `moments`."""
        x = _with_one(hidden)
        return x.T @ torch.cat([x, returns[:, None].to(x)], dim=1)

    def learn(self, products: Tensor) -> None:
        """Lets older states fade, adds the products of an iteration, and solves for the coefficients."""
        self.moments.mul_(FADING).add_(products)
        normal, target = self.moments.double().split([len(self.moments), 1], dim=1)
        penalty = RIDGE * normal.diagonal()
        penalty[-1] = 0  # of b
        penalty[normal.diagonal() == 0] = 1  # of a component that is 0 in all states; of all, before there is a state
        self.coefficients.copy_(torch.linalg.solve(normal + torch.diag(penalty), target)[:, 0])


def _with_one(hidden: Tensor) -> Tensor:
    return torch.cat([hidden.float(), hidden.new_ones(len(hidden), 1, dtype=torch.float32)], dim=1)


def set_advantages(row: TrainingRow, values: Sequence[float], gamma: float, gae_lambda: float) -> None:
    """What a value head's values (one for each token's state) make of a row."""
    row.values = list(values)
    row.token_advantages = generalized_advantages(values, row.reward, gamma, gae_lambda).tolist()


def explained_variance(rows: Sequence[TrainingRow]) -> float:
    """Share of the variance of the rewards that the values explain, token by token; 0 where no reward differs."""
    values = np.concatenate([np.asarray(row.values) for row in rows])
    rewards = np.concatenate([np.full(len(row.token_ids), row.reward) for row in rows])
    total = float(rewards.var())
    return 1 - float((rewards - values).var()) / total if total > 0 else 0.0
