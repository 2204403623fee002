"""Attention over a paged KV pool, registered with transformers as "gpo_fast_paged".

The model runs one packed row of tokens [1, N]; the attention function receives only the new keys and values, writes
them to the pool and lets every token see the pages of its own sequence. The batch's metadata travels as a keyword
argument of the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from gpo_fast import _C

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
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
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


@dataclass
class PagedBatch:
    """What a forward pass needs to know of its N tokens."""

    pool: KVPool
    slots: Tensor  # int64 [N]: where each new token's key and value go
    tables: Tensor  # int32 [N, pages]: each token's sequence's pages
    lengths: Tensor  # int32 [N]: keys that a token sees, itself included
    softcap: float = 0.0


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, heads, N, head size]
    key: Tensor,  # [1, kv heads, N, head size]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    paged_batch: PagedBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Writes the new keys and values, then attends. Returns [1, N, heads, head size]."""
    if paged_batch is None:
        raise RuntimeError(f"the attention {NAME!r} runs only inside a RolloutEngine")
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = paged_batch.pool.keys[layer], paged_batch.pool.values[layer]
    keys.index_copy_(0, paged_batch.slots, key[0].transpose(0, 1).to(keys.dtype))
    values.index_copy_(0, paged_batch.slots, value[0].transpose(0, 1).to(values.dtype))
    queries = query[0].transpose(0, 1).to(keys.dtype).contiguous()  # [N, heads, head size]
    scale = scaling if scaling is not None else queries.shape[-1] ** -0.5
    attend = _attend_cpp if queries.device.type == "cpu" else attend_gathered
    softcap = kwargs.get("softcap") or paged_batch.softcap
    return attend(queries, keys, values, paged_batch, scale, softcap)[None].to(query.dtype), None


def _attend_cpp(
    queries: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float, softcap: float
) -> Tensor:
    output = torch.empty_like(queries)
    _C.paged_attention(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        batch.tables.data_ptr(),
        batch.lengths.data_ptr(),
        rows=queries.shape[0],
        table_width=batch.tables.shape[1],
        num_heads=queries.shape[1],
        num_kv_heads=keys.shape[1],
        head_dim=queries.shape[2],
        block_size=batch.pool.block_size,
        scale=scale,
        softcap=softcap,
        is_bfloat16=queries.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
    )
    return output


def attend_gathered(
    queries: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float, softcap: float
) -> Tensor:
    """The same in plain torch: gathers each token's pages. For devices without a kernel, and for tests."""
    width = int(batch.lengths.max())
    position = torch.arange(width, device=queries.device)
    pages = batch.tables[:, position // batch.pool.block_size].long()
    slots = pages * batch.pool.block_size + position % batch.pool.block_size  # [N, width]
    groups = queries.shape[1] // keys.shape[1]
    seen_keys = keys[slots].repeat_interleave(groups, dim=2).float()  # [N, width, heads, head size]
    seen_values = values[slots].repeat_interleave(groups, dim=2).float()
    scores = torch.einsum("nhd,nwhd->nhw", queries.float() * scale, seen_keys)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill((position >= batch.lengths[:, None])[:, None, :], -torch.inf)
    return torch.einsum("nhw,nwhd->nhd", scores.softmax(dim=-1), seen_values).to(queries.dtype)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The pages say what a token sees: no mask is built."""


AttentionInterface.register(NAME, paged_attention_forward)
AttentionMaskInterface.register(NAME, _no_mask)
