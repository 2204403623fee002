"""Attention over a packed forest, registered with transformers as "gpo_fast_tree".

The model runs one row of tokens [1, N] in which key j is visible to query i exactly when j <= i < subtree_end[j]
(csrc/packing.h). What a forward pass needs to know travels as the keyword argument `tree`.

On a CPU with AMX, bfloat16 runs in C++ (csrc/cpu/tree_attention.h). Otherwise no mask exists on a CPU: attention is
causal within each span of tokens and full within each block of (descendants, ancestors), and the parts are merged by
their log-sum-exps s: with s = log(exp(s_a) + exp(s_b)),

    o = exp(s_a - s) o_a + exp(s_b - s) o_b

The backward pass of a part is that of flash attention (arXiv 2205.14135, section 3.1), which only needs the whole
o and s: the parts' gradients add up to the exact ones. On CUDA FlexAttention skips the blocks that no query sees.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from gpo_fast import _C
from gpo_fast.rollout.engine import refuse_unsupported

NAME = "gpo_fast_tree"
FLEX_BLOCK = 128  # tokens in a block of FlexAttention's mask

logger = logging.getLogger(__name__)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class TreeShape:
    """What attention needs to know of N packed tokens."""

    subtree_end: Tensor  # int32 [N]
    spans: Sequence[tuple[int, int]]  # start, end: causal among themselves; they cover 0..N
    blocks: Sequence[tuple[int, int, int, int]]  # query start, query end, key start, key end: all see all

    def filled(self, length: int) -> TreeShape:
        """With a tree of `length` - N tokens behind, all in one line."""
        count = self.subtree_end.shape[0]
        line = self.subtree_end.new_full((length - count,), length)
        spans = [*self.spans, (count, length)] if length > count else self.spans
        return TreeShape(torch.cat([self.subtree_end, line]), spans, self.blocks)

    def to(self, device: torch.device | str) -> TreeShape:
        return TreeShape(self.subtree_end.to(device), self.spans, self.blocks)

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's mask, from the blocks' least and largest `subtree_end`: no [N, N] mask is built."""
        return _block_mask(self.subtree_end)


def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeShape, scale: float) -> Tensor:
    """query [N, heads, dim], key and value [N, kv heads, dim] -> [N, heads, dim], in the dtype of the query.

    Within autocast that is autocast's dtype, as with torch's `scaled_dot_product_attention`.
    """
    if query.shape[0] != tree.subtree_end.shape[0]:
        raise ValueError(f"the tree has {tree.subtree_end.shape[0]} tokens, the query {query.shape[0]}")
    query, key, value = (_autocast(t) for t in (query, key, value))
    if query.device.type == "cpu":
        native = _runs_in_cpp(query, key, value)
        _announce(native, query.dtype, query.shape[-1])
        function = _AmxAttention if native else _BlockAttention
        out: Tensor = function.apply(query, key, value, tree, scale)  # type: ignore[no-untyped-call]  # torch has none
        return out
    if query.device.type == "cuda":
        return attend_flex(query, key, value, tree, scale, compiled_flex())
    raise ValueError(f"tree-packed training runs on cpu and cuda, got {query.device}: train with packing='padded'")


def _autocast(tensor: Tensor) -> Tensor:
    """Rotary embeddings leave float32 queries and keys beside bfloat16 values."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _runs_in_cpp(query: Tensor, key: Tensor, value: Tensor) -> bool:
    dtypes = {t.dtype for t in (query, key, value)}
    return dtypes == {torch.bfloat16} and key.shape == value.shape and _C.tree_attention_supported(dim=query.shape[-1])


@functools.cache
def _announce(native: bool, dtype: torch.dtype, dim: int) -> None:
    way = "C++ (amx)" if native else "torch's flash attention, part by part"
    logger.info("tree attention of %s with heads of %d runs in %s", dtype, dim, way)


class _AmxAttention(torch.autograd.Function):
    """bfloat16 on a CPU with AMX: csrc/cpu/tree_attention.h."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: TreeShape, scale: float) -> Tensor:
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        subtree_end = tree.subtree_end.to(torch.int32).contiguous()
        out = torch.empty(query.shape, dtype=query.dtype)
        lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32)
        _C.tree_attention_forward(
            _amx_inputs(query, key, value, subtree_end, scale),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            threads=torch.get_num_threads(),
        )
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, subtree_end, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, subtree_end, out, lse = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        gradients = [torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value)]
        _C.tree_attention_backward(
            _amx_inputs(query, key, value, subtree_end, ctx.scale),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            grad_out=_view(grad),
            grad_query=gradients[0].data_ptr(),
            grad_key=gradients[1].data_ptr(),
            grad_value=gradients[2].data_ptr(),
            threads=torch.get_num_threads(),
        )
        return (*gradients, None, None)


def _view(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _amx_inputs(query: Tensor, key: Tensor, value: Tensor, subtree_end: Tensor, scale: float) -> Any:
    return _C.TreeAttentionInputs(
        query=_view(query),
        key=_view(key),
        value=_view(value),
        subtree_end=subtree_end.data_ptr(),
        tokens=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        dim=query.shape[2],
        scale=scale,
    )


class _BlockAttention(torch.autograd.Function):
    """The CPU path without AMX: one call of torch's flash attention for each span and block."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: TreeShape, scale: float) -> Tensor:
        q, k, v = _grouped(query, key, value)
        groups, heads, length, width = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        merged = q.new_empty(length, groups, heads, width, dtype=wide)
        out = merged.permute(1, 2, 0, 3)
        lse = q.new_empty(groups, heads, length, dtype=wide)
        for start, end in tree.spans:
            own = slice(start, end)
            out[:, :, own], lse[:, :, own] = _flash(q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scale)
        for start, end, key_start, key_end in tree.blocks:
            own, seen = slice(start, end), slice(key_start, key_end)
            more, more_lse = _flash(q[:, :, own], k[:, :, seen], v[:, :, seen], 0.0, False, scale=scale)
            old_lse = lse[:, :, own]
            total = torch.logaddexp(old_lse, more_lse)
            out[:, :, own].mul_((old_lse - total).exp_()[..., None]).add_(more * (more_lse - total).exp_()[..., None])
            old_lse.copy_(total)
        result = merged.view(query.shape).to(query.dtype)
        ctx.tree, ctx.scale = tree, scale
        ctx.save_for_backward(query, key, value, result, lse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, result, lse = ctx.saved_tensors
        tree, scale = ctx.tree, ctx.scale
        q, k, v = _grouped(query, key, value)
        out, grad_out = (t.to(q.dtype).unflatten(1, q.shape[:2]).permute(1, 2, 0, 3) for t in (result, grad))
        wide = lse.dtype
        grad_q = torch.empty(query.shape, dtype=wide).unflatten(1, q.shape[:2]).permute(1, 2, 0, 3)
        grad_k, grad_v = (torch.empty(key.shape, dtype=wide).transpose(0, 1) for _ in range(2))
        for start, end in tree.spans:
            own = slice(start, end)
            inputs = (t[:, :, own] for t in (grad_out, q, k, v, out, lse))
            parts = _flash_backward(*inputs, 0.0, True, scale=scale)
            grad_q[:, :, own] = parts[0]
            torch.sum(parts[1], 1, dtype=wide, out=grad_k[:, own])
            torch.sum(parts[2], 1, dtype=wide, out=grad_v[:, own])
        for start, end, key_start, key_end in tree.blocks:
            own, seen = slice(start, end), slice(key_start, key_end)
            parts = _flash_backward(
                grad_out[:, :, own],
                q[:, :, own],
                k[:, :, seen],
                v[:, :, seen],
                out[:, :, own],
                lse[:, :, own],
                0.0,
                False,
                scale=scale,
            )
            grad_q[:, :, own] += parts[0]
            grad_k[:, seen] += parts[1].sum(1, dtype=wide)
            grad_v[:, seen] += parts[2].sum(1, dtype=wide)
        return (
            grad_q.permute(2, 0, 1, 3).reshape(query.shape).to(query.dtype),
            grad_k.transpose(0, 1).to(key.dtype),
            grad_v.transpose(0, 1).to(value.dtype),
            None,
            None,
        )


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As flash attention takes them: [kv heads, heads of each, N, dim]. Keys and values are not copied."""
    dtype = _compute_dtype(query.dtype)
    groups = key.shape[1]
    heads = query.shape[1] // groups
    q = query.to(dtype).unflatten(1, (groups, heads)).permute(1, 2, 0, 3)
    k, v = (t.to(dtype).transpose(0, 1)[:, None].expand(-1, heads, -1, -1) for t in (key, value))
    return q, k, v


@functools.cache
def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit inputs on a CPU without products of bfloat16, where those are many times slower."""
    if dtype in (torch.float32, torch.float64) or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return dtype
    logger.info("tree attention of %s runs in float32: this CPU has no fast products of that type", dtype)
    return torch.float32


def attend_flex(query: Tensor, key: Tensor, value: Tensor, tree: TreeShape, scale: float, flex: Any) -> Tensor:
    """`tree_attention` by FlexAttention; `flex` is `flex_attention`, compiled or not."""
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    out: Tensor = flex(q, k, v, block_mask=tree.block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out[0].transpose(0, 1)


@functools.cache
def compiled_flex() -> Any:
    """Compiled once for each length, so batches are filled up to one of a few lengths (`PackedBatch.filled`)."""
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(subtree_end: Tensor) -> BlockMask:
    length = subtree_end.shape[0]
    blocks = -(-length // FLEX_BLOCK)
    device = subtree_end.device

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[key])

    # Tokens that fill up the last block are seen by nobody; they may not spoil the least end of their block.
    filled = torch.zeros(blocks * FLEX_BLOCK, dtype=torch.int64, device=device)
    filled[:length] = subtree_end
    ends = filled.view(blocks, FLEX_BLOCK)
    first = torch.arange(blocks, device=device) * FLEX_BLOCK
    last = torch.clamp(first + FLEX_BLOCK, max=length) - 1
    some = (first[None] <= last[:, None]) & (ends.amax(1)[None] > first[:, None])  # [query block, key block]
    every = (first[None] < first[:, None]) & (ends.amin(1)[None] > last[:, None])
    return BlockMask.from_kv_blocks(
        *_block_lists(some & ~every),
        *_block_lists(every),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _block_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and which: int32 [1, 1, blocks], [1, 1, blocks, blocks]."""
    order = torch.argsort(mask.to(torch.int8), dim=1, descending=True, stable=True)
    return mask.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _tree_attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, heads, N, dim]
    key: Tensor,  # [1, kv heads, N, dim]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: TreeShape | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. Returns [1, N, heads, dim]."""
    if tree is None:
        raise RuntimeError(f"the attention {NAME!r} needs the keyword argument `tree` in the model's forward pass")
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"tree-packed training does not support attention with {name} ({kwargs[name]!r})")
    if dropout > 0:
        raise ValueError(f"tree-packed training needs attention without dropout, got {dropout}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return tree_attention(q, k, v, tree, scale)[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """`tree` says what a token sees: no mask is built."""


AttentionInterface.register(NAME, _tree_attention_forward)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def tree_attention_of(model: Any) -> Iterator[None]:
    """The model with tree attention; left as it was found.

    With gradient checkpointing the backward pass runs layers again, so it belongs inside too.

    Raises:
        ValueError: a model whose attention is not full attention, or that is in training mode with dropout.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    refuse_unsupported(base.config.get_text_config())
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            raise ValueError(
                f"tree-packed training needs a model without dropout: sequences that share a token would share its "
                f"random mask, but {name} has p={module.p}"
            )
    config = base.config
    implementation = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = implementation
