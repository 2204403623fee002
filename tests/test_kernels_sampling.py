"""The sampling kernels draw what the definition says: the same number gives the same token, in the right shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from aot import SHARED_LIMIT, Job, compile_ahead
from gpo_fast.kernels import sampling
from gpo_fast.kernels.sampling import Filters, Sampled, sample_tokens, stream_uniform

from gpo_fast.rollout.sampler import sample, stream_key, uniforms
from gpo_fast.rollout.types import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CHUNK", 256)  # several chunks in a small vocabulary


def draw(logits: torch.Tensor, params: Sequence[SamplingParams], keys: np.ndarray, positions: np.ndarray) -> Sampled:
    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    filters = None
    if any(p.top_k or p.top_p < 1 or p.min_p for p in params):
        filters = Filters(
            column([p.top_k for p in params], torch.int32),
            column([p.top_p for p in params], torch.float32),
            column([p.min_p for p in params], torch.float32),
        )
    streams = [torch.from_numpy(a.view(np.int64)).to(DEVICE) for a in (keys, positions)]
    out = sample_tokens(logits.to(DEVICE), *streams, column([p.temperature for p in params], torch.float32), filters)
    return Sampled(*(t.cpu() for t in out))


def streams(rows: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    keys = np.array([stream_key(seed, i) for i in range(rows)], np.uint64)
    return keys, np.arange(rows, dtype=np.uint64) * np.uint64(7)


def truth(logits: np.ndarray, params: SamplingParams, u: float) -> tuple[int, float, float, float]:
    """(token, logprob, sampling logprob, distance of u to the nearest boundary), in float64."""
    z = logits.astype(np.float64)
    logprobs = z - np.logaddexp.reduce(z)
    if params.temperature == 0:
        token = int(z.argmax())
        return token, logprobs[token], 0.0, 1.0
    x = (logits / np.float32(params.temperature)).astype(np.float64)  # the scaled values are float32 by definition
    weights = np.exp(x - x.max())
    order = np.argsort(-x, kind="stable")
    if params.top_k:
        weights[order[params.top_k :]] = 0
    if params.top_p < 1:
        ordered = weights[order]
        before = np.cumsum(ordered) - ordered
        weights[order[before >= np.float32(params.top_p) * ordered.sum()]] = 0
    weights[np.exp(x - x.max()) < params.min_p] = 0
    cumulative = weights.cumsum() / weights.sum()
    token = int(np.searchsorted(cumulative, u, side="right"))
    return token, logprobs[token], np.log(weights[token] / weights.sum()), float(np.abs(cumulative - u).min())


@triton.jit
def _uniform_kernel(keys, positions, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    key = tl.load(keys + index).to(tl.uint64, bitcast=True)
    tl.store(out + index, stream_uniform(key, tl.load(positions + index).to(tl.uint64, bitcast=True)))


def test_random_numbers_equal_the_reference_bit_by_bit() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 256, dtype=np.uint64)
    positions = np.random.default_rng(1).integers(0, 2**40, 256, dtype=np.uint64)
    out = torch.empty(256, dtype=torch.float64, device=DEVICE)
    given = [torch.from_numpy(a.view(np.int64)).to(DEVICE) for a in (keys, positions)]
    _uniform_kernel[(1,)](*given, out, SIZE=256)
    assert np.array_equal(out.cpu().numpy(), uniforms(keys, positions))


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.5, top_k=5),
    SamplingParams(top_k=1),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(top_p=1e-4),
    SamplingParams(min_p=0.05),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=3.0, top_k=1000),
]


@pytest.mark.parametrize("params", [PARAMS[:3], PARAMS], ids=["unfiltered", "filtered"])
@pytest.mark.parametrize("levels", [None, 8], ids=["distinct", "tied"])
def test_tokens_and_logprobs_equal_the_definition(params: list[SamplingParams], levels: int | None) -> None:
    """Also where many logits are equal (rounded to `levels` steps a unit): the first by index stay."""
    params = params * (8 if len(params) < 5 else 3)
    logits = torch.randn(len(params), 900) * 2
    if levels:
        logits = (logits * levels).round() / levels
    logits[:, 17] = -torch.inf
    keys, positions = streams(len(params), seed=levels or 1)
    got = draw(logits, params, keys, positions)
    compared = 0
    for row, (p, u) in enumerate(zip(params, uniforms(keys, positions))):
        token, logprob, sampling_logprob, distance = truth(logits[row].numpy(), p, float(u))
        if distance < 1e-6:  # float32 exponentials cannot tell the two neighbours apart
            continue
        compared += 1
        assert got.tokens[row] == token, p
        assert abs(got.logprobs[row] - logprob) < 1e-5
        assert abs(got.sampling_logprobs[row] - sampling_logprob) < 1e-5
    assert compared > 0.9 * len(params)


def test_the_engines_sampler_draws_the_same_tokens() -> None:
    """Without ties, for which the reference's order is the sort's."""
    logits = torch.randn(2 * len(PARAMS), 700) * 3
    params = PARAMS * 2
    keys, positions = streams(len(params))
    tokens, logprobs, sampling_logprobs = sample(logits, params, uniforms(keys, positions))
    got = draw(logits, params, keys, positions)
    assert got.tokens.tolist() == tokens.tolist()
    assert np.allclose(got.logprobs, logprobs, atol=1e-5)
    assert np.allclose(got.sampling_logprobs, sampling_logprobs, atol=1e-5)


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.3), SamplingParams(top_k=6)], ids=["plain", "top_k"])
def test_shares_pass_a_chi_square_test(params: SamplingParams) -> None:
    # The interpreter takes 20 ms a row, and ten times as long with a filter.
    draws, vocabulary = (20_000 if DEVICE.type == "cuda" else 60 if params.top_k else 250), 12
    one = torch.randn(vocabulary)
    keys, positions = streams(draws, seed=11)
    tokens = draw(one.expand(draws, vocabulary), [params] * draws, keys, positions).tokens.numpy()
    scaled = one.double() / params.temperature
    if params.top_k:
        scaled[scaled < scaled.sort(descending=True).values[params.top_k - 1]] = -torch.inf
    expected = scaled.softmax(-1).numpy() * draws
    counts = np.bincount(tokens, minlength=vocabulary)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # The 99.99th percentiles of chi-square with 11 and 5 degrees of freedom.
    assert statistic < (37.4 if possible.sum() == 12 else 25.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_logits_and_strided_rows(dtype: torch.dtype) -> None:
    logits = (torch.randn(6, 1000) * 2).to(dtype)
    keys, positions = streams(6)
    params = [SamplingParams(temperature=0.8)] * 6
    got = draw(logits[:, :600], params, keys, positions)
    same = draw(logits[:, :600].float().contiguous(), params, keys, positions)
    assert torch.equal(got.tokens, same.tokens)
    assert torch.equal(got.logprobs, same.logprobs)


def test_wrong_arguments_are_refused() -> None:
    logits, one = torch.randn(2, 8), torch.ones(2)
    number = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"keys must be torch.int64 of shape \(2,\)"):
        sample_tokens(logits, number[:1], number, one)
    with pytest.raises(ValueError, match="contiguous along the vocabulary"):
        sample_tokens(torch.randn(8, 2).T, number, number, one)


def test_kernels_compile_without_spills() -> None:
    floats = dict.fromkeys(("temperatures", "tops", "raw_sums"), "*fp32") | {"logits": "*bf16", "masses": "*fp64"}
    shape = {"vocabulary": "i32:16", "row_stride": "i32:16", "SIZE": 4096}
    threshold = dict.fromkeys(("thresholds", "ties", "ties_before", "bests"), "*i32")
    module = "gpo_fast.kernels.sampling:"
    stats = Job(f"{module}stats_kernel", {**floats, "bests": "*i32", **shape}, num_warps=8)
    filters = {**floats, **threshold, **shape, "top_ks": "*i32", "top_ps": "*fp32", "min_ps": "*fp32"}
    filters |= {"chunks": "i32", "CHUNKS": 64}
    for unused in ("raw_sums", "bests"):
        del filters[unused]
    outputs = {"tokens": "*i64", "logprobs": "*fp32", "sampling_logprobs": "*fp32"}
    draws = {**floats, **threshold, **shape, **outputs, "keys": "*i64", "positions": "*i64", "min_ps": "*fp32"}
    draws |= {"chunks": "i32", "CHUNKS": 64}
    jobs = [stats, Job(f"{module}filter_kernel", filters, num_warps=16)]
    jobs += [Job(f"{module}draw_kernel", draws | {"FILTERED": filtered}, num_warps=8) for filtered in (False, True)]
    for built in compile_ahead(jobs):
        assert built.spill_bytes == 0, built.job.kernel
        assert built.shared <= SHARED_LIMIT[built.arch]
