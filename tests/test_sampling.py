"""Drawing tokens on the CPU: the right distribution, the right logprobs, and the torch version's choices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpo_fast import SamplingParams
from gpo_fast.rollout.sampler import sample, sample_torch, stream_key, uniforms

FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0},
]


def random_uniforms(rows: int, stream: int = 0) -> np.ndarray:
    return uniforms(np.full(rows, stream, dtype=np.uint64), np.arange(rows, dtype=np.uint64))


@pytest.mark.parametrize("values", FILTERS)
@pytest.mark.parametrize("vocabulary", [7, 513, 5000])
def test_tokens_and_logprobs_are_those_of_the_torch_version(values: dict, vocabulary: int) -> None:
    params = [SamplingParams(**values)] * 300
    logits = torch.randn(300, vocabulary) * 3
    ours, reference = (f(logits, params, random_uniforms(300)) for f in (sample, sample_torch))
    same = ours[0] == reference[0]
    # Both invert the same distribution with the same numbers: only a number within rounding of a boundary differs.
    assert same.mean() >= 0.99
    np.testing.assert_allclose(ours[1][same], reference[1][same], atol=2e-5)
    np.testing.assert_allclose(ours[2][same], reference[2][same], atol=2e-5)


@pytest.mark.parametrize("values", FILTERS[:-1])
def test_frequencies_pass_a_chi_square_test(values: dict) -> None:
    draws, vocabulary = 20_000, 60
    logits = torch.randn(vocabulary) * 1.5
    params = SamplingParams(**values)
    tokens, _, sampling = sample(logits.expand(draws, -1), [params] * draws, random_uniforms(draws, stream=9))
    expected = truth(logits.double(), params) * draws
    counts = np.bincount(tokens, minlength=vocabulary)
    assert (counts[expected == 0] == 0).all()
    often = expected >= 5
    rest = np.array([counts[~often].sum(), max(expected[~often].sum(), 1e-9)])
    statistic = ((counts[often] - expected[often]) ** 2 / expected[often]).sum()
    degrees = often.sum() - 1
    if rest[1] >= 5:
        statistic, degrees = statistic + (rest[0] - rest[1]) ** 2 / rest[1], degrees + 1
    # Wilson and Hilferty's normal approximation; 4.3 standard deviations are passed by chance once in 100,000.
    deviation = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert deviation < 4.3
    np.testing.assert_allclose(sampling, np.log(expected[tokens] / draws), atol=2e-5)


def truth(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The distribution to draw from, float64, filter after filter."""
    p = torch.softmax(logits / params.temperature, -1)
    ordered, order = p.sort(descending=True)
    keep = torch.ones(len(p), dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    share = torch.where(keep, ordered, 0) / ordered[keep].sum()
    if params.top_p < 1:
        keep &= share.cumsum(0) - share < params.top_p
    keep &= ordered >= params.min_p * ordered[0]
    p = torch.zeros_like(p).scatter(0, order[keep], ordered[keep])
    return (p / p.sum()).numpy()


def test_rows_do_not_depend_on_their_company() -> None:
    logits = torch.randn(9, 1000)
    params = [SamplingParams(**FILTERS[i % len(FILTERS)]) for i in range(9)]
    uniform = random_uniforms(9)
    together = sample(logits, params, uniform)
    for i in range(9):
        alone = sample(logits[i : i + 1], params[i : i + 1], uniform[i : i + 1])
        assert [a[0] for a in alone] == [t[i] for t in together]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_extreme_numbers_draw_possible_tokens(uniform: float) -> None:
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, 1000], logits[0, 2000] = 1.0, 2.0
    for values in FILTERS:
        token = sample(logits, [SamplingParams(**values)], np.array([uniform]))[0][0]
        assert token in (1000, 2000)


def test_equal_logits_keep_exactly_k() -> None:
    tokens = sample(torch.zeros(2000, 50), [SamplingParams(top_k=4)] * 2000, random_uniforms(2000))[0]
    assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_a_seed_may_be_one_of_numpys_integers() -> None:
    assert stream_key(np.int64(-3), 2) == stream_key(-3, 2) != stream_key(3, 2)
