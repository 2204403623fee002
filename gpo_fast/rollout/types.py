"""What goes into a rollout engine and what comes out: the contract that every backend keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy.

    The filters are applied in the order temperature, `top_k` (0: off), `top_p` (1: off), `min_p` (0: off).
    Generation ends at a token of `stop_token_ids`, at the model's end-of-sequence tokens unless `ignore_eos`,
    at the first occurrence of one of the strings `stop`, or after `max_tokens` tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "temperature", self.temperature, "at least 0 (0 is greedy)")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 is off)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        if isinstance(self.stop, str):
            raise TypeError(f"stop must be a tuple of strings, got the string {self.stop!r}")


@dataclass(frozen=True)
class Request:
    """`n` independent continuations of `token_ids`. A branch's tokens depend only on (seed, branch, weights).

    `seed=None` takes the next seed of the engine's own sequence.

    `keep` holds the keys and values of the finished branches in memory, for requests that continue from inside of
    them; `trace` is the one of the kept completion that `token_ids` are the start of. Both change only the speed:
    a trace that is gone (new weights, memory wanted elsewhere, another engine) means a look-up of the prefix.
    """

    token_ids: Sequence[int]
    n: int = 1
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    keep: bool = False
    trace: int | None = None

    def __post_init__(self) -> None:
        _require(self.n >= 1, "n", self.n, "at least 1")
        if len(self.token_ids) == 0:
            raise ValueError("a request needs at least one token: token_ids is empty")


@dataclass
class Completion:
    """One sampled continuation.

    `token_ids` includes the token that ended it (end-of-sequence or stop token), if one did.
    `logprobs` are of the sampled tokens under temperature 1 with no filter (a trainer's forward pass);
    `sampling_logprobs` are under the distribution that was sampled from (0 for greedy).
    """

    request_index: int
    branch_index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish_reason: FinishReason
    trace: int | None = None  # where its engine keeps its keys and values, if the request said `keep`


class RolloutBackend(Protocol):
    """What the search and the trainer need of an engine."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All branches of all requests, in the order of requests, then branches."""
        ...

    def update_weights(self) -> None:
        """The model's weights have changed: nothing computed with the old ones may be used again."""
        ...


def _require(condition: bool, name: str, value: object, right: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {right}, got {value!r}")
