"""A pool of rollout engines as Ray actors: weights travel through the object store, a lost actor is replaced.

The requests of a call are dealt out in chunks, one at a time to each actor, so a fast actor takes more of them. A
branch's tokens depend on its seed and the weights alone, so a chunk that is done again gives the same completions.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpo_fast.rollout.types import Completion, Request

logger = logging.getLogger(__name__)

Build = Callable[[], tuple[Any, Any]]  # -> model, tokenizer


class _Worker:
    """One engine; runs inside an actor."""

    def __init__(self, build: Build | str, weights: Any, engine_options: dict[str, Any]) -> None:
        from gpo_fast.rollout.engine import RolloutEngine

        model, tokenizer = _load(build)
        self.engine = RolloutEngine(model, tokenizer, **engine_options)
        if weights is not None:
            self.load(weights)

    def load(self, weights: dict[str, Any]) -> None:
        self.engine.model.load_state_dict(weights)
        self.engine.update_weights()

    def generate(self, requests: list[Request]) -> list[Completion]:
        return self.engine.generate(requests)


@dataclass
class _Chunk:
    """Requests that go to an actor together; `first` is the index of the first of them."""

    first: int
    requests: list[Request]
    attempts: int = 0


class RayBackend:
    """Samples completions on a pool of `RolloutEngine` actors; keeps the contract of `RolloutBackend`.

    Args:
        build: a path or hub id of a model, or a function without arguments that gives (model, tokenizer). It runs in
            each actor, so what it names must exist on every machine.
        num_actors: engines in the pool.
        model: the model that is trained in this process; `update_weights` sends its weights. None: the actors keep
            those that they were built with.
        tokenizer: of this process; loaded from `build` if that is a path.
        resources: Ray's options of an actor, for example `{"num_gpus": 1}`.
        chunk_size: requests that an actor gets at once.
        max_losses: a chunk that was lost with so many actors is given up: it is what kills them.
        engine_options: keyword arguments of each `RolloutEngine`.

    Raises:
        ImportError: Ray is not installed (`pip install gpo-fast[ray]`).
    """

    def __init__(
        self,
        build: Build | str,
        num_actors: int,
        *,
        model: Any = None,
        tokenizer: Any = None,
        resources: dict[str, Any] | None = None,
        chunk_size: int = 8,
        max_losses: int = 3,
        max_length: int | None = None,
        seed: int = 0,
        **engine_options: Any,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("RayBackend needs Ray: pip install 'gpo-fast[ray]'") from error
        if num_actors < 1 or chunk_size < 1 or max_losses < 1:
            raise ValueError(
                f"num_actors, chunk_size and max_losses must be at least 1, got {num_actors}, {chunk_size} and "
                f"{max_losses}"
            )
        if tokenizer is None:
            if not isinstance(build, str):
                raise ValueError("RayBackend needs the tokenizer of the model that 'build' makes: pass tokenizer=")
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(build)
        self._ray = ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self.tokenizer = tokenizer
        self.model = model
        self.max_length = max_length if max_length is not None else _context(model)
        self.chunk_size = chunk_size
        self.max_losses = max_losses
        self._build = build
        self._engine_options = engine_options
        self._actor_class = ray.remote(**(resources or {"num_cpus": 1}))(_Worker)
        self._weights: Any = None  # reference to the last weights sent
        self._next_seed = seed
        self._replaced = 0
        self._finished = 0
        self.actors = [self._start() for _ in range(num_actors)]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All branches of all requests, in the order of requests, then branches.

        Raises:
            RuntimeError: a chunk took `max_losses` actors with it.
            ValueError: as `RolloutEngine.generate`.
        """
        seeded = [self._with_seed(r) for r in requests]
        chunks = deque(
            _Chunk(first, seeded[first : first + self.chunk_size]) for first in range(0, len(seeded), self.chunk_size)
        )
        prompts = [[int(t) for t in r.token_ids] for r in seeded]
        results: list[list[Completion]] = [[] for _ in seeded]
        idle = deque(range(len(self.actors)))
        running: dict[Any, tuple[int, _Chunk]] = {}
        try:
            while chunks or running:
                while chunks and idle:
                    place, chunk = idle.popleft(), chunks.popleft()
                    running[self.actors[place].generate.remote(chunk.requests)] = (place, chunk)
                (ready, *_), _ = self._ray.wait(list(running), num_returns=1)
                place, chunk = running.pop(ready)
                completions = self._collect(ready, place, chunk)
                idle.append(place)
                if completions is None:
                    chunks.appendleft(chunk)
                    continue
                for completion in completions:
                    number = chunk.first + completion.request_index
                    results[number].append(replace(completion, request_index=number, prompt_token_ids=prompts[number]))
                self._finished += len(completions)
        finally:
            for task in running:  # only after an error: nobody waits for these any more
                self._ray.cancel(task, force=False)
        return [c for of_request in results for c in of_request]

    def update_weights(self) -> None:
        """Sends the trained model's weights to all actors; returns when they have them."""
        if self.model is None:
            return
        weights = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        self._weights = self._ray.put(weights)
        sent = [actor.load.remote(self._weights) for actor in self.actors]
        for place, task in enumerate(sent):
            try:
                self._ray.get(task)
            except self._ray.exceptions.RayActorError:  # noqa: PERF203
                self._replace(place)  # the new actor starts with these weights

    def stats(self) -> dict[str, int]:
        """Actors in the pool, actors replaced and completions received since the pool was made."""
        return {"actors": len(self.actors), "replaced": self._replaced, "completions": self._finished}

    def close(self) -> None:
        """Ends the actors; Ray itself keeps running."""
        for actor in self.actors:
            self._ray.kill(actor)
        self.actors = []

    def _start(self) -> Any:
        return self._actor_class.remote(self._build, self._weights, self._engine_options)

    def _replace(self, place: int) -> None:
        self._replaced += 1
        self.actors[place] = self._start()

    def _collect(self, task: Any, place: int, chunk: _Chunk) -> list[Completion] | None:
        """The completions of a chunk, or None if its actor was lost; a new one has then taken its place."""
        try:
            completions: list[Completion] = self._ray.get(task)
            return completions
        except self._ray.exceptions.RayActorError as error:
            chunk.attempts += 1
            if chunk.attempts >= self.max_losses:
                raise RuntimeError(
                    f"requests {chunk.first} to {chunk.first + len(chunk.requests) - 1} were lost with "
                    f"{chunk.attempts} actors, so they may be what ends them (out of memory?): {error}"
                ) from error
            logger.warning("actor %d was lost (%s); it is replaced and its work done again", place, error)
            self._replace(place)
            return None
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    def _with_seed(self, request: Request) -> Request:
        if request.seed is not None:
            return request
        self._next_seed += 1
        return replace(request, seed=self._next_seed - 1)


def _load(build: Build | str) -> tuple[Any, Any]:
    if not isinstance(build, str):
        return build()
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(build, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(build)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _context(model: Any) -> int:
    config = model.config.get_text_config() if model is not None else None
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)
