"""The CPU attention kernels against float64, for every instruction set of this machine; the groups that they read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gpo_fast import _C
from gpo_fast.rollout.attention import KVPool, PagedBatch, attend_cpp, attend_gathered
from gpo_fast.rollout.memory import Arena
from gpo_fast.rollout.packed import Packed
from gpo_fast.rollout.segments import Segments, chunk_segment, concatenate, private_segments, shared_segments

BEST = _C.cpu_kernels()


@pytest.fixture(params=["amx", "avx512", "avx2", "portable"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        _C.use_cpu_kernels(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.use_cpu_kernels(BEST)


def random_segments(rows: int, num_pages: int, block_size: int) -> tuple[Segments, list[list[int]]]:
    """Segments of distinct pages with random rows, and the slots that each row sees."""
    pages = torch.randperm(num_pages).tolist()
    parts, slots = [], [[] for _ in range(rows)]
    while pages:
        count = int(torch.randint(1, 12, ()))
        mine, pages = pages[:count], pages[count:]
        chosen = torch.randperm(rows)[: int(torch.randint(1, rows + 1, ()))].numpy()
        visible = torch.randint(0, len(mine) * block_size + 1, (len(chosen),)).numpy()
        for row, seen in zip(chosen.tolist(), visible.tolist()):
            slots[row] += [page * block_size + i for page in mine for i in range(block_size)][:seen]
        ends = np.array([0, len(mine)]), np.array([0, len(chosen)])
        parts.append(Segments(ends[0], np.array(mine), ends[1], chosen, visible))
    return concatenate(parts), slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(4, 4, 32, 16), (9, 3, 64, 1), (8, 1, 20, 4), (2, 2, 256, 64)]
)
def test_attention_equals_float64(
    kernels: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, block_size: int
) -> None:
    pool = KVPool(1, 2000 // block_size, block_size, kv_heads, dim, dtype, torch.device("cpu"))
    pool.keys.normal_()
    pool.values.normal_()
    rows = 40
    query = torch.randn(rows, heads, dim, dtype=dtype)
    segments, slots = random_segments(rows, 2000 // block_size, block_size)
    batch = PagedBatch(pool, torch.empty(rows, dtype=torch.int64), segments)
    for softcap in (0.0, 5.0):
        ours = attend_cpp(query, pool.keys[0], pool.values[0], batch.plan(heads, 0.3, softcap)).double()
        gathered = attend_gathered(query, pool.keys[0], pool.values[0], batch, 0.3, softcap).double()
        for row in range(rows):
            keys, values = (
                x[0][slots[row]].repeat_interleave(heads // kv_heads, 1).double() for x in (pool.keys, pool.values)
            )
            scores = torch.einsum("hd,whd->hw", query[row].double() * 0.3, keys)
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            truth = torch.einsum("hw,whd->hd", scores.softmax(-1), values)
            bound = (1e-5 if dtype == torch.float32 else 2**-8) * (truth.norm() + 1)
            assert (ours[row] - truth).norm() <= bound
            assert (gathered[row] - truth).norm() <= bound


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize(("dim", "block_size"), [(64, 16), (64, 8), (40, 16), (128, 32)])
def test_attention_of_one_sequence_sees_only_its_own_keys(kernels: str, heads: int, dim: int, block_size: int) -> None:
    pool = KVPool(1, 800 // block_size, block_size, 1, dim, torch.bfloat16, torch.device("cpu"))
    pool.keys.fill_(torch.nan)  # what is not of the sequence
    pool.values.fill_(torch.nan)
    length = int(torch.randint(1, 700, ()))
    pages = torch.randperm(800 // block_size)[: -(-length // block_size)]
    slots = (pages[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
    keys, values = torch.randn(2, length, dim).bfloat16()
    pool.keys[0, slots, 0], pool.values[0, slots, 0] = keys, values
    query = torch.randn(1, heads, dim).bfloat16()
    batch = PagedBatch(pool, torch.empty(1, dtype=torch.int64), chunk_segment(pages.numpy(), 0, length - 1, length))
    for softcap in (0.0, 5.0):
        ours = attend_cpp(query, pool.keys[0], pool.values[0], batch.plan(heads, 0.3, softcap))[0].double()
        scores = query[0].double() * 0.3 @ keys.double().T
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        truth = scores.softmax(-1) @ values.double()
        assert (ours - truth).norm() <= 2**-8 * (truth.norm() + 1)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("block_size", [1, 16, 48, 64])  # from key 512 on, a piece begins within a page of 48
@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_row_alone_equals_the_row_among_many(kernels: str, kv_heads: int, block_size: int, group: int) -> None:
    """Of many sequences a task takes all KV heads of a piece, of one sequence a single head."""
    rows, dim, heads = 20, 64, kv_heads * group
    lengths = torch.randint(1, 100, (rows,)).numpy()
    lengths[0] = 512 + int(torch.randint(1, 100, ()))
    pages = -(-int(lengths.max()) // block_size)
    tables = torch.randperm(rows * pages).view(rows, pages).numpy()
    pool = KVPool(1, rows * pages, block_size, kv_heads, dim, torch.bfloat16, torch.device("cpu"))
    pool.keys.normal_()
    pool.values.normal_()
    query = torch.randn(rows, heads, dim).bfloat16()

    def attend(chosen: slice) -> torch.Tensor:
        segments = private_segments(tables[chosen], lengths[chosen], block_size)
        batch = PagedBatch(pool, torch.empty(len(lengths[chosen]), dtype=torch.int64), segments)
        return attend_cpp(query[chosen], pool.keys[0], pool.values[0], batch.plan(heads, 0.1, 0.0))

    together = attend(slice(None))
    for row in range(rows):
        slots = (torch.from_numpy(tables[row])[:, None] * block_size + torch.arange(block_size)).flatten()
        slots = slots[: lengths[row]]
        keys, values = (x[0][slots].repeat_interleave(group, 1).double() for x in (pool.keys, pool.values))
        weights = torch.einsum("hd,whd->hw", query[row].double() * 0.1, keys).softmax(-1)
        truth = torch.einsum("hw,whd->hd", weights, values)
        assert (together[row].double() - truth).norm() <= 2**-8 * (truth.norm() + 1)
        assert torch.equal(attend(slice(row, row + 1))[0], together[row])


def test_rows_that_see_nothing_get_zero(kernels: str) -> None:
    pool = KVPool(1, 2, 4, 1, 16, torch.float32, torch.device("cpu"))
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    empty = Segments(*(np.zeros(n, dtype=np.int32) for n in (1, 0, 1, 0, 0)))
    for segments in (empty, chunk_segment(np.array([0]), 0, -1, 0)):
        batch = PagedBatch(pool, torch.empty(1, dtype=torch.int64), segments)
        assert (attend_cpp(torch.randn(1, 2, 16), pool.keys[0], pool.values[0], batch.plan(2, 1.0, 0.0)) == 0).all()


def test_threads_change_nothing(kernels: str) -> None:
    pool = KVPool(1, 60, 16, 3, 64, torch.bfloat16, torch.device("cpu"))
    pool.keys.normal_()
    pool.values.normal_()
    query = torch.randn(20, 9, 64).bfloat16()
    segments, _ = random_segments(20, 60, 16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            batch = PagedBatch(pool, torch.empty(20, dtype=torch.int64), segments)
            results.append(attend_cpp(query, pool.keys[0], pool.values[0], batch.plan(9, 0.1, 0.0)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_groups_and_tails_hold_every_key_once(block_size: int) -> None:
    cache = _C.PrefixCache(400, block_size)
    root, _ = cache.open(np.arange(3, dtype=np.int32))
    cache.reserve([root], 100)
    cache.append([root], np.arange(100, dtype=np.int32), [100])
    sequences = [root, *cache.fork(root, 100, 3), *cache.fork(root, 41, 2), *cache.fork(root, 7, 2)]
    for step in range(5):
        cache.reserve(sequences, 1)
        cache.append(sequences, np.arange(len(sequences), dtype=np.int32) + 50 * step, 1)
        lengths = np.array([cache.length(s) for s in sequences])
        shared = shared_segments(cache.plan(sequences), lengths)
        private = private_segments(cache.block_tables(sequences), lengths, block_size)
        assert slots_of(shared, len(sequences), block_size) == slots_of(private, len(sequences), block_size)
        assert shared.saved_keys > 0
        assert private.saved_keys == 0


def slots_of(segments: Segments, rows: int, block_size: int) -> list[list[int]]:
    slots = [[] for _ in range(rows)]
    for s in range(len(segments.page_offsets) - 1):
        pages = segments.pages[segments.page_offsets[s] : segments.page_offsets[s + 1]]
        every = (pages[:, None] * block_size + np.arange(block_size)).flatten().tolist()
        for i in range(segments.row_offsets[s], segments.row_offsets[s + 1]):
            slots[segments.rows[i]] += every[: segments.visible[i]]
    return slots


def test_segments_that_do_not_fit_are_refused() -> None:
    pool = KVPool(1, 2, 4, 1, 16, torch.float32, torch.device("cpu"))
    segments = chunk_segment(np.array([0]), 0, 0, 5)  # five keys in one page of four
    with pytest.raises(ValueError, match="keys beyond its pages"):
        PagedBatch(pool, torch.empty(5, dtype=torch.int64), segments).plan(2, 1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 34), (200, 96), (10, 2)])
def test_packed_panels_hold_the_weight(dtype: torch.dtype, outputs: int, inputs: int, kernels: str) -> None:
    linear = torch.nn.Linear(inputs, outputs, dtype=dtype)
    packed = Packed([linear], dtype, Arena(block_bytes=1000))
    columns, pairs = (32, 2) if dtype == torch.bfloat16 else (64, 1)
    strips = packed.panels.view(-1, inputs // pairs, columns, pairs)
    whole = strips.transpose(1, 2).reshape(-1, inputs)
    assert torch.equal(whole[:outputs], linear.weight)
    assert not whole[outputs:].any()
