"""Attention of prompts on a GPU by flash-attn 2 (arXiv 2307.08691), where it is installed.

A step's rows are the running branches' tokens, then the tokens of the prompts that are being computed, chunk by chunk.
The branches share keys, which our Triton kernel reads once for all of them. A chunk's tokens are the last ones of a
sequence and see what is before them: `flash_attn_varlen_func` with the causal mask aligned to the last key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gpo_fast.rollout.attention import KVPool
from gpo_fast.rollout.runner import Chunk

VarlenAttention = Callable[..., Tensor]  # flash_attn_varlen_func


def flash_attention(pool: KVPool) -> VarlenAttention:
    """`flash_attn.flash_attn_varlen_func`.

    Raises:
        ValueError: flash-attn cannot attend to this pool.
        ImportError: it is not installed, or was built for another torch.
    """
    keys = pool.keys
    head_dim = keys.shape[-1]
    if keys.device.type != "cuda":
        raise ValueError(f"the device is {keys.device.type!r}")
    if keys.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"keys are {str(keys.dtype).removeprefix('torch.')}")
    if head_dim > 256 or head_dim % 8:
        raise ValueError(f"the head size is {head_dim}")
    if torch.cuda.get_device_capability(keys.device) < (8, 0):
        raise ValueError("the GPU is older than Ampere")
    from flash_attn import flash_attn_varlen_func

    function: VarlenAttention = flash_attn_varlen_func
    return function


class PromptAttention:
    """The attention of one step's chunks, the same in all layers.

    flash-attn reads pages of 256 tokens or a multiple; ours are smaller, so each layer gathers the chunks' keys and
    values first.
    """

    def __init__(self, function: VarlenAttention, chunks: Sequence[Chunk], pool: KVPool) -> None:
        lengths = [chunk.stop for chunk in chunks]
        counts = [chunk.stop - chunk.first for chunk in chunks]
        within = np.arange(pool.block_size)
        slots = [(c.pages[:, None].astype(np.int64) * pool.block_size + within).ravel()[: c.stop] for c in chunks]
        device = pool.keys.device
        self._function = function
        self._slots = torch.from_numpy(np.concatenate(slots)).to(device)  # of all chunks' keys, one after the other
        ends = np.stack([np.cumsum([0, *counts]), np.cumsum([0, *lengths])])
        self._ends = torch.from_numpy(ends.astype(np.int32)).to(device)  # of each chunk's queries, and of its keys
        self._most = max(counts), max(lengths)
        self.rows = sum(counts)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> Tensor:
        """[rows, heads, head size] of the chunks' queries; keys and values are the layer's pool."""
        return self._function(
            queries,
            keys.index_select(0, self._slots),
            values.index_select(0, self._slots),
            *self._ends,
            *self._most,
            softmax_scale=scale,
            causal=True,
            softcap=softcap,
        )
