"""Kept trajectories: what continues from inside of them is forked there, and draws the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from gpo_fast import Completion, CriticalStepFinder, Request, RolloutEngine, SamplingParams, StepSplitter

PROMPT = list(range(3, 25))
SAMPLING = SamplingParams(max_tokens=20, ignore_eos=True)


def trajectories(engine: RolloutEngine, n: int = 2) -> list[Completion]:
    return engine.generate([Request(PROMPT, n, SAMPLING, seed=1, keep=True)])


def comb(drawn: list[Completion], traced: bool = True) -> list[Request]:
    """Three continuations of every cut point of every trajectory."""
    few = SamplingParams(max_tokens=5)
    return [
        Request([*c.prompt_token_ids, *c.token_ids[:cut]], 3, few, seed=cut, trace=c.trace if traced else None)
        for c in drawn
        for cut in range(len(c.token_ids))
    ]


def tokens(drawn: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in drawn]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("max_batch_size", [5, 64])
def test_a_comb_from_traces_is_that_of_an_engine_without(block_size: int, max_batch_size: int) -> None:
    engine = RolloutEngine(tiny.model(seed=4), tiny.tokenizer(), block_size=block_size, max_batch_size=max_batch_size)
    drawn = trajectories(engine)
    requests, before = comb(drawn), engine.stats()
    plain = RolloutEngine(tiny.model(seed=4), tiny.tokenizer(), block_size=block_size, share_prefixes=False)
    expected = plain.generate(comb(drawn, traced=False))
    found = engine.generate(requests)
    assert tokens(found) == tokens(expected)
    assert found[7].logprobs == pytest.approx(expected[7].logprobs, abs=1e-5)
    after = engine.stats()
    # Each cut point is computed by its last token alone; one that is split over batches is forked twice.
    assert after["prefill_tokens"] - before["prefill_tokens"] == after["trace_forks"] >= len(requests)
    engine.update_weights()
    engine.cache.check_integrity()
    assert engine.cache.stats()["marks"] == 0


def test_traces_are_held_until_the_weights_change_and_then_never_used() -> None:
    model = tiny.model(seed=4)
    engine = RolloutEngine(model, tiny.tokenizer(), block_size=4)
    drawn = trajectories(engine)
    assert len(engine.traces) == 2
    assert all(c.trace is not None for c in drawn)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    engine.update_weights()
    assert len(engine.traces) == 0
    found = engine.generate(comb(drawn))
    assert engine.stats()["trace_forks"] == 0
    fresh = RolloutEngine(model, tiny.tokenizer(), block_size=4)
    assert tokens(found) == tokens(fresh.generate(comb(drawn)))


def test_a_trace_of_other_tokens_is_not_used() -> None:
    engine = RolloutEngine(tiny.model(seed=4), tiny.tokenizer(), block_size=4)
    drawn = trajectories(engine)
    wrong = [replace(r, trace=drawn[1 - n // 20].trace) for n, r in enumerate(comb(drawn))]
    unknown = [replace(r, trace=10_000) for r in comb(drawn)]
    expected = tokens(engine.generate(comb(drawn)))
    assert tokens(engine.generate(wrong)) == tokens(engine.generate(unknown)) == expected


def test_kept_traces_give_way_where_memory_is_short() -> None:
    model = tiny.model(seed=4)
    page = RolloutEngine(model, tiny.tokenizer(), block_size=4).block_bytes
    engine = RolloutEngine(model, tiny.tokenizer(), block_size=4, kv_cache_memory=16 * page)
    roomy = RolloutEngine(model, tiny.tokenizer(), block_size=4)
    drawn = trajectories(engine, n=4)
    assert tokens(drawn) == tokens(trajectories(roomy, n=4))
    other = [Request([40 + i, *PROMPT], 1, SAMPLING, seed=i) for i in range(6)]
    assert tokens(engine.generate(other)) == tokens(roomy.generate(other))
    assert len(engine.traces) < 4
    assert tokens(engine.generate(comb(drawn))) == tokens(roomy.generate(comb(drawn)))
    engine.cache.check_integrity()


def test_the_search_forks_from_the_trajectories_that_the_engine_kept() -> None:
    engine = RolloutEngine(tiny.model(seed=4), tiny.tokenizer(), block_size=4)
    drawn = trajectories(engine)
    finder = CriticalStepFinder(
        engine, lambda cs: [sum(c.token_ids) % 2 for c in cs], StepSplitter("tokens", min_tokens=4), sampling=SAMPLING
    )
    found = finder.find(drawn)
    states = sum(len(f.steps) for f in found)
    stats = engine.stats()
    assert states > 4
    assert stats["trace_forks"] == states - 1  # both trajectories begin in the same state: its prompt is one fork
