"""RolloutEngine: samples branches from an unmodified transformers causal LM with shared prefixes computed once.

The scheduler is `RolloutStream`. KV pages are owned by `PrefixCache`; the model runs one packed row of tokens [1, N],
prefill and decode alike.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gpo_fast._C import PrefixCache
from gpo_fast.rollout.attention import NAME, KVPool
from gpo_fast.rollout.branch import Branch, Prefill
from gpo_fast.rollout.runner import Chunk, Step, runner_for
from gpo_fast.rollout.sampler import Drawn
from gpo_fast.rollout.stream import RolloutStream
from gpo_fast.rollout.traces import Traces
from gpo_fast.rollout.types import Completion, Request

log = logging.getLogger(__name__)


class RolloutEngine:
    """Samples completions with paged KV, prefix sharing and continuous batching.

    Args:
        model: a transformers causal LM with full attention, PEFT adapters included.
        tokenizer: decodes for stop strings and names the end-of-sequence token.
        kv_cache_memory: bytes for keys and values; by default what `max_batch_size` sequences of up to 2,048
            tokens need, at most 4 GiB.
        block_size: tokens in a page.
        max_batch_size: sequences that decode together.
        max_prefill_tokens: prompt tokens in one forward pass.
        seed: first of the seeds that requests without one get.
        share_prefixes: read the keys that branches share once for all of them; False reads them for each.
        fast_forward: on a CPU, run known architectures (Llama, Qwen2, Qwen3, Mistral) in C++ on a packed copy of
            the weights; on a GPU, replay decode steps as CUDA graphs. False runs the model's own modules, kernel by
            kernel. The log says which runs.

    Raises:
        ValueError: a model whose attention is not full (sliding window, latent, linear, chunked), KV memory that
            cannot hold one page, or on a GPU a `block_size` that is no power of two.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        kv_cache_memory: int | None = None,
        block_size: int = 16,
        max_batch_size: int = 64,
        max_prefill_tokens: int = 2048,
        seed: int = 0,
        share_prefixes: bool = True,
        fast_forward: bool = True,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if max_batch_size < 1 or max_prefill_tokens < 1:
            raise ValueError(
                f"max_batch_size and max_prefill_tokens must be at least 1, got {max_batch_size} and "
                f"{max_prefill_tokens}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        self.share_prefixes = share_prefixes
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = self._base.config.get_text_config()
        refuse_unsupported(config)
        self.max_length = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        weight = self._base.get_output_embeddings().weight
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.bfloat16) else torch.float32
        block_bytes = 2 * config.num_hidden_layers * block_size * kv_heads * head_dim * dtype.itemsize
        if kv_cache_memory is None:
            tokens = max_batch_size * min(self.max_length, 2048)
            kv_cache_memory = min(4 << 30, max(1, -(-tokens // block_size)) * block_bytes)
        num_blocks = kv_cache_memory // block_bytes
        if num_blocks < 1:
            raise ValueError(
                f"kv_cache_memory={kv_cache_memory} bytes cannot hold one page of {block_size} tokens, which takes "
                f"{block_bytes} bytes: give at least that much for every {block_size} tokens of a sequence"
            )
        self.block_size = block_size
        self.num_blocks = int(num_blocks)
        self.block_bytes = block_bytes
        self.cache = PrefixCache(self.num_blocks, block_size)
        self.traces = Traces(self.cache)
        self.pool = KVPool(
            config.num_hidden_layers, self.num_blocks, block_size, kv_heads, head_dim, dtype, weight.device
        )
        self._vocabulary = self._base.get_input_embeddings().weight.shape[0]
        self._epoch = 0
        self._next_seed = seed
        self.end_tokens = _end_tokens(self._base, tokenizer)
        self._stream: weakref.ref[RolloutStream] | None = None
        self.counters = dict.fromkeys(
            (
                "steps",
                "prefill_tokens",
                "decode_tokens",
                "shared_tokens",
                "trace_forks",
                "shared_reads_saved",
                "preemptions",
                "cancelled",
            ),
            0,
        )
        self.seconds = dict.fromkeys(("schedule", "forward", "sample"), 0.0)
        self._runner = runner_for(weight.device)(
            self._base,
            self.pool,
            self.cache,
            counters=self.counters,
            seconds=self.seconds,
            max_rows=max_batch_size,
            share_prefixes=share_prefixes,
            fast=fast_forward,
        )

    # -- the public face ------------------------------------------------------------------------------------

    def stream(self, requests: Sequence[Request] = ()) -> RolloutStream:
        """Starts sampling; iterate over the stream for completions in the order in which they finish.

        Requests may be added and branches cancelled while it runs. An engine runs one stream at a time.

        Raises:
            ValueError: a request that does not fit the model's context or the KV memory.
            RuntimeError: another stream of this engine has not ended.
        """
        if self._stream is not None and self._stream() is not None:
            raise RuntimeError(
                "a stream of this engine is still open: exhaust it or close it before another generate() or stream()"
            )
        stream = RolloutStream(self, requests)
        self._stream = weakref.ref(stream)
        return stream

    def generate(
        self, requests: Sequence[Request], *, progress: Callable[[int, int], None] | None = None
    ) -> list[Completion]:
        """All branches of all requests, in the order of requests, then branches.

        Args:
            progress: called with (finished branches, all branches) whenever one finishes.

        Raises:
            ValueError: a request that does not fit the model's context or the KV memory.
            RuntimeError: a stream of this engine has not ended.
        """
        done = []
        with self.stream(requests) as stream:
            for completion in stream:
                done.append(completion)
                if progress is not None:
                    progress(len(done), stream.num_branches)
        return sorted(done, key=lambda c: (c.request_index, c.branch_index))

    def update_weights(self) -> None:
        """Begins a new epoch: no key or value computed before can be matched from now on.

        Raises:
            RuntimeError: a stream is open, whose branches would continue old keys with new weights.
        """
        if self._stream is not None and self._stream() is not None:
            raise RuntimeError("weights changed under an open stream: exhaust it or close it first")
        self.traces.clear()
        self._epoch += 1
        self.cache.begin_epoch(self._epoch)
        self.cache.evict(self.cache.stats()["stale"])  # the next pages are memory that has been written to before
        self._runner.weights_changed()

    def stats(self) -> dict[str, Any]:
        """Counters and seconds by phase since the engine was made, and the prefix cache's state."""
        return {**self.counters, "seconds": dict(self.seconds), "cache": self.cache.stats()}

    # -- what a stream needs --------------------------------------------------------------------------------

    def check_fits(self, number: int, request: Request) -> None:
        """Raises ValueError unless request `number` fits the model's context and the KV memory."""
        length, new = len(request.token_ids), request.sampling.max_tokens
        ids = np.asarray(request.token_ids)
        low, high = ids.min(), ids.max()
        if low < 0 or high >= self._vocabulary:
            raise ValueError(
                f"request {number} has the token {low if low < 0 else high}, but the model's tokens are 0 to "
                f"{self._vocabulary - 1}: its tokenizer is not the model's"
            )
        if length + new > self.max_length:
            raise ValueError(
                f"request {number} needs {length} prompt tokens + {new} new ones, but the "
                f"model's context is {self.max_length} tokens: shorten the prompt or max_tokens"
            )
        pages = -(-(length + new) // self.block_size) + 1  # one more for a copy-on-write of a shared tail
        if pages > self.num_blocks:
            raise ValueError(
                f"the KV memory holds {self.num_blocks} pages of {self.block_size} tokens, but request {number} "
                f"alone may need {pages}: give kv_cache_memory at least {pages * self.block_bytes} bytes"
            )

    def next_seed(self) -> int:
        """A seed for a request that has none."""
        self._next_seed += 1
        return self._next_seed - 1

    def stream_ended(self, stream: RolloutStream) -> None:
        if self._stream is not None and self._stream() in (stream, None):
            self._stream = None

    @contextmanager
    def inference(self) -> Iterator[None]:
        """The model in evaluation mode with paged attention; left as it was found."""
        config = self._base.config
        was_training, implementation = self.model.training, config._attn_implementation
        if was_training:
            self.model.eval()
        config._attn_implementation = NAME
        try:
            with torch.no_grad():
                yield
        finally:
            config._attn_implementation = implementation
            if was_training:
                self.model.train()

    def step(
        self, running: list[Branch], chunks: list[tuple[Prefill, int]], sampled: list[Branch], rows: np.ndarray
    ) -> Drawn:
        """One pass over the last token of each running branch and `tokens[first:computed]` of each (entry, first).

        Room for the running branches' tokens has been reserved. The pass has a row of logits for each running branch,
        then for each entry that it completes; branch i of `sampled` draws its next token from row `rows[i]`.
        """
        start = time.perf_counter()
        step = self._arrays(running, chunks, sampled, rows)
        self.counters["decode_tokens"] += len(running)
        self.counters["prefill_tokens"] += len(step.tokens) - len(running)
        self.seconds["schedule"] += time.perf_counter() - start
        return self._runner.run(step)

    def _arrays(
        self, running: list[Branch], chunks: list[tuple[Prefill, int]], sampled: list[Branch], rows: np.ndarray
    ) -> Step:
        """The arrays of a step; appends the running branches' tokens to their sequences."""
        decoding = np.array([b.sequence for b in running], dtype=np.int64)
        last = np.array([b.tokens[-1] for b in running], dtype=np.int32)
        at = np.array([len(b.prompt) + len(b.tokens) - 1 for b in running], dtype=np.int64)
        slots = self.cache.append(decoding, last, 1)
        counts = np.array([1] * len(running) + [e.computed - first for e, first in chunks])
        complete = np.array([True] * len(running) + [e.missing == 0 for e, _ in chunks])
        return Step(
            tokens=np.concatenate([last, *(e.tokens[first : e.computed] for e, first in chunks)]).astype(np.int64),
            positions=np.concatenate([at, *(np.arange(first, e.computed) for e, first in chunks)]),
            slots=np.concatenate([slots, *(e.slots[first - e.hit : e.computed - e.hit] for e, first in chunks)]).astype(
                np.int64
            ),
            decoding=decoding,
            chunks=[Chunk(e.pages[: -(-e.computed // self.block_size)], first, e.computed) for e, first in chunks],
            selected=(np.cumsum(counts) - 1)[complete].astype(np.int32),
            rows=rows,
            keys=np.array([b.key for b in sampled], dtype=np.uint64),
            drawn=np.array([len(b.tokens) for b in sampled], dtype=np.uint64),
            params=[b.params for b in sampled],
        )


def refuse_unsupported(config: Any) -> None:
    """Raises ValueError, naming the model type and the reason, unless all its attention is full attention."""
    kind = getattr(config, "model_type", "?")
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    reason = ""
    if any("sliding" in layer for layer in layers):
        reason = "sliding-window attention"
    elif any("linear" in layer or "mamba" in layer or "recurrent" in layer for layer in layers):
        reason = "linear attention"
    elif layers:
        reason = f"layers of the kinds {', '.join(sorted(layers))}"
    elif (
        getattr(config, "sliding_window", None)
        and getattr(config, "use_sliding_window", True)
        and not getattr(config, "layer_types", None)
    ):
        reason = "sliding-window attention"
    elif getattr(config, "kv_lora_rank", None):
        reason = "multi-head latent attention (MLA)"
    elif not getattr(config, "num_attention_heads", None) or any(
        hasattr(config, name) for name in ("state_size", "ssm_cfg", "linear_num_key_heads", "mamba_d_state")
    ):
        reason = "linear attention or a state space"
    if getattr(config, "attention_chunk_size", None):
        reason = "chunked attention"
    if reason:
        raise ValueError(f"models with {reason} are not supported yet (model type {kind!r}): only full attention is")


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return frozenset(
        int(t) for t in [*ends, tokenizer.eos_token_id if tokenizer is not None else None] if t is not None
    )
