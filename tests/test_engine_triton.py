"""Steps of Triton kernels draw what the CPU's do: graphs or not, padded or not, in any company.

Without a GPU the kernels run in Triton's interpreter and a replayed graph is a plain call over the same buffers, so
the sizes are tiny. With a GPU the same tests compile kernels and capture graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_engine import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

from gpo_fast import Completion, Request, RolloutEngine, SamplingParams
from gpo_fast.rollout import engine as engine_module
from gpo_fast.rollout import runner_gpu
from gpo_fast.rollout.runner import HostRunner
from gpo_fast.rollout.runner_gpu import GpuRunner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Make = Callable[..., RolloutEngine]
Draw = Callable[[Make], list[Completion]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], Make]:
    """Engines with one runner or the other, of models with the same weights."""

    def with_runner(runner: type) -> Make:
        def engine(kind: str = "qwen3", changes: dict[str, Any] | None = None, **options: Any) -> RolloutEngine:
            monkeypatch.setattr(engine_module, "runner_for", lambda device: runner)
            model = tiny.model(kind, seed=3, **(SMALL | (changes or {})))
            model = model.to(DEVICE if runner is GpuRunner else "cpu")
            return RolloutEngine(model, tiny.tokenizer(), **({"block_size": 4} | options))

        return engine

    return with_runner


def asked(lengths: list[int], n: int = 1, **sampling: Any) -> list[Request]:
    """Requests with a common beginning that draw so many tokens each."""
    params = [SamplingParams(max_tokens=m, ignore_eos=True, **sampling) for m in lengths]
    return [Request(range(3, 12 + 2 * i), n=n, sampling=p, seed=i) for i, p in enumerate(params)]


def greedy(make: Make) -> list[Completion]:
    return make().generate(asked([4, 3, 5], temperature=0))


def sampled(make: Make) -> list[Completion]:
    return make("llama", {"num_hidden_layers": 2}).generate(asked([5, 2], n=2, temperature=1.3))


def filtered(make: Make) -> list[Completion]:
    return make().generate([*asked([2], top_k=9, top_p=0.8, min_p=0.01), *asked([3], temperature=0.8)])


def in_chunks(make: Make) -> list[Completion]:
    """Prompts computed a few tokens at a time, beside branches that decode."""
    return make(max_prefill_tokens=5, max_batch_size=3).generate(asked([5, 3, 2], n=2))


def unshared(make: Make) -> list[Completion]:
    return make(share_prefixes=False, block_size=8).generate(asked([3, 4], n=2))


def forked(make: Make) -> list[Completion]:
    """Continuations of every cut point of a kept trajectory, where pages are shared in part and copied on write."""
    engine = make()
    (kept,) = engine.generate([Request(range(3, 10), 1, SamplingParams(max_tokens=5, ignore_eos=True), 1, keep=True)])
    cuts = [[*kept.prompt_token_ids, *kept.token_ids[:t]] for t in range(5)]
    few = SamplingParams(max_tokens=2, ignore_eos=True)
    return [kept, *engine.generate([Request(c, 2, few, seed=i, trace=kept.trace) for i, c in enumerate(cuts)])]


def preempted(make: Make) -> list[Completion]:
    roomy = make()
    tight = make(kv_cache_memory=8 * roomy.block_bytes)
    drawn = tight.generate([Request([3 + i], 1, SamplingParams(max_tokens=14, ignore_eos=True), i) for i in range(3)])
    assert tight.stats()["preemptions"] > 0
    return drawn


def cancelled(make: Make) -> list[Completion]:
    """One branch leaves in the middle, and one request comes in."""
    stream = make().stream(asked([8, 3, 8]))
    drawn = [next(stream)]
    stream.cancel(0)
    stream.add(asked([2]))
    return sorted([*drawn, *stream], key=lambda c: c.request_index)


def with_new_weights(make: Make) -> list[Completion]:
    engine = make()
    before = engine.generate(asked([3], n=2))
    with torch.no_grad():
        for weight in engine.model.parameters():
            weight.mul_(1.2)
    engine.update_weights()
    return [*before, *engine.generate(asked([3], n=2))]


ALL = [greedy, sampled, filtered, in_chunks, unshared, forked, preempted, cancelled, with_new_weights]


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_replayed_steps_draw_what_the_cpu_draws(draw: Draw, make: Callable[[type], Make]) -> None:
    assert_same(draw(make(GpuRunner)), draw(make(HostRunner)))


@pytest.mark.parametrize("draw", [greedy, sampled, forked], ids=lambda draw: draw.__name__)
def test_steps_kernel_by_kernel_draw_what_the_cpu_draws(draw: Draw, make: Callable[[type], Make]) -> None:
    without_graphs = make(GpuRunner)
    assert_same(draw(lambda *a, **k: without_graphs(*a, fast_forward=False, **k)), draw(make(HostRunner)))


def assert_same(drawn: list[Completion], expected: list[Completion]) -> None:
    assert [c.token_ids for c in drawn] == [c.token_ids for c in expected]
    assert [c.finish_reason for c in drawn] == [c.finish_reason for c in expected]
    for ours, theirs in zip(drawn, expected):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.sampling_logprobs == pytest.approx(theirs.sampling_logprobs, abs=1e-4)


def test_steps_are_padded_to_buckets_whose_buffers_stay(make: Callable[[type], Make]) -> None:
    engine = make(GpuRunner)(max_batch_size=3)
    steps = engine._runner.decode_steps
    engine.generate(asked([3, 4, 6]))
    assert {bucket.rows for bucket in steps} == {1, 2, 3}  # 4 would be the next power of two
    places = {bucket: step.arrays.device["tokens"].data_ptr() for bucket, step in steps.items()}
    engine.update_weights()
    engine.generate(asked([3, 4, 6]))
    assert {bucket: step.arrays.device["tokens"].data_ptr() for bucket, step in steps.items()} == places
    assert engine.stats()["shared_reads_saved"] > 0
    engine.cache.check_integrity()


def test_a_graph_that_cannot_be_captured_is_logged_once_and_changes_no_token(
    make: Callable[[type], Make], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = greedy(make(HostRunner))
    monkeypatch.setattr(runner_gpu, "captured", refuse)
    with caplog.at_level(logging.WARNING, "gpo_fast"):
        assert_same(greedy(make(GpuRunner)), expected)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["decode steps run kernel by kernel"]
    assert "not permitted when stream is capturing" in caplog.text


def test_graphs_go_with_the_weights_that_they_hold_the_addresses_of(make: Callable[[type], Make]) -> None:
    peft = pytest.importorskip("peft")
    engine = make(GpuRunner)()
    peft_model = peft.get_peft_model(engine.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    engine.update_weights()  # the adapter has weights of its own
    engine.generate(asked([2]))
    assert len(engine._runner.decode_steps) == 1
    with torch.no_grad():
        for parameter in peft_model.parameters():
            parameter.mul_(1.1)
    engine.update_weights()
    assert len(engine._runner.decode_steps) == 1  # new values in the same place
    peft_model.merge_adapter()
    engine.update_weights()
    assert len(engine._runner.decode_steps) == 0  # the captured products of the adapter would be added to the merged


def test_what_the_kernels_do_not_handle_is_refused(make: Callable[[type], Make]) -> None:
    with pytest.raises(ValueError, match="on a GPU block_size must be a power of two, got 12"):
        make(GpuRunner)(block_size=12)
    with pytest.raises(ValueError, match="head sizes from 1 to 256"):
        make(GpuRunner)(changes={"head_dim": 512})


class _NoWaiting(TorchDispatchMode):
    """Refuses what a stream that is being captured refuses: reading a value on the host, and sending one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        if func is torch.ops.aten.nonzero.default:
            raise RuntimeError("operation not permitted when stream is capturing: the size of the result is data")
        return func(*args, **(kwargs or {}))


def like_a_capture(compute: Callable[[], None], *arguments: Any) -> Callable[[], None]:
    with _NoWaiting():
        compute()
    return compute


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="stands in for a capture where there is none")
@pytest.mark.parametrize(
    ("kind", "changes", "can_be_captured"),
    [*((kind, changes, True) for kind, changes in MODELS.items()), ("llama", DYNAMIC, False)],
    ids=[*MODELS, "dynamic positions"],
)
def test_decode_steps_do_nothing_that_a_capture_forbids(
    kind: str,
    changes: dict[str, Any],
    can_be_captured: bool,
    make: Callable[[type], Make],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the models' modules and in ours. Dynamic positions are looked at on the host, and that is found out."""
    monkeypatch.setattr(runner_gpu, "captured", like_a_capture)
    engine = make(GpuRunner)(kind, SMALL | {"hidden_size": 64} | changes)
    with caplog.at_level(logging.WARNING, "gpo_fast"):
        engine.generate([Request([5, 6], 2, SamplingParams(max_tokens=2, ignore_eos=True), seed=1)])
    assert bool(engine._runner.decode_steps) == can_be_captured
    assert bool(caplog.records) != can_be_captured
