"""Tree attention against attention with the dense mask that it never builds."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from trees import grow, packed_hidden

from gpo_fast import _C, tree_attention
from gpo_fast.packing import PackedBatch
from gpo_fast.tree_attention import TreeShape, attend_flex, tree_attention_of


def dense(query: Tensor, key: Tensor, value: Tensor, tree: TreeShape, scale: float) -> Tensor:
    i, j = torch.arange(len(query))[:, None], torch.arange(len(query))
    hidden = ~((j <= i) & (i < tree.subtree_end))
    groups = query.shape[1] // key.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, k) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def sdpa(query: Tensor, key: Tensor, value: Tensor, tree: TreeShape, scale: float) -> Tensor:
    i, j = torch.arange(len(query))[:, None], torch.arange(len(query))
    mask = (j <= i) & (i < tree.subtree_end)
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def packed_tree(branches: int = 30, longest: int = 40) -> PackedBatch:
    return grow(int(torch.randint(2**31, ())), branches=branches, longest=longest).pack()


def inputs(count: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(count, heads, 16, dtype=dtype, requires_grad=True) for heads in (6, 2, 2)]


def with_gradients(attend, tensors: list[Tensor], weights: Tensor, *args) -> list[Tensor]:
    output = attend(*tensors, *args)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors)]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    return max(float(((f.double() - t).norm() / t.norm()).detach()) for f, t in zip(found, truth))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_blocks_equal_the_dense_mask(dtype: torch.dtype, tolerance: float) -> None:
    for _ in range(5):
        tree = packed_tree().tree
        tensors = inputs(len(tree.subtree_end), dtype)
        weights = torch.randn_like(tensors[0])
        truth = with_gradients(dense, [t.detach().double().requires_grad_() for t in tensors], weights, tree, 0.3)
        assert error(with_gradients(tree_attention.tree_attention, tensors, weights, tree, 0.3), truth) <= tolerance


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_as_near_as_sdpa_with_the_dense_mask(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native:  # as on a CPU with products of bfloat16, where the merged parts are rounded to it
        monkeypatch.setattr(tree_attention, "_compute_dtype", lambda dtype: dtype)
    excess = []
    for _ in range(10):
        tree = packed_tree().tree
        tensors = [t.detach().bfloat16().requires_grad_() for t in inputs(len(tree.subtree_end), torch.float32)]
        weights = torch.randn_like(tensors[0])
        truth = with_gradients(dense, [t.detach().double().requires_grad_() for t in tensors], weights, tree, 0.3)
        ours = with_gradients(tree_attention.tree_attention, tensors, weights, tree, 0.3)
        excess.append(error(ours, truth) - error(with_gradients(sdpa, tensors, weights, tree, 0.3), truth))
    assert sum(excess) <= 0


@pytest.fixture
def amx() -> None:
    if not _C.tree_attention_supported(dim=64):
        pytest.skip("this machine lacks AMX")


def assert_amx_is_exact(tree: TreeShape, heads: tuple[int, int], dim: int) -> None:
    """Output and gradients are no farther from float64 than 1.5 times torch's flash attention of bfloat16, or 1e-2."""
    shapes = [(len(tree.subtree_end), count, dim) for count in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    weights, scale = torch.randn(shapes[0]).bfloat16(), dim**-0.5
    truth = with_gradients(dense, [t.detach().double().requires_grad_() for t in tensors], weights, tree, scale)
    ours = with_gradients(tree_attention._AmxAttention.apply, tensors, weights, tree, scale)
    flash = with_gradients(tree_attention._BlockAttention.apply, tensors, weights, tree, scale)
    for found, peer, exact in zip(ours, flash, truth):
        assert error([found], [exact]) <= max(1.5 * error([peer], [exact]), 1e-2)


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
def test_amx_is_as_near_as_flash_attention(heads: tuple[int, int], dim: int, amx: None) -> None:
    for longest in (1, 5, 90):
        assert_amx_is_exact(packed_tree(branches=12, longest=longest).tree, heads, dim)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 129])
def test_amx_of_one_line(length: int, amx: None) -> None:
    ends = torch.full((length,), length, dtype=torch.int32)
    assert_amx_is_exact(TreeShape(ends, [(0, length)], []), (3, 1), 64)


def test_amx_serves_any_strides_and_threads_alike(amx: None) -> None:
    tree = packed_tree(branches=12, longest=60).tree
    count = len(tree.subtree_end)
    dense_tensors = [torch.randn(count, heads, 64).bfloat16() for heads in (6, 2, 2)]
    across = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in dense_tensors]
    inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in dense_tensors]
    weights = torch.randn(count, 6, 64).bfloat16()
    threads = torch.get_num_threads()
    results = []
    for tensors, used in ((dense_tensors, 1), (across, 2), (inside, 3)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        torch.set_num_threads(used)
        try:
            results.append(with_gradients(tree_attention.tree_attention, leaves, weights, tree, 0.125))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_amx_takes_large_scores_and_keeps_nan(amx: None) -> None:
    length = 70
    tree = TreeShape(torch.full((length,), length, dtype=torch.int32), [(0, length)], [])
    tensors = [(torch.randn(length, 1, 32) * size).bfloat16() for size in (100, 100, 1)]
    out = tree_attention.tree_attention(*tensors, tree, 1.0)
    exact = dense(*(t.double() for t in tensors), tree, 1.0)
    assert error([out], [exact]) <= 1e-2
    tensors[0][40] = math.nan
    spoiled = tree_attention.tree_attention(*tensors, tree, 1.0)
    assert bool(spoiled[40].isnan().all())
    assert torch.equal(spoiled[:40], out[:40])
    assert torch.equal(spoiled[41:], out[41:])


@pytest.mark.parametrize(("dim", "way"), [(64, "C++ (amx)"), (16, "torch's flash attention")])
def test_the_log_says_once_which_path_runs(dim: int, way: str, amx: None, caplog: pytest.LogCaptureFixture) -> None:
    tree = packed_tree().tree
    tensors = [torch.randn(len(tree.subtree_end), heads, dim).bfloat16() for heads in (2, 1, 1)]
    tree_attention._announce.cache_clear()
    with caplog.at_level("INFO", logger="gpo_fast.tree_attention"):
        for _ in range(2):
            tree_attention.tree_attention(*tensors, tree, 1.0)
    assert [way in message for message in caplog.messages].count(True) == 1


def test_autocast_casts_as_sdpa_does() -> None:
    tree = packed_tree().tree
    tensors = [torch.randn(len(tree.subtree_end), heads, 64, requires_grad=True) for heads in (6, 2, 2)]
    rounded = [t.detach().bfloat16().requires_grad_() for t in tensors]
    weights = torch.randn(len(tree.subtree_end), 6, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [tensors[0], tensors[1], tensors[2].bfloat16()]
        out = tree_attention.tree_attention(*mixed, tree, 0.125)
        assert out.dtype == sdpa(*mixed, tree, 0.125).dtype == torch.bfloat16
    expected = with_gradients(tree_attention.tree_attention, rounded, weights, tree, 0.125)
    assert torch.equal(out, expected[0])
    for gradient, exact in zip(torch.autograd.grad((out * weights).sum(), tensors), expected[1:]):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, exact.float())


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Block lists as a mask [query blocks, key blocks]."""
    mask = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist())):
        mask[row, columns[:count]] = True
    return mask


def test_flex_attention_has_the_same_mask() -> None:
    for _ in range(3):
        packed = packed_tree(branches=64, longest=60).filled()
        tree = packed.tree
        assert packed.unique_tokens == len(tree.subtree_end) == len(packed.position_ids[0])
        assert packed.unique_tokens % 128 == 0
        tensors = [t.detach() for t in inputs(len(tree.subtree_end), torch.float32)]  # no backward on a CPU
        truth = dense(*(t.double() for t in tensors), tree, 0.3)
        assert error([attend_flex(*tensors, tree, 0.3, flex_attention)], [truth]) <= 1e-5
        # The lists of blocks are what a compiled kernel goes by, so they must name every block that is seen.
        i, j = torch.arange(packed.unique_tokens)[:, None], torch.arange(packed.unique_tokens)
        seen = ((j <= i) & (i < tree.subtree_end)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        mask = tree.block_mask
        partial = listed(mask.kv_num_blocks, mask.kv_indices)
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert torch.equal(full & partial, torch.zeros_like(full))
        assert torch.equal(full, seen.all(dim=3).all(dim=1))
        assert bool((partial | full)[seen.any(dim=3).any(dim=1)].all())


def test_filling_changes_nothing() -> None:
    packed = packed_tree()
    model = tiny.model().double()
    with tree_attention_of(model):
        assert torch.equal(packed_hidden(model, packed), packed_hidden(model, packed.filled()))


def test_misuse_is_refused() -> None:
    tree = packed_tree().tree
    with pytest.raises(ValueError, match=f"the tree has {len(tree.subtree_end)} tokens, the query 3"):
        tree_attention.tree_attention(*inputs(3, torch.float32), tree, 1.0)
    model = tiny.model()
    with pytest.raises(RuntimeError, match="needs the keyword argument `tree`"), tree_attention_of(model):
        model(torch.tensor([[4, 5]]))
