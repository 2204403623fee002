"""Worlds whose values are known: a language model given by a table, with V(s) by dynamic programming.

A token stands for (step, quality): the solution is right or wrong after that step. The next token depends on the
last one alone: the same token again (steps differ in length, wrong ones are longer), or one of the next step. After
the last step comes the end token. A completion is rewarded if it ends right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpo_fast import Completion, Request, SamplingParams, StepSplitter

END, PROMPT, FIRST = 0, 1, 2  # token ids; (step, quality) is FIRST + 2 * step + (0 right, 1 wrong)
MAX_TOKENS = 64  # nine standard deviations above the mean length of twelve steps


@dataclass
class World:
    """A Markov chain of tokens: `table[a, b]` is the probability of b after a."""

    table: np.ndarray
    num_steps: int
    tokenizer = None

    def values(self, token_ids: Sequence[int]) -> list[float]:
        """V before each step of a completion of PROMPT, and its reward: H + 1 values."""
        starts = [s.start for s in splitter().split(token_ids, None)]
        value = self._value()
        return [float(value[token_ids[s - 1] if s else PROMPT]) for s in starts] + [reward(token_ids)]

    def _value(self) -> np.ndarray:
        """Probability of ending right after each token, backwards from the last step."""
        value = np.zeros(len(self.table))
        value[FIRST + 2 * (self.num_steps - 1)] = 1.0
        for token in range(len(self.table) - 3, 0, -1):
            later = np.arange(len(self.table)) > token
            value[token] = self.table[token, later] @ value[later] / self.table[token, later].sum()
        return value


def world(right: Sequence[float], repair: Sequence[float], loop: tuple[float, float] = (0.2, 0.4)) -> World:
    """A step i is right after a right one with probability right[i], after a wrong one with repair[i]."""
    steps = len(right)
    table = np.zeros((FIRST + 2 * steps, FIRST + 2 * steps))
    table[END, END] = 1.0
    for step in range(-1, steps):
        for quality in (0, 1) if step >= 0 else (0,):
            token = FIRST + 2 * step + quality if step >= 0 else PROMPT
            again = loop[quality] if step >= 0 else 0.0
            table[token, token] = again
            if step == steps - 1:
                table[token, END] = 1 - again
                continue
            good = (right if quality == 0 else repair)[step + 1]
            table[token, FIRST + 2 * (step + 1)] = (1 - again) * good
            table[token, FIRST + 2 * (step + 1) + 1] = (1 - again) * (1 - good)
    return World(table, steps)


def even(steps: int = 10, right: float = 0.9, repair: float = 0.0, loop: tuple[float, float] = (0.2, 0.4)) -> World:
    """Every step is equally hard."""
    return world([right] * steps, [repair] * steps, loop)


def pivotal(pivot: int, steps: int = 12, slip: float = 0.005) -> World:
    """Only the step `pivot` decides."""
    return world([0.5 if i == pivot else 1 - slip for i in range(steps)], [slip] * steps)


def splitter() -> StepSplitter:
    """A step begins where the token's step number changes."""

    def cuts(token_ids: Sequence[int], tokenizer: object) -> list[int]:
        steps = [(t - FIRST) // 2 for t in token_ids]
        return [i for i in range(1, len(steps)) if steps[i] != steps[i - 1] and token_ids[i] != END]

    return StepSplitter(cuts, min_tokens=1)


def reward(token_ids: Sequence[int]) -> float:
    return float(len(token_ids) > 1 and token_ids[-1] == END and token_ids[-2] % 2 == 0)


def rewards(completions: Sequence[Completion]) -> list[float]:
    return [reward(c.token_ids) for c in completions]


class ChainBackend:
    """Samples a world directly; `generate` only."""

    def __init__(self, world: World) -> None:
        self.tokenizer = None
        self.cumulative = world.table.cumsum(axis=1)
        self.num_tokens = 0

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        owners = [(n, b) for n, r in enumerate(requests) for b in range(r.n)]
        uniform = np.concatenate([_stream(r.seed, r.n) for r in requests])
        last = np.array([requests[n].token_ids[-1] for n, _ in owners])
        tokens = np.full((len(owners), MAX_TOKENS), END)
        active = np.arange(len(owners))
        for position in range(MAX_TOKENS):
            last = (self.cumulative[last] <= uniform[active, position, None]).sum(axis=1)
            tokens[active, position] = last
            active, last = active[last != END], last[last != END]
            if len(active) == 0:
                break
        lengths = (tokens == END).argmax(axis=1) + 1
        self.num_tokens += int(lengths.sum())
        return [
            completion(n, b, requests[n], tokens[i, : lengths[i]].tolist(), "stop") for i, (n, b) in enumerate(owners)
        ]

    def update_weights(self) -> None:
        pass


class StreamingChainBackend(ChainBackend):
    """The same continuations through `stream`: a token of each running branch at a time."""

    def __init__(self, world: World, max_batch_size: int = 64) -> None:
        super().__init__(world)
        self.max_batch_size = max_batch_size
        self.num_cancelled = 0

    def stream(self, requests: Sequence[Request]) -> ChainStream:
        return ChainStream(self, requests)


class ChainStream(Iterator[Completion]):
    """What an engine's stream promises, on continuations that are known beforehand."""

    def __init__(self, backend: StreamingChainBackend, requests: Sequence[Request]) -> None:
        self.backend, self.num_requests = backend, 0
        self.waiting: list[Completion] = []
        self.running: list[list] = []  # [completion, tokens so far]
        self.done: list[Completion] = []
        self.add(requests)

    def __enter__(self) -> ChainStream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add(self, requests: Sequence[Request]) -> list[int]:
        first = self.num_requests
        self.num_requests += len(requests)
        if requests:
            for c in ChainBackend.generate(self.backend, requests):
                c.request_index += first
                self.waiting.append(c)
        return list(range(first, self.num_requests))

    def cancel(self, request_index: int, branch_index: int | None = None) -> int:
        def hit(c: Completion) -> bool:
            return c.request_index == request_index and branch_index in (None, c.branch_index)

        dropped = [(c, n) for c, n in self.running if hit(c)] + [(c, 0) for c in self.waiting if hit(c)]
        self.running = [entry for entry in self.running if not hit(entry[0])]
        self.waiting = [c for c in self.waiting if not hit(c)]
        for c, count in dropped:
            c.token_ids, c.finish_reason = c.token_ids[:count], "cancelled"
            c.logprobs, c.sampling_logprobs = c.logprobs[:count], c.sampling_logprobs[:count]
        self.done += [c for c, _ in dropped]
        self.backend.num_cancelled += len(dropped)
        return len(dropped)

    def __next__(self) -> Completion:
        while not self.done and (self.running or self.waiting):
            while self.waiting and len(self.running) < self.backend.max_batch_size:
                self.running.append([self.waiting.pop(0), 0])
            for entry in self.running:
                entry[1] += 1
            self.done += [c for c, count in self.running if count == len(c.token_ids)]
            self.running = [entry for entry in self.running if entry[1] < len(entry[0].token_ids)]
        if not self.done:
            raise StopIteration
        return self.done.pop(0)


def table_model(world: World) -> LlamaForCausalLM:
    """The world as a transformers model: one-hot embeddings, a layer that adds nothing, the table as the head."""
    size = len(world.table)
    width = size + size % 2
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=width,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=END,
        rms_norm_eps=1e-12,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for projection in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            projection.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        # The norm makes a one-hot row sqrt(width) long.
        logprobs = torch.from_numpy(np.log(np.maximum(world.table, 1e-40))).float()
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = logprobs.T / width**0.5
    return model


def trajectories(backend: ChainBackend, count: int, *, seed: int, outcome: float | None) -> list[Completion]:
    """`count` completions of PROMPT, all with the given reward if one is given."""
    found: list[Completion] = []
    while len(found) < count:
        drawn = backend.generate([Request([PROMPT], 2 * count, SamplingParams(max_tokens=MAX_TOKENS), seed=seed)])
        found += [c for c in drawn if outcome is None or reward(c.token_ids) == outcome]
        seed += 1
    return found[:count]


def completion(request: int, branch: int, source: Request, tokens: list[int], reason: str) -> Completion:
    zeros = [0.0] * len(tokens)
    return Completion(request, branch, list(source.token_ids), tokens, zeros, list(zeros), reason)


def _stream(seed: int | None, n: int) -> np.ndarray:
    """Uniform numbers of a request's branches, (n, MAX_TOKENS)."""
    return np.random.default_rng(seed).random((n, MAX_TOKENS))
