"""What computes the engine's steps: a forward pass, then a token for each branch that is due one.

The scheduler decides what a step computes and hands it over as arrays on the host (`Step`). `HostRunner` is that of a
CPU, C++ from the attention to the sampling, and in plain torch that of devices without kernels; `GpuRunner`
(runner_gpu.py) runs Triton kernels and CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gpo_fast import _C
from gpo_fast._C import PrefixCache
from gpo_fast.rollout.attention import Batch, KVPool, PagedBatch
from gpo_fast.rollout.packed import PackedDecoder
from gpo_fast.rollout.sampler import Drawn, sample, uniforms
from gpo_fast.rollout.segments import Segments, chunk_segment, concatenate, private_segments, shared_segments
from gpo_fast.rollout.types import SamplingParams

log = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """The tokens [first, stop) of a prompt, whose keys up to `stop` lie in `pages` (int32)."""

    pages: np.ndarray
    first: int
    stop: int


class Step(NamedTuple):
    """A pass over N tokens: the last of each running branch, then the chunks'. B branches draw a token from it."""

    tokens: np.ndarray  # int64 [N]
    positions: np.ndarray  # int64 [N]
    slots: np.ndarray  # int64 [N]: where each token's key and value go
    decoding: np.ndarray  # int64: the running branches' sequences
    chunks: list[Chunk]
    selected: np.ndarray  # int32: the tokens whose logits are wanted
    rows: np.ndarray  # int64 [B]: which of these logits each branch draws from
    keys: np.ndarray  # uint64 [B]: of the branches' random streams
    drawn: np.ndarray  # uint64 [B]: how many numbers of its stream a branch has used
    params: list[SamplingParams]  # [B]

    @property
    def running(self) -> int:
        """How many branches decode."""
        return len(self.decoding)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: how many keys each token sees, its own included."""
        return self.positions + 1


class Runner(Protocol):
    """Computes steps of one model over one pool."""

    def run(self, step: Step) -> Drawn:
        """Writes the step's keys and values to the pool and draws a token for each branch of `step.rows`."""
        ...

    def weights_changed(self) -> None:
        """Nothing that was made of the model's weights may be used again."""
        ...


def runner_for(device: torch.device) -> Callable[..., Runner]:
    """The class whose kernels run on a device."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from gpo_fast.rollout.runner_gpu import GpuRunner

        return GpuRunner
    return HostRunner


class ModuleForward:
    """The forward pass of a model's own modules with paged attention: any causal LM, any device."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config.get_text_config()
        self.softcap = float(getattr(config, "attn_logit_softcapping", None) or 0.0)
        self._logit_softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)

    def __call__(self, tokens: Tensor, positions: Tensor, batch: Batch, selected: Tensor) -> Tensor:
        """Logits [S, vocabulary], of the head's type, after the tokens `selected` (int64 [S]).

        Args:
            tokens, positions: int64 [N].
        """
        output = self.model.get_decoder()(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, paged_batch=batch
        )
        logits: Tensor = self.model.get_output_embeddings()(output.last_hidden_state[0, selected])
        return self._logit_softcap * torch.tanh(logits.float() / self._logit_softcap) if self._logit_softcap else logits


class HostRunner:
    """Steps in C++ on a CPU; elsewhere in plain torch.

    Args:
        model: a transformers causal LM.
        counters, seconds: the engine's, counted up here.
        share_prefixes: read the keys that branches share once for all of them.
        fast: on a CPU, run the packed forward pass (packed.py) if the model is one that it computes.
    """

    def __init__(
        self,
        model: Any,
        pool: KVPool,
        cache: PrefixCache,
        *,
        counters: dict[str, int],
        seconds: dict[str, float],
        max_rows: int,
        share_prefixes: bool,
        fast: bool,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._counters = counters
        self._seconds = seconds
        self._share_prefixes = share_prefixes
        self._modules = ModuleForward(model)
        self._packed = self._pack(fast)
        self._packed_is_old = False

    def run(self, step: Step) -> Drawn:
        """See `Runner`."""
        start = time.perf_counter()
        segments = self._segments(step)
        self._pool.copy(*self._cache.take_copies())
        self._cache.acknowledge_copies()
        start = self._count("schedule", start)
        logits = self._forward(step, segments)
        start = self._count("forward", start)
        logits = logits if len(step.rows) == len(logits) else logits[step.rows]
        drawn = sample(logits, step.params, uniforms(step.keys, step.drawn))
        self._count("sample", start)
        return drawn

    def weights_changed(self) -> None:
        """See `Runner`."""
        self._packed_is_old = True

    def _count(self, phase: str, start: float) -> float:
        now = time.perf_counter()
        self._seconds[phase] += now - start
        return now

    def _segments(self, step: Step) -> Segments:
        """What each row of the pass sees."""
        parts = []
        lengths = step.lengths[: step.running]
        if step.running and self._share_prefixes:
            parts.append(shared_segments(self._cache.plan(step.decoding), lengths))
            self._counters["shared_reads_saved"] += parts[0].saved_keys
        elif step.running:
            parts.append(private_segments(self._cache.block_tables(step.decoding), lengths, self._pool.block_size))
        row = step.running
        for chunk in step.chunks:
            parts.append(chunk_segment(chunk.pages, row, chunk.first, chunk.stop))
            row += chunk.stop - chunk.first
        return concatenate(parts)

    def _forward(self, step: Step, segments: Segments) -> Tensor:
        """Logits [selected rows, vocabulary]."""
        if self._packed is not None:
            if self._packed_is_old:
                self._packed.repack()
                self._packed_is_old = False
            return self._packed.forward(step.tokens, step.positions, step.slots, segments, step.selected)
        device = self._pool.keys.device
        tokens, positions, slots, selected = (
            torch.from_numpy(a).long().to(device) for a in (step.tokens, step.positions, step.slots, step.selected)
        )
        batch = PagedBatch(self._pool, slots, segments, self._modules.softcap)
        return self._modules(tokens, positions, batch, selected)

    def _pack(self, wanted: bool) -> PackedDecoder | None:
        reason = "fast_forward is off"
        if wanted:
            try:
                packed = PackedDecoder(self._modules.model, self._pool)
            except ValueError as error:
                reason = f"{error} has no fast forward pass"
            else:
                log.info("rollouts run the packed C++ forward pass with %s kernels", _C.cpu_kernels())
                return packed
        log.info("rollouts run the model's own modules: %s", reason)
        return None
