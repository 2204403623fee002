"""Forest-shared decode attention equals each row's own softmax over its own keys, for any forest of shared pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from aot import COMPILE_ALL, SHARED_LIMIT, Job, compile_ahead
from gpo_fast.kernels.shared_attention import shared_attention, tile_for
from gpo_fast.kernels.tl_utils import block_dim
from gpo_fast.kernels.work_list import (
    ITEM_FIELDS,
    LARGE_ROWS,
    SMALL_ROWS,
    DeviceWork,
    PlanArrays,
    WorkCapacity,
    build_work,
    plain_plan,
)
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of float32 sums of a few hundred terms, and of 16-bit inputs rounded once more on the way (the weights, the output).
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class Forest:
    """A plan, the keys of each row as slots in order, and each row's length."""

    plan: PlanArrays
    slots: list[np.ndarray]
    lengths: np.ndarray
    num_pages: int


def random_forest(rng: np.random.Generator, num_rows: int, block_size: int, depth: int, plain: bool = False) -> Forest:
    """Rows split into groups and these again, down to `depth`; each level shares 1 to 3 pages, or none."""
    groups: list[tuple[int, list[int], list[int]]] = []  # start, pages, rows
    row_pages: list[list[int]] = [[] for _ in range(num_rows)]
    free = iter(range(10**6))

    def split(rows: list[int], level: int) -> None:
        if level == depth or plain:
            return
        start = len(row_pages[rows[0]]) * block_size
        pages = [next(free) for _ in range(int(rng.integers(0, 4)))]
        if pages:
            groups.append((start, pages, rows))
            for row in rows:
                row_pages[row] += pages
        cuts = np.sort(rng.choice(len(rows) + 1, size=int(rng.integers(0, 3))))
        for part in np.split(np.array(rows), cuts):
            if len(part):
                split(part.tolist(), level + 1)

    split(list(range(num_rows)), 0)
    starts = np.array([len(p) * block_size for p in row_pages])
    # Empty tails where something is shared, tails of one key, and longer ones.
    tails = np.where(rng.random(num_rows) < 0.3, rng.integers(0, 2, num_rows), rng.integers(1, 40, num_rows))
    tails = np.maximum(tails, starts == 0)
    tail_pages = [[next(free) for _ in range(-(-int(t) // block_size))] for t in tails]
    num_pages = next(free)
    names = rng.permutation(num_pages).astype(np.int32)  # pages lie anywhere in the pool
    lengths = (starts + tails).astype(np.int32)
    slots = []
    for row in range(num_rows):
        own = names[row_pages[row] + tail_pages[row]].astype(np.int64)
        slots.append((own[:, None] * block_size + np.arange(block_size)).reshape(-1)[: lengths[row]])

    def offsets(lists: list[list[int]]) -> np.ndarray:
        return np.cumsum([0, *map(len, lists)]).astype(np.int32)

    def flat(lists: list[list[int]]) -> np.ndarray:
        return np.array([i for one in lists for i in one], dtype=np.int32)

    pages, rows = [g[1] for g in groups], [g[2] for g in groups]
    plan = PlanArrays(
        np.array([g[0] for g in groups], np.int32),
        np.array([len(p) * block_size for p in pages], np.int32),
        offsets(pages),
        names[flat(pages)],
        offsets(rows),
        flat(rows),
        starts.astype(np.int32),
        offsets(tail_pages),
        names[flat(tail_pages)],
    )
    return Forest(plan, slots, lengths, num_pages)


def reference(q: Tensor, keys: Tensor, values: Tensor, forest: Forest, scale: float, softcap: float) -> Tensor:
    """Row by row, in float64."""
    per_kv = q.shape[1] // keys.shape[1]
    out = []
    for row, slots in enumerate(forest.slots):
        at = torch.from_numpy(slots).to(keys.device)
        k = keys[at].double().repeat_interleave(per_kv, 1)
        v = values[at].double().repeat_interleave(per_kv, 1)
        scores = torch.einsum("hd,thd->ht", q[row].double(), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        out.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v))
    return torch.stack(out)


def inputs(
    forest: Forest, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> list[Tensor]:
    slots = forest.num_pages * block_size
    shapes = [(len(forest.slots), heads, head_dim), (slots, kv_heads, head_dim), (slots, kv_heads, head_dim)]
    return [torch.randn(shape).to(dtype).to(DEVICE) for shape in shapes]


def run(
    forest: Forest, tensors: list[Tensor], block_size: int, *, softcap: float = 0.0, programs: int = 8
) -> tuple[Tensor, Tensor]:
    """(ours, the reference)."""
    q, keys, values = tensors
    heads, kv_heads, scale = q.shape[1], keys.shape[1], q.shape[2] ** -0.5
    work = build_work(
        forest.plan, block_size=block_size, heads_per_kv=heads // kv_heads, kv_heads=kv_heads, programs=programs
    )
    lengths = torch.from_numpy(forest.lengths).to(DEVICE)
    ours = shared_attention(q, keys, values, DeviceWork.of(work, DEVICE), lengths, scale, softcap)
    return ours, reference(q, keys, values, forest, scale, softcap)


def assert_close(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(ours).all()
    error = (ours.double() - truth).norm() / truth.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.3g}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_random_forests_in_float32(block_size: int, seed: int) -> None:
    rng = np.random.default_rng([block_size, seed])
    forest = random_forest(rng, int(rng.integers(1, 9)), block_size, depth=3)
    heads, kv_heads = [(4, 4), (6, 2), (8, 1), (9, 3)][seed]
    tensors = inputs(forest, heads, kv_heads, [64, 96, 16, 32][seed], block_size, torch.float32)
    assert_close(*run(forest, tensors, block_size), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_with_row_blocks_and_soft_cap(dtype: torch.dtype) -> None:
    forest = random_forest(np.random.default_rng(5), 40, 16, depth=2)
    tensors = inputs(forest, 6, 2, 64, 16, dtype)
    tensors[0] *= 4  # scores that the cap bends
    assert_close(*run(forest, tensors, 16, softcap=3.0), dtype)


def test_head_size_256_and_many_heads_per_kv_head() -> None:
    forest = random_forest(np.random.default_rng(6), 3, 16, depth=2)
    assert_close(*run(forest, inputs(forest, 20, 1, 256, 16, torch.float32), 16), torch.float32)


def test_without_groups_it_is_plain_paged_attention() -> None:
    forest = random_forest(np.random.default_rng(7), 5, 16, depth=0, plain=True)
    tables = np.zeros((5, 8), np.int32)
    for row, (start, end) in enumerate(zip(forest.plan.tail_offsets[:-1], forest.plan.tail_offsets[1:])):
        tables[row, : end - start] = forest.plan.tail_pages[start:end]
    forest = replace(forest, plan=plain_plan(tables, forest.lengths, 16))
    assert len(forest.plan.group_starts) == 0
    assert_close(*run(forest, inputs(forest, 4, 2, 64, 16, torch.float32), 16), torch.float32)


def test_long_rows_are_split_into_parts_and_merged() -> None:
    rng = np.random.default_rng(8)
    forest = random_forest(rng, 2, 64, depth=1)
    while forest.lengths.max() < 150:
        forest = random_forest(rng, 2, 64, depth=1)
    work = build_work(forest.plan, block_size=64, heads_per_kv=1, kv_heads=1, programs=10**6)
    assert np.diff(work.part_offsets).max() > 1
    assert_close(*run(forest, inputs(forest, 1, 1, 32, 64, torch.float32), 64, programs=10**6), torch.float32)


def test_a_padded_work_list_is_refilled_in_place() -> None:
    """What a CUDA graph replays: one buffer, new contents, rows that grow, padding rows that give zeros."""
    capacity = WorkCapacity.bound(8, 256, 3, block_size=16, heads_per_kv=2, kv_heads=2, programs=8)
    device_work = DeviceWork(capacity, heads_per_kv=2, block_size=16, device=DEVICE)
    buffer = device_work.entry_rows.data_ptr()
    for seed in range(3):
        forest = random_forest(np.random.default_rng(seed), 3 + seed, 16, depth=3)
        q, keys, values = inputs(forest, 4, 2, 32, 16, torch.float32)
        device_work.load(build_work(forest.plan, block_size=16, heads_per_kv=2, kv_heads=2, programs=8))
        padding = 8 - len(q)
        padded = torch.cat([q, torch.randn(padding, 4, 32, device=DEVICE)])
        # A row that is shorter than its pages: the lengths on the device decide, not the list.
        tails = forest.lengths - forest.plan.tail_starts
        shorter = np.where(tails % 16 > 1, forest.lengths - 1, forest.lengths)
        forest = replace(forest, slots=[s[:n] for s, n in zip(forest.slots, shorter)], lengths=shorter)
        lengths = torch.from_numpy(np.pad(shorter, (0, padding))).to(torch.int32).to(DEVICE)
        ours = shared_attention(padded, keys, values, device_work, lengths, 0.2)
        assert_close(ours[: len(q)], reference(q, keys, values, forest, 0.2, 0.0), torch.float32)
        assert torch.equal(ours[len(q) :], torch.zeros_like(ours[len(q) :]))
        assert device_work.entry_rows.data_ptr() == buffer


@pytest.mark.parametrize("seed", range(20))
def test_each_key_of_each_row_is_computed_once(seed: int) -> None:
    """The items of a list cover every (row, key) pair exactly once, and every part is written once."""
    rng = np.random.default_rng(seed)
    block_size, per_kv = int(rng.choice([1, 16, 64])), int(rng.integers(1, 9))
    forest = random_forest(rng, int(rng.integers(1, 60)), block_size, depth=3)
    programs = int(rng.integers(1, 300))
    work = build_work(forest.plan, block_size=block_size, heads_per_kv=per_kv, kv_heads=2, programs=programs)
    seen = [[] for _ in forest.slots]
    parts = []
    for item in np.concatenate([work.small_items, work.large_items]):
        entry, rows, page, position, first, end, chunk = (int(x) for x in item[:7])
        assert rows * per_kv <= LARGE_ROWS
        for e in range(entry, entry + rows):
            row = int(work.entry_rows[e])
            parts.append(int(work.entry_parts[e]) + chunk)
            assert work.part_offsets[row] <= parts[-1] < work.part_offsets[row + 1]
            keys = np.arange(first, min(end, forest.lengths[row] - position))
            seen[row].append(work.pages[page + keys // block_size].astype(np.int64) * block_size + keys % block_size)
    for row, slots in enumerate(forest.slots):
        assert np.array_equal(np.sort(np.concatenate(seen[row])), np.sort(slots))
    assert sorted(parts) == list(range(work.part_offsets[-1]))
    assert all(len(i) * per_kv <= SMALL_ROWS for i in work.small_items[:, 1:2])
    limit = WorkCapacity.bound(
        len(forest.slots),
        int(forest.lengths.max()),
        3,
        block_size=block_size,
        heads_per_kv=per_kv,
        kv_heads=2,
        programs=programs,
    )
    assert limit.holds(work.size()), (limit, work.size())


def test_what_does_not_fit_is_refused() -> None:
    forest = random_forest(np.random.default_rng(1), 4, 16, depth=1)
    work = build_work(forest.plan, block_size=16, heads_per_kv=2, kv_heads=1, programs=8)
    small = DeviceWork(WorkCapacity(1, 1, 1, 1, 1, 1), heads_per_kv=2, block_size=16, device=DEVICE)
    with pytest.raises(ValueError, match="there is room for"):
        small.load(work)
    q, keys, values = inputs(forest, 3, 1, 16, 16, torch.float32)
    lengths = torch.from_numpy(forest.lengths).to(DEVICE)
    with pytest.raises(ValueError, match="2 query heads per kv head"):
        shared_attention(q, keys, values, DeviceWork.of(work, DEVICE), lengths, 1.0)
    with pytest.raises(ValueError, match="power of two"):
        build_work(forest.plan, block_size=12, heads_per_kv=1, kv_heads=1, programs=8)


def partial_job(dtype: torch.dtype, head_dim: int, stacked_rows: int, capped: bool) -> Job:
    tile = tile_for(stacked_rows, head_dim, dtype)
    element = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    integers = dict.fromkeys(("lengths", "items", "count", "entry_rows", "entry_parts", "pages"), "*i32")
    return Job(
        "gpo_fast.kernels.shared_attention:partial_kernel",
        {"queries": element, "keys": element, "values": element, **integers}
        | {"out_parts": "*fp32", "lse_parts": "*fp32", "scale": "fp32", "cap": "fp32"}
        | {"BLOCK_SIZE": 16, "HEADS": 12, "KV_HEADS": 2, "HEAD_DIM": head_dim, "BLOCK_D": block_dim(head_dim)}
        | {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "FIELDS": ITEM_FIELDS, "CAPPED": capped},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def test_kernels_compile_for_absent_gpus() -> None:
    jobs = [
        partial_job(dtype, head_dim, rows, head_dim == 256)
        for dtype in (torch.bfloat16, torch.float32)
        for head_dim in (64, 96, 128, 256)
        for rows in (SMALL_ROWS, LARGE_ROWS)
        if COMPILE_ALL or (dtype == torch.bfloat16 and head_dim in (128, 256))
    ]
    merge = Job(
        "gpo_fast.kernels.shared_attention:merge_kernel",
        {"out_parts": "*fp32", "lse_parts": "*fp32", "part_offsets": "*i32", "out": "*bf16"}
        | {"HEADS": 12, "HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_P": 8},
        num_warps=2,
    )
    for built in compile_ahead([*jobs, merge]):
        # float32 is there to be exact: a few bytes on one architecture are not worth another tile.
        assert built.spill_bytes <= (64 if built.job.arguments.get("queries") == "*fp32" else 0), built.job
        assert built.shared <= SHARED_LIMIT[built.arch], built.job
        if built.job.arguments.get("queries") == "*bf16":
            assert built.uses_matrix_instructions(), built.job
            if built.arch == 90 and built.job.arguments["BLOCK_M"] == 64:
                assert built.uses("wgmma.mma_async"), built.job
