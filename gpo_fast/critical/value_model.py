"""What the values V(s_0) ... V(s_H) along one trajectory may be, given its continuations: a posterior over paths.

A trajectory's steps are drawn by the policy whose values are asked for, so the values along it are a martingale:
E[V(s_{i+1}) | s_i] = V(s_i), with V(s_H) the outcome itself. The prior says that and little more. On a grid of
values it is a Markov chain: from one state to the next a value mostly drifts a little, sometimes jumps (a
martingale jump, drawn from Beta(v, 1 - v)), and rarely goes anywhere, for trajectories that the policy did not
write. Neighbouring states so inform each other, each value enters two advantages once, and the trajectory's own
outcome enters as what it is: one draw with mean V(s_{H-1}), which is unbiased even where trajectories are chosen
by their outcome, because the posterior is conditional on that outcome.

Rewards are numbers in [0, 1]. One of them, r, has the likelihood v^r (1 - v)^(1 - r): exact for right-or-wrong
rewards, conservative for others (no distribution on [0, 1] with mean v is wider than Bernoulli's).
"""

from __future__ import annotations

from functools import cache

import numpy as np

GRID = 33
# Of four sets of these three the one under which the outcomes of 12 continuations of each state were likeliest on
# average, over the worlds of benchmarks/critical.py, its trajectories with one deciding token, and the failing ones of
# benchmarks/critical_real.py. Jumps half as likely fit the worlds as well, but with them the posterior named fewer
# first wrong lines than uniform did from the same two continuations of each state.
DRIFT = 0.08  # standard deviation of a step's drift, in the angle arcsin(sqrt(V)), where noise is even
JUMP, ANYWHERE = 0.35, 0.02  # probabilities of a jump and of an arbitrary value

_ANGLES = np.linspace(0.0, np.pi / 2, GRID)
VALUES = np.sin(_ANGLES) ** 2  # (GRID,), denser towards 0 and 1, which are on it
with np.errstate(divide="ignore"):
    # The floor stands for -inf: a success has probability 0 at V = 0.
    _LOG_VALUE = np.maximum(np.log(VALUES), -200.0)
    _LOG_COMPLEMENT = np.maximum(np.log(np.maximum(1.0 - VALUES, 0.0)), -200.0)
_START = np.gradient(VALUES) / np.gradient(VALUES).sum()  # uniform in V


def sample_paths(
    successes: np.ndarray, failures: np.ndarray, reward: float, num_paths: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws from the posterior of (V(s_0), ..., V(s_H)), shape (num_paths, H + 1).

    Forward filtering and backward sampling, exact on the grid.

    Args:
        successes, failures: for each of the H states the sums of r and of 1 - r over its continuations, shape (H,).
        reward: the trajectory's own outcome, V(s_H).
    """
    states = len(successes)
    log_likelihood = successes[:, None] * _LOG_VALUE + failures[:, None] * _LOG_COMPLEMENT  # (H, GRID)
    log_likelihood[-1] += reward * _LOG_VALUE + (1.0 - reward) * _LOG_COMPLEMENT
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    transition = _transition()
    filtered = np.empty((states, GRID))
    filtered[0] = _normalised(_START * likelihood[0])
    for state in range(1, states):
        filtered[state] = _normalised((filtered[state - 1] @ transition) * likelihood[state])

    chosen = np.empty((num_paths, states), dtype=np.int64)
    uniform = rng.random((num_paths, states))
    chosen[:, -1] = np.searchsorted(np.cumsum(filtered[-1])[:-1], uniform[:, -1], side="right")
    # Row j of a state's table: the distribution function of its value where the next one is j. All rows lie one
    # after the other, each lifted by its number, so that one sorted search serves all paths.
    tables = np.cumsum(filtered[:, None, :] * transition.T, axis=2)  # (H, GRID, GRID)
    tables /= tables[:, :, -1:]
    lift = np.arange(GRID)
    for state in range(states - 2, -1, -1):
        after = chosen[:, state + 1]
        found = np.searchsorted((tables[state] + lift[:, None]).ravel(), uniform[:, state] + after, side="right")
        chosen[:, state] = np.minimum(found - after * GRID, GRID - 1)
    return np.concatenate([VALUES[chosen], np.full((num_paths, 1), reward)], axis=1)


@cache
def _transition() -> np.ndarray:
    """Row i: the distribution of the next value after VALUES[i], shape (GRID, GRID)."""
    drift = np.exp(-0.5 * ((_ANGLES[:, None] - _ANGLES) / DRIFT) ** 2)
    drift /= drift.sum(axis=1, keepdims=True)
    jump = np.stack([_beta(value) for value in VALUES])
    mixed: np.ndarray = (1 - JUMP - ANYWHERE) * drift + JUMP * jump + ANYWHERE * _START
    return mixed


def _beta(mean: float) -> np.ndarray:
    """Beta(mean, 1 - mean) on the grid: by the reflection formula its density is sin(pi mean) / pi times
    x^(mean - 1) (1 - x)^(-mean), and x = sin(angle)^2 makes that 2 tan(angle)^(2 mean - 1)."""
    if mean in (0.0, 1.0):
        return np.asarray(mean == VALUES, dtype=float)
    width = _ANGLES[1]
    inner = 2 * np.sin(np.pi * mean) / np.pi * np.tan(_ANGLES[1:-1]) ** (2 * mean - 1) * width
    # The ends hold the poles: tan is close to the angle within half a cell of them, which integrates exactly.
    low = np.sin(np.pi * mean) / np.pi * (width / 2) ** (2 * mean) / mean
    high = np.sin(np.pi * mean) / np.pi * (width / 2) ** (2 - 2 * mean) / (1 - mean)
    return _normalised(np.concatenate([[low], inner, [high]]))


def _normalised(weights: np.ndarray) -> np.ndarray:
    normalised: np.ndarray = weights / weights.sum()
    return normalised
