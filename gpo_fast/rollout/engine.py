"""RolloutEngine: samples branches from an unmodified transformers causal LM with shared prefixes computed once.

A step of the engine: admit (prefill what no one has computed yet), decode one token for every running branch,
finish branches, repeat. KV pages are owned by `PrefixCache`; the model runs one packed row of tokens [1, N].
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpo_fast._C import PrefixCache
from gpo_fast.rollout.attention import NAME, KVPool, PagedBatch
from gpo_fast.rollout.sampler import sample, stream_key, uniforms
from gpo_fast.rollout.types import Completion, FinishReason, Request, SamplingParams

STOP_WINDOW = 64  # tokens that are decoded to look for a stop string: no stop string is longer in tokens


@dataclass
class _Branch:
    """One continuation on its way."""

    request: int
    index: int
    prompt: list[int]
    params: SamplingParams
    key: int
    sequence: int = -1  # handle in the prefix cache; -1: not running
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    admitted: int = 0  # order of admission: the last one is preempted first

    def all_tokens(self) -> list[int]:
        return [*self.prompt, *self.tokens]


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

    Raises:
        ValueError: a model whose attention is not full (sliding window, latent, linear, chunked), or KV memory that
            cannot hold one page.
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
    ) -> None:
        if max_batch_size < 1 or max_prefill_tokens < 1:
            raise ValueError(
                f"max_batch_size and max_prefill_tokens must be at least 1, got {max_batch_size} and "
                f"{max_prefill_tokens}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = self._base.config.get_text_config()
        refuse_unsupported(config)
        self.max_length = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self._softcap = float(getattr(config, "attn_logit_softcapping", None) or 0.0)
        self._logit_softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
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
        self.pool = KVPool(
            config.num_hidden_layers, self.num_blocks, block_size, kv_heads, head_dim, dtype, weight.device
        )
        self._epoch = 0
        self._next_seed = seed
        self._eos = _end_tokens(self._base, tokenizer)
        self._counters = dict.fromkeys(("prefill_tokens", "decode_tokens", "shared_tokens", "preemptions", "steps"), 0)
        self._seconds = dict.fromkeys(("prefill", "decode", "sample", "schedule"), 0.0)

    # -- the public face ------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], *, progress: Callable[[int, int], None] | None = None
    ) -> list[Completion]:
        """All branches of all requests, in the order of requests, then branches.

        Args:
            progress: called with (finished branches, all branches) whenever some finish.

        Raises:
            ValueError: a request that does not fit the model's context or the KV memory.
        """
        branches = self._branches(requests)
        # Neighbours share prefixes, the longest of them first.
        waiting = deque(sorted(branches, key=lambda b: b.prompt, reverse=True))
        running: list[_Branch] = []
        finished = 0
        try:
            with self._inference():
                while waiting or running:
                    self._admit(waiting, running)
                    running = self._retire(running)
                    if running:
                        self._make_room(waiting, running)
                        self._decode(running)
                        running = self._retire(running)
                    done = len(branches) - len(waiting) - len(running)
                    if progress is not None and done > finished:
                        progress(done, len(branches))
                    finished = done
        finally:
            live = [b.sequence for b in branches if b.sequence >= 0]
            self.cache.release(live)
        return [
            Completion(
                b.request, b.index, b.prompt, b.tokens, b.logprobs, b.sampling_logprobs, b.finish_reason or "length"
            )
            for b in branches
        ]

    def update_weights(self) -> None:
        """Begins a new epoch: no key or value computed before can be matched from now on."""
        self._epoch += 1
        self.cache.begin_epoch(self._epoch)

    def stats(self) -> dict[str, Any]:
        """Counters and seconds by phase since the engine was made, and the prefix cache's state."""
        return {**self._counters, "seconds": dict(self._seconds), "cache": self.cache.stats()}

    # -- scheduling -----------------------------------------------------------------------------------------

    def _branches(self, requests: Sequence[Request]) -> list[_Branch]:
        branches = []
        for number, request in enumerate(requests):
            prompt, params = [int(t) for t in request.token_ids], request.sampling
            needed = len(prompt) + params.max_tokens
            if needed > self.max_length:
                raise ValueError(
                    f"request {number} needs {len(prompt)} prompt tokens + {params.max_tokens} new ones, but the "
                    f"model's context is {self.max_length} tokens: shorten the prompt or max_tokens"
                )
            pages = -(-needed // self.block_size) + 1  # one more for a copy-on-write of a shared tail
            if pages > self.num_blocks:
                raise ValueError(
                    f"the KV memory holds {self.num_blocks} pages of {self.block_size} tokens, but request {number} "
                    f"alone may need {pages}: give kv_cache_memory at least {pages * self.block_bytes} bytes"
                )
            seed = request.seed
            if seed is None:
                seed, self._next_seed = self._next_seed, self._next_seed + 1
            branches += [_Branch(number, i, prompt, params, stream_key(seed, i)) for i in range(request.n)]
        return branches

    def _admit(self, waiting: deque[_Branch], running: list[_Branch]) -> None:
        """Moves branches from waiting to running: computes what is missing of their tokens, samples the next one.

        Branches of equal tokens are forks of one sequence. A branch that shares a prefix with one of the same
        batch which the cache does not hold yet waits for the next batch, and finds it there: with the longest
        first, one trajectory is computed once for all its cut points.
        """
        while waiting and len(running) < self.max_batch_size:
            start = time.perf_counter()
            batch: list[tuple[list[_Branch], list[int], int]] = []  # branches of equal tokens, tokens, cached
            budget, room = self.max_prefill_tokens, self.max_batch_size - len(running)
            deferred: list[_Branch] = []
            while waiting and budget > 0 and room > 0:
                tokens = waiting[0].all_tokens()
                if batch and self._gains_by_waiting(batch[-1], tokens):
                    deferred.append(waiting.popleft())
                    continue
                sequence, hit = self.cache.open(np.asarray(tokens, dtype=np.int32))
                missing = len(tokens) - hit
                if not self.cache.reserve([sequence], missing):
                    self.cache.release([sequence])
                    break
                self.cache.append([sequence], np.asarray(tokens[hit:], dtype=np.int32), [missing])
                group = [waiting.popleft()]
                while waiting and len(group) < room and waiting[0].all_tokens() == tokens:
                    group.append(waiting.popleft())
                group[0].sequence = sequence
                forks = self.cache.fork(sequence, len(tokens), len(group) - 1)
                for branch, fork in zip(group[1:], forks):
                    branch.sequence = int(fork)
                batch.append((group, tokens, hit))
                budget -= missing
                room -= len(group)
                self._counters["shared_tokens"] += hit + (len(group) - 1) * len(tokens)
            waiting.extendleft(reversed(deferred))
            self._seconds["schedule"] += time.perf_counter() - start
            if not batch:
                if not running:
                    raise RuntimeError("no branch can be admitted though none is running")
                return
            logits = self._prefill(batch)
            copies = torch.tensor([i for i, (group, _, _) in enumerate(batch) for _ in group], device=logits.device)
            admitted = [branch for group, _, _ in batch for branch in group]
            for branch in admitted:
                branch.admitted = self._counters["steps"]
            self._counters["steps"] += 1
            self._sample(admitted, logits[copies] if len(copies) > len(batch) else logits)
            running += admitted

    def _gains_by_waiting(self, entry: tuple[list[_Branch], list[int], int], tokens: list[int]) -> bool:
        """Whether an entry of the batch is about to compute a page or more of these tokens."""
        _, computed, hit = entry
        return _common_prefix(computed, tokens) >= hit + self.block_size

    def _make_room(self, waiting: deque[_Branch], running: list[_Branch]) -> None:
        """Preempts the branches admitted last until each of the others has room for one more token."""
        while not self.cache.reserve([b.sequence for b in running], 1):
            victim = max(running, key=lambda b: (b.admitted, b.request, b.index))
            if len(running) == 1:
                raise RuntimeError("one running branch does not fit the KV memory though it was checked to fit")
            running.remove(victim)
            self.cache.release([victim.sequence])
            victim.sequence = -1
            waiting.appendleft(victim)  # its tokens stay; they are prefilled again
            self._counters["preemptions"] += 1

    def _retire(self, running: list[_Branch]) -> list[_Branch]:
        done = [b for b in running if b.finish_reason is not None]
        if not done:
            return running
        for branch in done:
            self.cache.commit(branch.sequence)  # a search of this trajectory finds its keys and values
        self.cache.release([b.sequence for b in done])
        for branch in done:
            branch.sequence = -1
        return [b for b in running if b.finish_reason is None]

    # -- the forward passes ---------------------------------------------------------------------------------

    def _prefill(self, batch: list[tuple[list[_Branch], list[int], int]]) -> Tensor:
        """Computes the missing tokens of each entry; returns the logits after its last token, [entries, vocabulary]."""
        start = time.perf_counter()
        sequences = [group[0].sequence for group, _, _ in batch]
        rows = [np.arange(hit, len(tokens)) for _, tokens, hit in batch]  # positions to compute
        counts = np.array([len(r) for r in rows])
        owner = np.repeat(np.arange(len(batch)), counts)
        positions = np.concatenate(rows)
        tables = self.cache.block_tables(sequences)[owner]
        tokens = np.concatenate([np.asarray(t[h:], dtype=np.int64) for _, t, h in batch])
        hidden = self._forward(tokens, positions, tables)
        for sequence in sequences:
            self.cache.commit(sequence)
        logits = self._logits(hidden[torch.from_numpy(np.cumsum(counts) - 1).to(hidden.device)])
        self._counters["prefill_tokens"] += len(tokens)
        self._seconds["prefill"] += time.perf_counter() - start
        return logits

    def _decode(self, running: list[_Branch]) -> None:
        """One more token for every running branch; room for it has been reserved."""
        start = time.perf_counter()
        sequences = np.array([b.sequence for b in running], dtype=np.int64)
        tokens = np.array([b.tokens[-1] for b in running], dtype=np.int32)
        self.cache.append(sequences, tokens, 1)
        positions = np.array([len(b.prompt) + len(b.tokens) - 1 for b in running])
        logits = self._logits(self._forward(tokens.astype(np.int64), positions, self.cache.block_tables(sequences)))
        self._counters["decode_tokens"] += len(running)
        self._counters["steps"] += 1
        self._seconds["decode"] += time.perf_counter() - start
        self._sample(running, logits)

    def _forward(self, tokens: np.ndarray, positions: np.ndarray, tables: np.ndarray) -> Tensor:
        """Hidden states [N, H] of N tokens at `positions` of sequences with the pages `tables` [N, pages]."""
        device = self.pool.keys.device
        self.pool.copy(*self.cache.take_copies())
        self.cache.acknowledge_copies()
        slots = tables[np.arange(len(tokens)), positions // self.block_size].astype(np.int64) * self.block_size
        batch = PagedBatch(
            self.pool,
            torch.from_numpy(slots + positions % self.block_size).to(device),
            torch.from_numpy(np.ascontiguousarray(tables)).to(device),
            torch.from_numpy((positions + 1).astype(np.int32)).to(device),
            self._softcap,
        )
        output = self._base.get_decoder()(
            input_ids=torch.from_numpy(tokens)[None].to(device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            use_cache=False,
            paged_batch=batch,
        )
        return output.last_hidden_state[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._base.get_output_embeddings()(hidden).float()
        return self._logit_softcap * torch.tanh(logits / self._logit_softcap) if self._logit_softcap else logits

    def _sample(self, branches: list[_Branch], logits: Tensor) -> None:
        start = time.perf_counter()
        keys = np.array([b.key for b in branches], dtype=np.uint64)
        drawn_before = np.array([len(b.tokens) for b in branches], dtype=np.uint64)
        params = [b.params for b in branches]
        tokens, logprobs, sampling = sample(logits, params, uniforms(keys, drawn_before))
        for branch, token, logprob, drawn in zip(branches, tokens.tolist(), logprobs.tolist(), sampling.tolist()):
            branch.tokens.append(token)
            branch.logprobs.append(logprob)
            branch.sampling_logprobs.append(drawn)
            branch.finish_reason = self._finish_reason(branch)
        self._seconds["sample"] += time.perf_counter() - start

    def _finish_reason(self, branch: _Branch) -> FinishReason | None:
        params, token = branch.params, branch.tokens[-1]
        if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
            return "stop"
        if params.stop:
            tail = self.tokenizer.decode(branch.tokens[-STOP_WINDOW:])
            if any(stop in tail for stop in params.stop):
                return "stop"
        return "length" if len(branch.tokens) >= params.max_tokens else None

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """The model in evaluation mode with paged attention; left as it was found."""
        config = self._base.config
        was_training, implementation = self.model.training, config._attn_implementation
        self.model.eval()
        config._attn_implementation = NAME
        try:
            with torch.no_grad():
                yield
        finally:
            config._attn_implementation = implementation
            self.model.train(was_training)


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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))
