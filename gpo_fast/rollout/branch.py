"""One continuation on its way through the engine, and groups of them whose tokens are being computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gpo_fast.rollout.types import Completion, FinishReason, SamplingParams


@dataclass(eq=False)
class Branch:
    """One continuation: what it was asked for, what it has sampled, and where its keys and values are."""

    request: int
    index: int
    prompt: list[int]
    prompt_array: np.ndarray  # int32, shared by the branches of a request
    order: bytes  # the prompt as big-endian bytes: compares like the list of its tokens, at the speed of memcmp
    params: SamplingParams
    key: int  # of its random stream
    keep: bool = False
    origin: int | None = None  # the trace that the prompt is the start of
    sequence: int = -1  # handle in the prefix cache; -1: not running
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    trace: int | None = None  # its own, when it is finished and kept
    admitted: int = 0  # order of admission: the last one is preempted first

    def all_tokens(self) -> np.ndarray:
        """Prompt and sampled tokens, int32."""
        if not self.tokens:
            return self.prompt_array
        return np.concatenate([self.prompt_array, np.asarray(self.tokens, dtype=np.int32)])

    def starts_like(self, other: Branch) -> bool:
        """Whether both have sampled nothing and continue the same prompt."""
        return not self.tokens and not other.tokens and self.order == other.order

    def completion(self) -> Completion:
        return Completion(
            self.request,
            self.index,
            self.prompt,
            self.tokens,
            self.logprobs,
            self.sampling_logprobs,
            self.finish_reason or "length",
            self.trace,
        )


class Opened(NamedTuple):
    """Branches of equal tokens with the sequence that they will share, of which `hit` tokens are in the cache."""

    group: list[Branch]
    sequence: int
    hit: int


@dataclass(eq=False)
class Prefill:
    """Branches of equal tokens, and how far the one sequence that they will share has been computed.

    tokens:  0 ........ hit ........ computed ........ end
             in the cache | computed   | still to come
    """

    branches: list[Branch]
    sequence: int
    tokens: np.ndarray  # int32
    slots: np.ndarray  # int32, of tokens[hit:]
    pages: np.ndarray  # int32
    hit: int
    computed: int

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.computed


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two arrays share."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
