"""The engine's attention on a GPU: what a decode step needs once, and what each layer then calls.

    work = prepare(cache.plan(sequences), ...)        # once a step, while the device still runs the step before
    out = attend_shared(q, keys, values, work, lengths, scale, softcap)                            # in every layer

With CUDA graphs, `work` is made once for a bucket of batch sizes (`room_for`), captured, and refilled with `prepare`
before each replay.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gpo_fast.kernels.shared_attention import shared_attention
from gpo_fast.kernels.work_list import DeviceWork, Plan, WorkCapacity, build_work

PROGRAMS_PER_PROCESSOR = 4  # programs of a launch for each multiprocessor: enough that their ends even out


def prepare(
    plan: Plan, *, block_size: int, heads: int, kv_heads: int, device: torch.device, into: DeviceWork | None = None
) -> DeviceWork:
    """Turns a plan into work on the device, without waiting for it.

    Args:
        plan: who shares which pages; host arrays. It must cover every key that the step's `lengths` count, and may
            cover more: a tail's last page need not be full, so a plan serves until some row needs a new page.
        into: a work list to refill in place, for a captured graph; by default a new one is made.

    Raises:
        ValueError: a plan that does not fit into `into`.
    """
    work = build_work(
        plan, block_size=block_size, heads_per_kv=heads // kv_heads, kv_heads=kv_heads, programs=programs_for(device)
    )
    if into is None:
        return DeviceWork.of(work, device)
    into.load(work)
    return into


def room_for(
    rows: int, keys_per_row: int, *, levels: int, block_size: int, heads: int, kv_heads: int, device: torch.device
) -> DeviceWork:
    """An empty work list for any plan of up to `rows` rows of `keys_per_row` keys, each in up to `levels` groups."""
    capacity = WorkCapacity.bound(
        rows, keys_per_row, levels, block_size=block_size, kv_heads=kv_heads, programs=programs_for(device)
    )
    return DeviceWork(capacity, heads_per_kv=heads // kv_heads, block_size=block_size, device=device)


def attend_shared(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    plan_arrays: DeviceWork,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """One layer's attention of one token per row.

    Args:
        queries: [N, heads, head size]; keys, values: the layer's pool, [slots, kv heads, head size], the same dtype.
        plan_arrays: what `prepare` made for this step.
        lengths: int32 [N] on the device: keys that each row sees, its own included; 0 for padding rows.

    Returns: [N, heads, head size].
    """
    out: Tensor = shared_attention(queries, keys, values, plan_arrays, lengths, scale, softcap)
    return out


@cache
def programs_for(device: torch.device) -> int:
    """How many programs keep a device busy."""
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
