"""Prompts by flash-attn on a GPU: the same tokens, and only where flash-attn computes them.

Without a GPU a float64 reference stands in for flash-attn's function, and the rest of a step runs in Triton's
interpreter. With one, and with flash-attn, the bfloat16 models of test_engine_gpu.py run it too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_engine_triton
import torch
from gpo_fast.kernels.work_list import PlanArrays
from test_engine_triton import Draw, Make, asked, assert_same, cancelled, forked, greedy, in_chunks, preempted, unshared
from torch import Tensor

from gpo_fast import Completion, Request, SamplingParams
from gpo_fast.rollout import flash, runner_gpu
from gpo_fast.rollout.attention import KVPool
from gpo_fast.rollout.attention_gpu import attend_shared, prepare, with_chunks
from gpo_fast.rollout.flash import PromptAttention
from gpo_fast.rollout.runner import Chunk, HostRunner, Step
from gpo_fast.rollout.runner_gpu import GpuRunner

make = test_engine_triton.make  # the fixture
Runners = Callable[[type], Make]


@dataclass
class Reference:
    """What flash-attn documents of `flash_attn_varlen_func`, in float64. Notes the sequences of each call."""

    calls: list[list[tuple[int, int]]] = field(default_factory=list)  # (queries, keys) of each sequence

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
        softcap: float,
    ) -> Tensor:
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (len(q), len(k)) == (cu_seqlens_q[-1], cu_seqlens_k[-1])
        queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k)
        self.calls.append(list(zip(queries, keys)))
        group = q.shape[1] // k.shape[1]
        out = []
        for q_i, k_i, v_i in zip(q.double().split(queries), k.double().split(keys), v.double().split(keys)):
            k_i, v_i = k_i.repeat_interleave(group, dim=1), v_i.repeat_interleave(group, dim=1)
            scores = softmax_scale * torch.einsum("qhd,khd->hqk", q_i, k_i)
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k_i) - len(q_i))  # the last sees all
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v_i))
        return torch.cat(out).to(q.dtype)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Reference:
    function = Reference()
    monkeypatch.setattr(runner_gpu, "flash_attention", lambda pool: function)
    return function


def behind_prefixes(make: Make) -> list[Completion]:
    """Chunks of several prompts in one step, some behind cached prefixes, beside branches that decode."""
    engine = make("llama", {"num_hidden_layers": 2, "num_attention_heads": 4}, max_prefill_tokens=9, max_batch_size=5)
    few = SamplingParams(max_tokens=7, ignore_eos=True)
    other = [Request(range(40 + 9 * i, 46 + 9 * i), sampling=few, seed=i) for i in range(3)]
    return [*engine.generate(asked([3])), *engine.generate([*asked([6, 2, 4], n=2), *other])]


def with_capped_scores(make: Make) -> list[Completion]:
    return make("qwen3", {"attn_logit_softcapping": 0.5}, fast_forward=False).generate(asked([3, 2], temperature=0.7))


@pytest.mark.parametrize(
    "draw",
    [greedy, in_chunks, unshared, forked, preempted, cancelled, behind_prefixes, with_capped_scores],
    ids=lambda draw: draw.__name__,
)
def test_prompts_by_flash_attention_draw_what_the_cpu_draws(draw: Draw, make: Runners, reference: Reference) -> None:
    assert_same(draw(make(GpuRunner)), draw(make(HostRunner)))
    assert reference.calls


def test_chunks_go_to_flash_attention_and_decoding_rows_do_not(
    make: Runners,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[Step] = []
    run = GpuRunner.run

    def noted(runner: GpuRunner, step: Step) -> Any:
        steps.append(step)
        return run(runner, step)

    monkeypatch.setattr(GpuRunner, "run", noted)
    behind_prefixes(make(GpuRunner))
    expected = [[(c.stop - c.first, c.stop) for c in step.chunks] for step in steps if step.chunks]
    assert reference.calls == [call for call in expected for _ in range(2)]  # of each layer
    assert any(len(call) > 1 for call in expected)
    assert any(keys > queries > 1 for call in expected for queries, keys in call)
    assert any(step.running and step.chunks for step in steps)


def pool_of(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Any:
    keys = SimpleNamespace(shape=(1, 16, 1, head_dim), dtype=dtype, device=torch.device(device))
    return SimpleNamespace(keys=keys)


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (pool_of(device="cpu"), "the device is 'cpu'"),
        (pool_of(dtype=torch.float32), "keys are float32"),
        (pool_of(head_dim=264), "the head size is 264"),
        (pool_of(head_dim=100), "the head size is 100"),
    ],
)
def test_what_flash_attention_does_not_compute_is_refused(pool: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        flash.flash_attention(pool)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="older than Ampere"):
        flash.flash_attention(pool_of())


@pytest.mark.parametrize("head_dim", [8, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_flash_attention_computes_is_its_own(
    head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    installed = SimpleNamespace(flash_attn_varlen_func=Reference())
    monkeypatch.setitem(sys.modules, "flash_attn", installed)
    assert flash.flash_attention(pool_of(head_dim, dtype)) is installed.flash_attn_varlen_func


def test_the_log_says_what_computes_the_prompts(
    make: Runners,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(pool: KVPool) -> Any:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(runner_gpu, "flash_attention", broken)
    with caplog.at_level(logging.INFO, "gpo_fast"):
        make(GpuRunner)()
        monkeypatch.setattr(runner_gpu, "flash_attention", lambda pool: Reference())
        make(GpuRunner)()
    first, second = (r.getMessage() for r in caplog.records if "rollouts run" in r.getMessage())
    assert "prompts with the same attention (no flash-attn: undefined symbol: _ZN3c10), decode steps" in first
    assert "prompts with flash-attn's attention, decode steps" in second


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 128), (8, 1, 256), (2, 1, 40)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_flash_attention_is_as_near_as_triton(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, softcap: float
) -> None:
    """Chunks behind prefixes of other lengths, against float64: no farther than twice our kernel, or a rounding."""
    pytest.importorskip("flash_attn")
    device = torch.device("cuda")
    pool = KVPool(1, 64, 16, kv_heads, head_dim, dtype, device)
    pool.keys.normal_()
    pool.values.normal_()
    pages = np.random.default_rng(0).permutation(64).astype(np.int32)
    chunks = [Chunk(pages[:10], 37, 150), Chunk(pages[10:12], 0, 17), Chunk(pages[12:40], 400, 433)]
    rows = sum(c.stop - c.first for c in chunks)
    queries = torch.randn(rows, heads, head_dim, dtype=dtype, device=device)
    lengths = torch.cat([torch.arange(c.first, c.stop) + 1 for c in chunks]).to(device, torch.int32)
    keys, values, scale = pool.keys[0], pool.values[0], head_dim**-0.5
    none, zero = np.zeros(0, np.int32), np.zeros(1, np.int32)
    plan = with_chunks(PlanArrays(none, none, zero, none, zero, none, none, zero, none), chunks)
    work = prepare(plan, block_size=16, heads=heads, kv_heads=kv_heads, device=device)
    triton = attend_shared(queries, keys, values, work, lengths, scale, softcap)
    ours = PromptAttention(flash.flash_attention(pool), chunks, pool).attend(queries, keys, values, scale, softcap)
    on_host: Any = SimpleNamespace(keys=pool.keys.cpu(), block_size=16)
    wide = (t.double().cpu() for t in (queries, keys, values))
    exact = PromptAttention(Reference(), chunks, on_host).attend(*wide, scale, softcap)
    far, near = ((found.double().cpu() - exact).norm() / exact.norm() for found in (ours, triton))
    assert far <= max(2 * near, torch.finfo(dtype).eps)
