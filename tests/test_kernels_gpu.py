"""The kernels at real sizes, on a GPU: against float64, bit by bit from run to run, and inside CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpo_fast.bench.triton_kernels import comb_plan
from gpo_fast.kernels.kv_blocks import copy_blocks, write_kv
from gpo_fast.kernels.sampling import sample_tokens
from gpo_fast.kernels.shared_attention import shared_attention
from gpo_fast.kernels.tree_attention import tree_attention, tree_blocks
from test_kernels_sampling import draw, streams
from test_kernels_shared_attention import TOLERANCE, Forest, assert_close, reference
from test_kernels_tree_attention import assert_equals_dense, random_subtree_ends

from gpo_fast.rollout.attention_gpu import attend_shared, prepare, room_for
from gpo_fast.rollout.sampler import sample, uniforms
from gpo_fast.rollout.types import SamplingParams

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def comb(prompts: int, branches: int, prefix: int, tail: int, block_size: int = 16) -> Forest:
    """`prompts` prefixes, each shared by `branches` rows with private tails."""
    rows, shared, private = prompts * branches, prefix // block_size, -(-tail // block_size)
    names = np.random.default_rng(0).permutation(prompts * shared + rows * private).astype(np.int32)
    plan = comb_plan(names, prompts, branches, prefix, tail, block_size)
    lengths = (prefix + tail - np.arange(rows) % min(block_size, tail)).astype(np.int32)
    slots = []
    for row in range(rows):
        own = [plan.pages.reshape(prompts, -1)[row // branches], plan.tail_pages.reshape(rows, -1)[row]]
        pages = np.concatenate(own).astype(np.int64)
        slots.append((pages[:, None] * block_size + np.arange(block_size)).reshape(-1)[: lengths[row]])
    return Forest(plan, slots, lengths, len(names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(16, 8, 128), (12, 2, 128), (9, 3, 64), (8, 1, 256), (32, 32, 96)]
)
def test_shared_attention_at_real_sizes(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    forest = comb(prompts=4, branches=16, prefix=1024, tail=200)
    q = torch.randn(64, heads, head_dim, device=CUDA, dtype=dtype)
    keys, values = (torch.randn(forest.num_pages * 16, kv_heads, head_dim, device=CUDA, dtype=dtype) for _ in range(2))
    work = prepare(forest.plan, block_size=16, heads=heads, kv_heads=kv_heads, device=CUDA)
    lengths = torch.from_numpy(forest.lengths).to(CUDA)
    ours = attend_shared(q, keys, values, work, lengths, head_dim**-0.5)
    assert_close(ours, reference(q, keys, values, forest, head_dim**-0.5, 0.0), dtype)
    assert torch.equal(ours, attend_shared(q, keys, values, work, lengths, head_dim**-0.5))


def test_shared_attention_replays_in_a_cuda_graph_with_new_contents() -> None:
    q = torch.randn(64, 16, 128, device=CUDA, dtype=torch.bfloat16)
    keys, values = (torch.randn(40_000, 8, 128, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    work = room_for(64, 2048, levels=2, block_size=16, heads=16, kv_heads=8, device=CUDA)
    lengths = torch.zeros(64, dtype=torch.int32, device=CUDA)
    shared_attention(q, keys, values, work, lengths, 0.1)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend_shared(q, keys, values, work, lengths, 0.1)
    for prompts, branches, prefix, tail in [(2, 20, 1024, 100), (8, 8, 512, 17), (1, 5, 1600, 300)]:
        forest = comb(prompts, branches, prefix, tail)
        rows = len(forest.lengths)
        prepare(forest.plan, block_size=16, heads=16, kv_heads=8, device=CUDA, into=work)
        lengths.zero_()
        lengths[:rows] = torch.from_numpy(forest.lengths).to(CUDA)
        graph.replay()
        assert_close(out[:rows], reference(q[:rows], keys, values, forest, 0.1, 0.0), torch.bfloat16)
        assert torch.equal(out[rows:], torch.zeros_like(out[rows:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (9, 3, 64), (4, 2, 96), (4, 1, 256)])
def test_tree_attention_at_real_sizes(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    ends = random_subtree_ends(np.random.default_rng(1), 2000)
    assert_equals_dense(ends, heads, kv_heads, head_dim, dtype)


def test_tree_attention_in_float32_and_gradients_are_deterministic() -> None:
    assert TOLERANCE[torch.float32] < 1e-5
    ends = random_subtree_ends(np.random.default_rng(2), 1500)
    assert_equals_dense(ends, 4, 2, 128, torch.float32)
    subtree_end = torch.from_numpy(random_subtree_ends(np.random.default_rng(3), 16_000)).to(CUDA)
    count = len(subtree_end)
    blocks = tree_blocks(subtree_end, 128, torch.bfloat16)
    given = [torch.randn(count, h, 128, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for h in (16, 8, 8)]
    grads = []
    for _ in range(2):
        out = tree_attention(*given, subtree_end, 0.09, blocks)
        grads.append(torch.autograd.grad(out.float().square().sum(), given))
    for first, second in zip(*grads):
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)


@pytest.mark.parametrize("filtered", [False, True])
def test_sampling_from_a_real_vocabulary(filtered: bool) -> None:
    logits = torch.randn(64, 151_936) * 3
    params = [SamplingParams(temperature=0.8), SamplingParams(temperature=0)] * 32
    if filtered:
        params[::4] = [SamplingParams(temperature=0.7, top_k=50, top_p=0.9)] * 16
        params[2::4] = [SamplingParams(top_p=0.95, min_p=0.01)] * 16
    keys, positions = streams(64)
    tokens, logprobs, sampling_logprobs = sample(logits, params, uniforms(keys, positions))
    got = draw(logits, params, keys, positions)
    same = got.tokens.numpy() == tokens
    assert same.sum() >= 63  # a draw can fall within rounding of a boundary between two tokens
    assert np.allclose(got.logprobs.numpy()[same], logprobs[same], atol=2e-5)
    assert np.allclose(got.sampling_logprobs.numpy()[same], sampling_logprobs[same], atol=1e-4)


def test_sampling_replays_in_a_cuda_graph() -> None:
    logits = torch.randn(8, 50_000, device=CUDA)
    keys, positions = (torch.from_numpy(a.view(np.int64)).to(CUDA) for a in streams(8))
    temperature = torch.ones(8, device=CUDA)
    sample_tokens(logits, keys, positions, temperature)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample_tokens(logits, keys, positions, temperature)
    for _ in range(3):
        positions += 1
        graph.replay()
        assert torch.equal(out.tokens, sample_tokens(logits, keys, positions, temperature).tokens)


def test_pools_beyond_two_to_the_31_elements() -> None:
    # 3 layers x 800,000 slots x 8 heads x 128: 2.46e9 elements, 4.9 GB each for keys and values.
    keys, values = (torch.empty(3, 800_000, 8, 128, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    new = torch.randn(2, 8, 128, device=CUDA, dtype=torch.bfloat16)
    write_kv(new, -new, keys[2], values[2], torch.tensor([799_999, 799_990], device=CUDA))
    assert torch.equal(keys[2, 799_999], new[0])
    assert torch.equal(values[2, 799_990], -new[1])
    jobs = torch.tensor([[799_990], [799_980], [1]], dtype=torch.int32, device=CUDA)
    copy_blocks(keys, values, jobs, torch.ones(1, dtype=torch.int32, device=CUDA))
    assert torch.equal(keys[2, 799_980], new[1])
