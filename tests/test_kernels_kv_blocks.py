"""The KV block kernels move exactly the rows that they should and leave all others alone."""

from __future__ import annotations

import pytest
import torch
from aot import SHARED_LIMIT, Job, compile_ahead
from gpo_fast.kernels.kv_blocks import copy_blocks, gather_kv, write_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pool(slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, layers: int = 3) -> tuple[torch.Tensor, ...]:
    shape = (layers, slots, kv_heads, head_dim)
    return torch.randn(shape).to(dtype).to(DEVICE), torch.randn(shape).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 64), (2, 96), (1, 128)])
def test_write_puts_rows_into_their_slots_and_skips_padding(kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    keys, values = (p[0] for p in pool(40, kv_heads, head_dim, dtype))
    # As a model hands them over: heads before rows, so a row is not contiguous.
    # The interpreter cuts a float32 off at bfloat16 where a GPU rounds, so bfloat16 pools get bfloat16 rows.
    given = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    new_keys, new_values = (
        torch.randn(kv_heads, 7, head_dim, device=DEVICE).to(given).transpose(0, 1) for _ in range(2)
    )
    slots = torch.randperm(40, device=DEVICE)[:7]
    slots[3] = -1
    expected_keys, expected_values = keys.clone(), values.clone()
    real = slots >= 0
    expected_keys[slots[real]] = new_keys[real].to(dtype)
    expected_values[slots[real]] = new_values[real].to(dtype)
    write_kv(new_keys, new_values, keys, values, slots)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_reach_all_layers_and_ignore_padding(dtype: torch.dtype) -> None:
    keys, values = pool(64, 2, 80, dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    jobs = [(0, 32, 5), (16, 48, 16), (8, 60, 1)]
    for source, target, length in jobs:
        expected_keys[:, target : target + length] = keys[:, source : source + length]
        expected_values[:, target : target + length] = values[:, source : source + length]
    padded = torch.tensor([*jobs, (1, 2, 3)], dtype=torch.int32, device=DEVICE).T.contiguous()
    copy_blocks(keys, values, padded, torch.tensor([3], dtype=torch.int32, device=DEVICE))
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_gather_returns_a_sequence_in_order(block_size: int) -> None:
    keys, values = (p[1] for p in pool(192, 2, 64, torch.bfloat16))
    pages = torch.randperm(192 // block_size)[:3].to(torch.int32).to(DEVICE)
    length = 3 * block_size - block_size // 2
    slots = (pages.long()[:, None] * block_size + torch.arange(block_size, device=DEVICE)).flatten()[:length]
    got_keys, got_values = gather_kv(keys, values, pages, length, block_size)
    assert torch.equal(got_keys, keys[slots])
    assert torch.equal(got_values, values[slots])


def test_wrong_pools_are_refused() -> None:
    keys, values = (p[0] for p in pool(8, 1, 16, torch.float32))
    with pytest.raises(ValueError, match="alike"):
        gather_kv(keys, values.half(), torch.zeros(1, dtype=torch.int32), 1, 1)
    with pytest.raises(ValueError, match="need 3 pages"):
        gather_kv(keys, values, torch.zeros(2, dtype=torch.int32), 9, 4)


def test_kernels_compile_without_spills() -> None:
    module = "gpo_fast.kernels.kv_blocks:"
    strides = dict.fromkeys(("key_row_stride", "key_head_stride", "value_row_stride", "value_head_stride"), "i32:16")
    tensors = dict.fromkeys(("keys", "values"), "*bf16")
    jobs = [
        Job(
            f"{module}write_kernel",
            {**tensors, "new_keys": "*bf16", "new_values": "*bf16", "slots": "*i64", **strides}
            | {"HEAD_DIM": 128, "WIDTH": 1024, "BLOCK": 1024},
        ),
        Job(
            f"{module}copy_kernel",
            {**tensors, "jobs": "*i32", "count": "*i32", "capacity": "i32", "layer_stride": "i64:16"}
            | {"WIDTH": 1024, "BLOCK": 2048},
        ),
        Job(
            f"{module}gather_kernel",
            {**tensors, "pages": "*i32", "out_keys": "*bf16", "out_values": "*bf16"}
            | {"BLOCK_SIZE": 16, "WIDTH": 1024, "BLOCK": 1024},
        ),
    ]
    for built in compile_ahead(jobs):
        assert built.spill_bytes == 0
        assert built.shared <= SHARED_LIMIT[built.arch]
