"""Attention over a paged KV pool, registered with transformers as "gpo_fast_paged".

The model runs one packed row of tokens [1, N]; the attention function receives only the new keys and values, writes
them to the pool and lets every token see the pages that are its own. The batch's metadata travels as a keyword argument
of the forward pass. On a GPU it is attention_gpu.py's; here is that of a CPU, and plain torch for other devices.

No mask is registered under the name: transformers then builds none and does not look at the positions, which on a GPU
would wait for the device in every pass and could not be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gpo_fast import _C
from gpo_fast.rollout import memory
from gpo_fast.rollout.segments import Segments

NAME = "gpo_fast_paged"


class KVPool:
    """Keys and values of all layers: [layers, slots, kv heads, head size], a slot being page * block_size + offset."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_blocks * block_size, num_kv_heads, head_dim)
        on_cpu = device.type == "cpu"
        self.keys, self.values = (
            memory.empty(shape, dtype) if on_cpu else torch.empty(shape, dtype=dtype, device=device) for _ in range(2)
        )
        self.block_size = block_size

    def copy(self, source: Any, target: Any, length: Any) -> None:
        """Copy-on-write jobs: `length[i]` slots from `source[i]` to `target[i]`, in every layer."""
        if len(source) == 0:
            return
        starts = torch.from_numpy(source).long(), torch.from_numpy(target).long()
        counts = torch.from_numpy(length).long()
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        old, new = ((s.repeat_interleave(counts) + within).to(self.keys.device) for s in starts)
        self.keys[:, new] = self.keys[:, old]
        self.values[:, new] = self.values[:, old]


class Batch(Protocol):
    """What the attention function needs to know of a forward pass's N tokens."""

    softcap: float

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> Tensor:
        """Writes the new keys and values [N, kv heads, head size], then attends with queries [N, heads, head size]."""
        ...


@dataclass
class PagedBatch:
    """A batch that names the segments of pages which each token sees."""

    pool: KVPool
    slots: Tensor  # int64 [N]: where each new token's key and value go
    segments: Segments  # what each token sees
    softcap: float = 0.0
    plans: dict[tuple[int, float, float], Any] = field(default_factory=dict)  # one for all layers, usually

    def plan(self, num_heads: int, scale: float, softcap: float) -> Any:
        key = num_heads, scale, softcap
        if key not in self.plans:
            self.plans[key] = attention_plan(self.segments, len(self.slots), self.pool, num_heads, scale, softcap)
        return self.plans[key]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> Tensor:
        """See `Batch`."""
        pool_keys, pool_values = self.pool.keys[layer], self.pool.values[layer]
        pool_keys.index_copy_(0, self.slots, keys.to(pool_keys.dtype))
        pool_values.index_copy_(0, self.slots, values.to(pool_values.dtype))
        queries = queries.to(pool_keys.dtype).contiguous()
        if queries.device.type == "cpu":
            return attend_cpp(queries, pool_keys, pool_values, self.plan(queries.shape[1], scale, softcap))
        return attend_gathered(queries, pool_keys, pool_values, self, scale, softcap)


def attention_plan(
    segments: Segments, num_rows: int, pool: KVPool, num_heads: int, scale: float, softcap: float = 0.0
) -> Any:
    """The C++ work list of a step's attention."""
    kv_heads, head_dim = pool.keys.shape[-2:]
    return _C.AttentionPlan(
        page_offsets=segments.page_offsets,
        pages=segments.pages,
        row_offsets=segments.row_offsets,
        rows=segments.rows,
        visible=segments.visible,
        num_rows=num_rows,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=pool.block_size,
        scale=scale,
        softcap=softcap,
        is_bfloat16=pool.keys.dtype == torch.bfloat16,
    )


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, heads, N, head size]
    key: Tensor,  # [1, kv heads, N, head size]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    paged_batch: Batch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Writes the new keys and values, then attends. Returns [1, N, heads, head size]."""
    if paged_batch is None:
        raise RuntimeError(f"the attention {NAME!r} runs only inside a RolloutEngine")
    layer: int = module.layer_idx  # type: ignore[assignment]
    queries, keys, values = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = scaling if scaling is not None else queries.shape[-1] ** -0.5
    softcap = kwargs.get("softcap") or paged_batch.softcap
    output = paged_batch.attend(layer, queries, keys, values, scale, softcap)
    return output[None].to(query.dtype), None


def attend_cpp(queries: Tensor, keys: Tensor, values: Tensor, plan: Any) -> Tensor:
    """[N, heads, head size] of queries, contiguous and of the pool's type."""
    output = torch.empty_like(queries)
    plan.attend(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return output


def attend_gathered(
    queries: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float, softcap: float
) -> Tensor:
    """The same in plain torch, one segment after the other. For devices without a kernel, and for tests."""
    device, segments = queries.device, batch.segments
    rows, heads = queries.shape[:2]
    groups, block_size = heads // keys.shape[1], batch.pool.block_size
    highest = torch.full((rows, heads), -torch.inf, device=device)
    total = torch.zeros(rows, heads, device=device)
    output = torch.zeros(queries.shape, device=device)
    for s in range(len(segments.page_offsets) - 1):
        a, b = segments.row_offsets[s], segments.row_offsets[s + 1]
        pages = torch.from_numpy(segments.pages[segments.page_offsets[s] : segments.page_offsets[s + 1]]).long()
        slots = (pages[:, None] * block_size + torch.arange(block_size)).flatten().to(device)
        row = torch.from_numpy(segments.rows[a:b]).long().to(device)
        seen = torch.from_numpy(segments.visible[a:b]).to(device)
        scores = torch.einsum(
            "nhd,whd->nhw", queries[row].float() * scale, keys[slots].repeat_interleave(groups, dim=1).float()
        )
        scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
        hidden = torch.arange(len(slots), device=device) >= seen[:, None]
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        new = torch.maximum(highest[row], scores.amax(-1))
        weights = (scores - new[..., None]).exp().nan_to_num(0)
        shrink = (highest[row] - new).exp().nan_to_num(0)
        total[row] = total[row] * shrink + weights.sum(-1)
        seen_values = values[slots].repeat_interleave(groups, dim=1).float()
        output[row] = output[row] * shrink[..., None] + torch.einsum("nhw,whd->nhd", weights, seen_values)
        highest[row] = new
    return (output / total[..., None]).nan_to_num(0).to(queries.dtype)


AttentionInterface.register(NAME, paged_attention_forward)
