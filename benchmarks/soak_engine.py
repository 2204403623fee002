"""A soak of the rollout engine: random requests, forks, cancels and weight updates on far too few KV pages.

    python benchmarks/soak_engine.py --seconds 1800 --seed 0

A tiny random model, so that the scheduler and the cache are what is under load. Streams follow one another: requests
that share prefixes or continue kept completions come in while others run, some are cancelled, some streams are dropped
half-way, and the weights change between them. It stops with an error when

- a branch does not come out, comes out twice, or comes out after more steps than all branches have tokens together;
- the cache's integrity check fails (every thousandth step, and at the end of every stream);
- pages or handles are held after a stream has ended and its traces are dropped;
- the logprobs of a completion are not those of the model (a stale or foreign key would show here);
- the memory of the process grows by more than `--growth` MiB between the second and the last quarter.

At the end 10,000 branches are queued at once. Also what a short test in CI runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tiny

from gpo_fast import Completion, Request, RolloutEngine, SamplingParams

PAGES = 40  # of 4 tokens: room for two or three of the longest sequences, where up to 12 want to run
BLOCK_SIZE = 4
LONGEST = 56  # tokens of a sequence
CHECK_EVERY = 1000  # steps
TOLERANCE = 1e-3  # float32 logprobs of two different orders of summation differ by about 1e-5
FEWEST_STREAMS = 100  # on a slow machine too: every kind of event has its chance


class Soak:
    """The engine, its model, and what has been seen of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.model = tiny.model(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
        page = RolloutEngine(self.model, tiny.tokenizer(), block_size=BLOCK_SIZE).block_bytes
        self.engine = RolloutEngine(
            self.model,
            tiny.tokenizer(),
            kv_cache_memory=PAGES * page,
            block_size=BLOCK_SIZE,
            max_batch_size=12,
            max_prefill_tokens=24,
            seed=seed,
        )
        self.seen: Counter[str] = Counter()
        self.prompts = [self._tokens(self.random.randint(1, 30)) for _ in range(6)]
        self._checked_at = 0

    def run(self, seconds: float) -> list[tuple[float, int]]:
        """Streams one after the other for so long; (seconds, resident bytes) of the process on the way."""
        start = time.perf_counter()
        memory = [(0.0, resident_bytes())]
        while (now := time.perf_counter() - start) < seconds or self.seen["streams"] < FEWEST_STREAMS:
            self.one_stream()
            if now - memory[-1][0] > seconds / 200:
                memory.append((now, resident_bytes()))
        return memory

    def one_stream(self) -> None:
        if self.random.random() < 0.3:
            self._new_weights()
        expected: dict[tuple[int, int], Request] = {}
        stream = self.engine.stream()
        first_step, budget = self.engine.counters["steps"], 0
        waves = self.random.randint(1, 6)
        drop = self.random.random() < 0.1
        finished: list[Completion] = []
        while waves > 0 or expected:
            if waves > 0 and (not expected or self.random.random() < 0.2):
                waves -= 1
                requests = [self._request(finished) for _ in range(self.random.randint(1, 8))]
                for number, request in zip(stream.add(requests), requests):
                    expected |= {(number, branch): request for branch in range(request.n)}
                    budget += request.n * (len(request.token_ids) + request.sampling.max_tokens)
            if expected and self.random.random() < 0.1:
                number, branch = self.random.choice(list(expected))
                self.seen["cancelled"] += stream.cancel(number, branch if self.random.random() < 0.5 else None)
            completion = next(stream)
            request = expected.pop((completion.request_index, completion.branch_index))
            self._check(completion, request)
            finished.append(completion)
            steps = self.engine.counters["steps"]
            # Each step computes a token at least; a preemption computes a sequence again.
            again = self.engine.counters["preemptions"] * LONGEST
            require(steps - first_step <= budget + again, f"{steps - first_step} steps for {budget} tokens: starvation")
            if steps - self._checked_at >= CHECK_EVERY:
                self._checked_at = steps
                self.engine.cache.check_integrity()
                self.seen["integrity checks"] += 1
            if drop and self.random.random() < 0.2:
                self.seen["dropped streams"] += 1
                stream.close()
                break
        else:
            require(next(stream, None) is None, "a branch came out that nobody asked for")
        self.seen["streams"] += 1
        self._check_nothing_is_held()

    def queue_at_once(self, branches: int) -> float:
        """Queues so many branches at once; the seconds until all have come out."""
        start = time.perf_counter()
        requests = [Request(self.random.choice(self.prompts), 100, SamplingParams(max_tokens=2))] * (branches // 100)
        drawn = self.engine.generate(requests)
        require(len(drawn) == branches, f"{branches} branches were queued, {len(drawn)} came out")
        self._check_nothing_is_held()
        return time.perf_counter() - start

    def _tokens(self, length: int) -> list[int]:
        return [self.random.randrange(3, 64) for _ in range(length)]

    def _request(self, finished: list[Completion]) -> Request:
        kept = [c for c in finished if c.trace is not None]
        trace = None
        if kept and self.random.random() < 0.4:  # a fork from a finished completion at any of its tokens
            origin = self.random.choice(kept)
            cut = self.random.randint(1, max(1, len(origin.token_ids) - 1))
            prompt, trace = [*origin.prompt_token_ids, *origin.token_ids[:cut]], origin.trace
        else:
            base = self.random.choice(self.prompts)
            prompt = [*base[: self.random.randint(1, len(base))], *self._tokens(self.random.randint(0, 6))]
        prompt = prompt[: LONGEST - 1]
        sampling = SamplingParams(
            temperature=self.random.choice([0.0, 0.7, 1.0]),
            top_k=self.random.choice([0, 0, 5]),
            max_tokens=self.random.randint(1, LONGEST - len(prompt)),
            ignore_eos=self.random.random() < 0.3,
        )
        return Request(prompt, self.random.randint(1, 9), sampling, keep=self.random.random() < 0.3, trace=trace)

    def _new_weights(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
                parameter.mul_(0.999)
        self.engine.update_weights()
        self.seen["weight updates"] += 1

    def _check(self, completion: Completion, request: Request) -> None:
        self.seen["completions"] += 1
        self.seen["tokens"] += len(completion.token_ids)
        require(completion.prompt_token_ids == list(request.token_ids), "a completion of another prompt came out")
        if completion.finish_reason == "length":
            require(len(completion.token_ids) == request.sampling.max_tokens, "a branch ended before its last token")
        if completion.token_ids and self.random.random() < 0.02:
            ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                logprobs = self.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            own = logprobs[len(completion.prompt_token_ids) - 1 :].numpy()
            worst = float(np.abs(own - np.asarray(completion.logprobs)).max())
            require(worst < TOLERANCE, f"a completion's logprobs are off by {worst}: it saw keys that are not its own")
            self.seen["logprob checks"] += 1

    def _check_nothing_is_held(self) -> None:
        self.engine.cache.check_integrity()
        stats = self.engine.cache.stats()
        require(stats["sequences"] == 0, f"{stats['sequences']} sequences are held after a stream has ended")
        self.engine.traces.clear()
        stats = self.engine.cache.stats()
        require(stats["live"] == stats["marks"] == 0, f"pages or marks are held after a stream: {stats}")
        require(stats["free"] + stats["cached"] == PAGES, f"pages are missing: {stats}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def growth(memory: list[tuple[float, int]]) -> float:
    """Bytes by which the median of the last quarter is above that of the second."""
    quarter = max(1, len(memory) // 4)
    early = [rss for _, rss in memory[quarter : 2 * quarter]] or [memory[0][1]]
    return float(np.median([rss for _, rss in memory[-quarter:]]) - np.median(early))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=16.0, help="MiB that the process may grow")
    parser.add_argument("--queued", type=int, default=10_000, help="branches queued at once at the end")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    soak = Soak(args.seed)
    start = time.perf_counter()
    memory = soak.run(args.seconds)
    grown = growth(memory) / 2**20
    elapsed = time.perf_counter() - start
    queued = soak.queue_at_once(args.queued)
    counters = dataclasses.asdict(_Report(elapsed, grown, memory[-1][1] / 2**20, queued)) | soak.seen
    print(json.dumps(counters | {k: v for k, v in soak.engine.counters.items() if k != "cancelled"}))
    require(grown <= args.growth, f"the process grew by {grown:.1f} MiB between the second and the last quarter")


@dataclasses.dataclass
class _Report:
    seconds: float
    growth_mib: float
    resident_mib: float
    queued_seconds: float


if __name__ == "__main__":
    main()
