"""The engine on a GPU: greedy equals generate, logprobs equal a forward pass, and captured graphs change nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny
import torch
from test_engine import GREEDY, KINDS, MODELS, greedy_cases, prompts, teacher_forced, unrounded_head

from gpo_fast import Completion, Request, RolloutEngine, SamplingParams

pytestmark = pytest.mark.gpu


def engine_of(kind: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 3, **options: Any) -> RolloutEngine:
    model = tiny.model(kind, seed=seed, **MODELS.get(kind, {})).to("cuda", dtype)
    return RolloutEngine(model, tiny.tokenizer(), **options)


def was_captured(engine: RolloutEngine) -> bool:
    steps = engine._runner.decode_steps.values()
    return bool(steps) and all(step.replay != step.compute for step in steps)


def tokens(drawn: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in drawn]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("share_prefixes", [True, False])
def test_greedy_equals_generate(kind: str, share_prefixes: bool) -> None:
    engine = engine_of(kind, max_batch_size=5, share_prefixes=share_prefixes)
    requests, expected = greedy_cases(kind)  # by generate, on the CPU
    assert tokens(engine.generate(requests)) == expected
    assert was_captured(engine)
    engine.cache.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_branches_at_every_token_continue_the_trajectory(kind: str) -> None:
    engine = engine_of(kind, block_size=4)
    prompt = prompts(1, seed=2)[0]
    (whole,) = engine.generate([Request(prompt, sampling=GREEDY, keep=True)])
    cuts = [prompt + whole.token_ids[:t] for t in range(len(whole.token_ids))]
    for completion in engine.generate([Request(c, n=2, sampling=GREEDY, trace=whole.trace) for c in cuts]):
        ahead = whole.token_ids[completion.request_index :]
        assert completion.token_ids[: len(ahead)] == ahead


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_teacher_forcing(kind: str) -> None:
    engine = engine_of(kind, seed=1)
    on_host = tiny.model(kind, seed=1, **MODELS[kind])
    params = SamplingParams(temperature=0.7, max_tokens=30)
    for completion in engine.generate([Request(p, n=3, sampling=params, seed=i) for i, p in enumerate(prompts(5))]):
        for own, temperature in ((completion.logprobs, 1.0), (completion.sampling_logprobs, 0.7)):
            forced = teacher_forced(on_host, completion, temperature)
            assert (torch.tensor(own) - forced).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logprobs_are_near_teacher_forcing(kind: str) -> None:
    engine = engine_of(kind, torch.bfloat16, seed=1, max_batch_size=16)
    drawn = engine.generate([Request(p, n=3, sampling=SamplingParams(max_tokens=30)) for p in prompts(5)])
    exact = tiny.model(kind, seed=1, **MODELS[kind]).to(torch.bfloat16).float()
    own = torch.cat([torch.tensor(c.logprobs) for c in drawn])
    truth = torch.cat([unrounded_head(exact, c) for c in drawn])
    forced = torch.cat([teacher_forced(exact.to(torch.bfloat16), c) for c in drawn])
    assert (own - truth).square().mean().sqrt() <= 1.5 * (forced - truth).square().mean().sqrt() + 1e-4


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, top_k=20, top_p=0.9)])
def test_graphs_change_no_token(params: SamplingParams) -> None:
    """64 branches that end at different times: buckets of all sizes, with and without padding."""
    requests = [Request(p, n=8, sampling=params, seed=i) for i, p in enumerate(prompts(8, seed=4))]
    engines = [engine_of("llama", fast_forward=graphs) for graphs in (True, False)]
    replayed, launched = (engine.generate(requests) for engine in engines)
    assert tokens(replayed) == tokens(launched)
    for ours, theirs in zip(replayed, launched):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert was_captured(engines[0])
    assert not engines[1]._runner.decode_steps


def test_replayed_graphs_see_new_weights() -> None:
    engine = engine_of()
    requests = [Request(p, sampling=GREEDY) for p in prompts(4)]
    engine.generate(requests)
    captured = dict(engine._runner.decode_steps)
    with torch.no_grad():
        for weight in engine.model.parameters():
            weight.mul_(1.3)
    engine.update_weights()
    fresh = RolloutEngine(engine.model, tiny.tokenizer(), fast_forward=False)
    assert tokens(engine.generate(requests)) == tokens(fresh.generate(requests))
    assert captured.items() <= engine._runner.decode_steps.items()


def test_a_pool_that_is_too_small_preempts_and_changes_no_token() -> None:
    requests = [Request(p, n=2, sampling=SamplingParams(max_tokens=40), seed=i) for i, p in enumerate(prompts(6))]
    roomy = engine_of(block_size=4)
    tight = engine_of(block_size=4, kv_cache_memory=24 * roomy.block_bytes)
    assert tokens(tight.generate(requests)) == tokens(roomy.generate(requests))
    assert tight.stats()["preemptions"] > 0


def test_a_model_that_waits_for_the_device_runs_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamic rotary positions compare the largest position with a limit on the host."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = tiny.model("llama", seed=3, rope_parameters=rope).cuda()
    requests = [Request(p, sampling=GREEDY) for p in prompts(4)]
    with caplog.at_level(logging.WARNING, "gpo_fast"):
        drawn = RolloutEngine(model, tiny.tokenizer()).generate(requests)
    assert len(caplog.records) == 1
    assert "decode steps run kernel by kernel" in caplog.text
    assert tokens(drawn) == tokens(RolloutEngine(model, tiny.tokenizer(), fast_forward=False).generate(requests))
    torch.cuda.synchronize()
