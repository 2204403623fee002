"""The engine's attention on a GPU: what a step needs once, and what each layer then calls.

    work = prepare(with_chunks(cache.plan(sequences), chunks), ...)                                # once a step
    out = attend_shared(q, keys, values, work, lengths, scale, softcap)                            # in every layer

The tokens of a prompt that is being computed are rows as those of running branches are: a group of rows that share the
pages of their sequence, each seeing the keys up to its own position. Where flash-attn is installed they are left out
of the plan, and it attends for them (flash.py).

With CUDA graphs, `work` is made once for a bucket of batch sizes (`room_for`), captured, and refilled with `prepare`
before each replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gpo_fast.kernels.kv_blocks import write_kv
from gpo_fast.kernels.shared_attention import shared_attention
from gpo_fast.kernels.work_list import DeviceWork, Plan, PlanArrays, WorkCapacity, build_work
from gpo_fast.rollout.attention import KVPool
from gpo_fast.rollout.flash import PromptAttention
from gpo_fast.rollout.runner import Chunk

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
    """An empty work list for any plan of up to `rows` rows of `keys_per_row` keys, in `levels` groups on average."""
    heads_per_kv = heads // kv_heads
    capacity = WorkCapacity.bound(
        rows,
        keys_per_row,
        levels,
        block_size=block_size,
        heads_per_kv=heads_per_kv,
        kv_heads=kv_heads,
        programs=programs_for(device),
    )
    return DeviceWork(capacity, heads_per_kv=heads_per_kv, block_size=block_size, device=device)


def with_chunks(plan: Plan, chunks: Sequence[Chunk]) -> Plan:
    """The plan with rows for the tokens of prompts: each chunk is a group without tails, behind the rows before it."""
    if not chunks:
        return plan
    counts = [chunk.stop - chunk.first for chunk in chunks]
    running, new = len(plan.tail_starts), sum(counts)

    def longer(array: np.ndarray, more: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.concatenate([array, more]).astype(np.int32)

    return PlanArrays(
        longer(plan.group_starts, np.zeros(len(chunks))),
        longer(plan.group_lengths, [chunk.stop for chunk in chunks]),
        longer(plan.page_offsets, plan.page_offsets[-1] + np.cumsum([len(chunk.pages) for chunk in chunks])),
        longer(plan.pages, np.concatenate([chunk.pages for chunk in chunks])),
        longer(plan.row_offsets, plan.row_offsets[-1] + np.cumsum(counts)),
        longer(plan.rows, np.arange(running, running + new)),
        longer(plan.tail_starts, np.zeros(new)),
        longer(plan.tail_offsets, np.full(new, plan.tail_offsets[-1])),
        plan.tail_pages,
    )


@dataclass
class SharedBatch:
    """What the attention function needs of a pass's N tokens, on the device; see `attention.Batch`."""

    pool: KVPool
    slots: Tensor  # int64 [N]: where each key and value go; -1 for padding
    lengths: Tensor  # int32 [N]: keys that each token sees; 0 for padding
    work: DeviceWork  # of all tokens, or of those before the prompts'
    softcap: float = 0.0
    prompts: PromptAttention | None = None  # of the last tokens

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> Tensor:
        """See `attention.Batch`."""
        pool_keys, pool_values = self.pool.keys[layer], self.pool.values[layer]
        write_kv(keys, values, pool_keys, pool_values, self.slots)
        queries = queries.to(pool_keys.dtype)
        if self.prompts is None:
            return attend_shared(queries, pool_keys, pool_values, self.work, self.lengths, scale, softcap)
        running = len(queries) - self.prompts.rows
        prompts = self.prompts.attend(queries[running:], pool_keys, pool_values, scale, softcap)
        if running == 0:
            return prompts
        lengths = self.lengths[:running]
        decoding = attend_shared(queries[:running], pool_keys, pool_values, self.work, lengths, scale, softcap)
        return torch.cat([decoding, prompts])


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
