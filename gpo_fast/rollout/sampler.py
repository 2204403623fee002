"""Drawing tokens: temperature, top-k, top-p, min-p, with a random stream for each branch.

Token t of a branch uses the t-th number of the stream keyed by (seed, branch), whatever else is in the batch, so a
branch's tokens do not depend on how requests are scheduled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpo_fast import _C
from gpo_fast.rollout.types import SamplingParams


class Drawn(NamedTuple):
    """One token for each row: their ids (int64) and log-probabilities under temperature 1 without filters, and under
    the distribution that was sampled from (0 for greedy rows)."""

    tokens: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Counter-based uniform numbers in [0, 1), float64, of the streams `keys` (uint64) at `positions`.

    SplitMix64 (Steele, Lea and Flood 2014): the state is key + position * golden ratio, then mixed twice.
    """
    with np.errstate(over="ignore"):
        z = _mix(_mix(keys.astype(np.uint64)) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def stream_key(seed: int, branch: int) -> int:
    """The key of a branch's stream."""
    with np.errstate(over="ignore"):
        mixed = _mix(np.array([int(seed) & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)) + np.uint64(branch + 1) * _GOLDEN
    return int(mixed[0])


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def sample(logits: Tensor, params: Sequence[SamplingParams], uniform: np.ndarray) -> Drawn:
    """One token for each row of `logits` (rows, vocabulary). On a GPU the engine runs kernels/sampling.py instead."""
    if logits.device.type == "cpu":
        return _sample_cpp(logits, params, uniform)
    return sample_torch(logits, params, uniform)


def _sample_cpp(logits: Tensor, params: Sequence[SamplingParams], uniform: np.ndarray) -> Drawn:
    logits = logits.float().contiguous()
    drawn = _C.sample(
        logits.data_ptr(),
        vocabulary=logits.shape[-1],
        temperature=np.array([p.temperature for p in params], dtype=np.float32),
        top_k=np.array([p.top_k for p in params], dtype=np.int32),
        top_p=np.array([p.top_p for p in params], dtype=np.float32),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        uniform=uniform,
        threads=torch.get_num_threads(),
    )
    return Drawn(*drawn)


def sample_torch(logits: Tensor, params: Sequence[SamplingParams], uniform: np.ndarray) -> Drawn:
    """The same in torch: for devices without a kernel, and the reference of the tests."""
    logits = logits.float()
    rows = len(params)
    normaliser = torch.logsumexp(logits, dim=-1)
    temperature = torch.tensor([p.temperature or 1.0 for p in params], device=logits.device)
    scaled = logits if bool((temperature == 1).all()) else logits / temperature[:, None]
    if any(p.top_k or p.top_p < 1 or p.min_p for p in params):
        scaled = _filter(scaled, params)
    probabilities = torch.softmax(scaled, dim=-1)
    # Inverse of the cumulative distribution, in float64 so that no rounding of a long sum shifts a token.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    target = torch.from_numpy(uniform).to(logits.device)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    greedy = torch.tensor([p.temperature == 0 for p in params], device=logits.device)
    tokens = torch.where(greedy, logits.argmax(dim=-1), drawn) if bool(greedy.any()) else drawn
    row = torch.arange(rows, device=logits.device)
    logprobs = logits[row, tokens] - normaliser
    sampling = torch.where(greedy, torch.zeros(()).to(logprobs), probabilities[row, tokens].log())
    packed = torch.stack([tokens.double(), logprobs.double(), sampling.double()]).cpu().numpy()
    return Drawn(packed[0].astype(np.int64), packed[1], packed[2])


def _filter(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Sets the logits of the tokens that top-k, top-p or min-p drop to -inf. The likeliest token always stays."""
    vocabulary = scaled.shape[-1]
    ordered, order = scaled.sort(dim=-1, descending=True)
    device = scaled.device
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=device)
    rank = torch.arange(vocabulary, device=device)
    drop = rank[None, :] >= top_k[:, None]
    # Each filter sees the distribution that the one before it left.
    probabilities = torch.softmax(ordered.masked_fill(drop, -torch.inf), dim=-1)
    top_p = torch.tensor([p.top_p for p in params], device=device)
    before = probabilities.cumsum(dim=-1) - probabilities
    drop |= (before >= top_p[:, None]) & (top_p < 1)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device)
    drop |= probabilities < min_p[:, None] * probabilities[:, :1]
    drop[:, 0] = False
    return scaled.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
