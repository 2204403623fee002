"""llama.cpp as a peer of the rollout benchmark: its own way for many branches, one batch over sequences that share the
cells of their prompt's keys and values.

The prompt is computed once as one sequence, `llama_memory_seq_cp` gives its cells to the branches (in a unified cache
without copying), and each decode step is one batch of a token for every branch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MOST_SEQUENCES = 64  # that decode together, as in our engine


class Sequences:
    """A context of llama.cpp for up to `MOST_SEQUENCES` sequences, of `cells` tokens together."""

    def __init__(self, path: Path, cells: int) -> None:
        from llama_cpp import llama_cpp

        self.api: Any = llama_cpp
        self._silent = self.api.llama_log_callback(lambda *_: None)  # kept: the library holds no reference
        self.api.llama_log_set(self._silent, None)
        self.api.llama_backend_init()
        weights = self.api.llama_model_default_params()
        weights.use_extra_bufts = False  # weights laid out anew for the CPU: on one with AMX 0.3.36 crashed with them
        self.model = self.api.llama_model_load_from_file(str(path).encode(), weights)
        options = self.api.llama_context_default_params()
        options.n_ctx = cells
        options.n_batch = 2048
        options.n_seq_max = MOST_SEQUENCES
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.kv_unified = True
        self.context = self.api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.batch = self.api.llama_batch_init(options.n_batch, 0, 1)
        self.sampler = self.api.llama_sampler_init_dist(1)

    def decode(self, tokens: list[int], positions: list[int], sequences: list[int], wanted: list[bool]) -> None:
        """One batch: a token, its position and sequence, and whether its logits are wanted."""
        for i, (token, position, sequence, logits) in enumerate(zip(tokens, positions, sequences, wanted)):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, logits
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        self.batch.n_tokens = len(tokens)
        if self.api.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError(f"llama.cpp could not decode a batch of {len(tokens)} tokens")

    def continue_all(self, prompts: list[list[int]], branches: int, new_tokens: int) -> None:
        """Samples `branches` continuations of each prompt at temperature 1; all of them decode together."""
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_clear(memory, False)
        tokens: list[int] = []
        for number, prompt in enumerate(prompts):
            first = number * branches
            last = [False] * (len(prompt) - 1) + [True]
            self.decode(prompt, list(range(len(prompt))), [first] * len(prompt), last)
            for branch in range(first, first + branches):
                if branch > first:
                    self.api.llama_memory_seq_cp(memory, first, branch, -1, -1)
                tokens.append(self.sample(-1))
        sequences = list(range(len(tokens)))
        lengths = [len(prompt) for prompt in prompts for _ in range(branches)]
        for step in range(new_tokens - 1):
            self.decode(tokens, [length + step for length in lengths], sequences, [True] * len(tokens))
            tokens = [self.sample(i) for i in sequences]

    def sample(self, row: int) -> int:
        return int(self.api.llama_sampler_sample(self.sampler, self.context, row))


def with_llama_cpp(path: Path, prompts: list[list[int]], branches: int, new_tokens: int) -> Callable[[], object]:
    """A call that continues the prompts, as many of them together as there are sequences."""
    together = max(1, MOST_SEQUENCES // branches)
    cells = sum(map(len, prompts[:together])) + together * branches * new_tokens
    sequences = Sequences(path, max(cells, 512))

    def run() -> None:
        for start in range(0, len(prompts), together):
            sequences.continue_all(prompts[start : start + together], branches, new_tokens)

    return run
