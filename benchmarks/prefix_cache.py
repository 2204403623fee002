"""The prefix cache: latency of each call, memory, and a GPO rollout round beside other prefix caches.

    python benchmarks/prefix_cache.py --json results/prefix_cache.json

The latencies are those of the calls as Python makes them, the binding's overhead included. The round is GPO's: 32
trajectories of 2,000 tokens for 8 prompts, 24 marks on each, 4 forks a mark, 200 tokens a fork decoded 256 forks at a
time, released in random order, then new weights. Every cache keeps pages only; the share of the model's time uses the
decoding speed given by --tokens-per-second.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpo_fast.bench.common import ReadmeRow, Table, Timing, finish, human, interleave, parser
from gpo_fast.bench.prefix_cache_peers import CACHES, RolloutCache

from gpo_fast import PrefixCache

BLOCK = 16
PAGE_BYTES = 64  # of bookkeeping for a cached page: the goal
TARGETS = {
    "match 4,096 cached tokens": 2e-6,
    "fork(32) at 2,005 tokens": 2e-6,
    "append one token to 256 sequences": 10e-6,
    "plan, 256 sequences on 32 spines, fresh": 20e-6,
    "plan, the same with 8 cuts a spine, fresh": 20e-6,
    "plan, cached": 1e-6,
    "evict, a page": 100e-9,
}
BRIEF = ("fork(32) at 2,005 tokens", "plan, 256 sequences on 32 spines, fresh")  # in the README


@dataclass
class Workload:
    """One rollout round of GPO."""

    prompts: int = 8
    trajectories: int = 32
    prompt_tokens: int = 256
    trajectory_tokens: int = 2000
    marks: int = 24
    forks: int = 4
    fork_tokens: int = 200
    batch: int = 256
    num_blocks: int = 16384

    @property
    def decoded(self) -> int:
        forks = self.trajectories * self.marks * self.forks
        return self.trajectories * self.trajectory_tokens + forks * self.fork_tokens


# -- latencies ----------------------------------------------------------------------------------------------


def latencies(repeats: int) -> dict[str, Timing]:
    """Seconds of each call at the sizes of the targets."""
    results = {**match_and_fork(repeats), **append(repeats), **evict(repeats)}
    for name, cuts in (("on 32 spines", 1), ("8 cuts", 8)):
        fresh, cached = plan(repeats, cuts)
        label = "256 sequences on 32 spines" if cuts == 1 else "the same with 8 cuts a spine"
        results[f"plan, {label}, fresh"] = fresh
        if name == "on 32 spines":
            results["plan, cached"] = cached
    return results


def filled(cache: PrefixCache, tokens: np.ndarray) -> int:
    sequence, hit = cache.open(tokens)
    cache.append(sequence, tokens[hit:], len(tokens) - hit)
    cache.take_copies()
    cache.acknowledge_copies()
    cache.commit(sequence)
    return sequence


def timed(call: Callable[[], Any], repeats: int, number: int, after: Callable[[], object]) -> Timing:
    return interleave({"": call}, repeats=repeats, number=number, after=after)[""]


def match_and_fork(repeats: int) -> dict[str, Timing]:
    cache = PrefixCache(4096, BLOCK)
    tokens = np.arange(4097, dtype=np.int32)
    sequence = filled(cache, tokens)
    made: list[Any] = []

    def release() -> None:
        for handles in made:
            cache.release(handles)
        made.clear()

    match = timed(lambda: made.append(cache.open(tokens)[0]), repeats, 32, release)
    fork = timed(lambda: made.append(cache.fork(sequence, 2005, 32)), repeats, 32, release)
    return {"match 4,096 cached tokens": match, "fork(32) at 2,005 tokens": fork}


def append(repeats: int) -> dict[str, Timing]:
    """One token each, page after page: a sixteenth of the calls take new pages."""
    cache = PrefixCache(256 * (repeats + 2), BLOCK)  # each measurement fills a page of every sequence
    sequence = filled(cache, np.arange(256, dtype=np.int32))
    sequences = cache.fork(sequence, 256, 256)
    tokens = np.arange(256, dtype=np.int32)
    timing = timed(lambda: cache.append(sequences, tokens, 1), repeats, 16, lambda: None)
    return {"append one token to 256 sequences": timing}


def plan(repeats: int, cuts: int) -> tuple[Timing, Timing]:
    """256 sequences, 8 on each of 32 spines of one prompt. A truncation makes the next plan a fresh one."""
    cache = PrefixCache(65536, BLOCK)
    prompt = filled(cache, np.arange(256, dtype=np.int32))
    rows = []
    for spine in range(32):
        (trajectory,) = cache.fork(prompt, 256)
        cache.append(trajectory, np.full(1000, 1000 + spine, dtype=np.int32), 1000)
        for branch in range(8):
            at = 256 + 100 * (branch % cuts) + 160
            (row,) = cache.fork(trajectory, at)
            cache.append(row, np.full(50 + branch, 5000 + branch, dtype=np.int32), 50 + branch)
            rows.append(row)
    batch = np.array(rows, dtype=np.int64)
    other = cache.fork(prompt, 5, 1)[0]
    cache.plan(batch)
    change = interleave(
        {
            "change": lambda: cache.truncate(other, 5),
            "change and plan": lambda: (cache.truncate(other, 5), cache.plan(batch)),
        },
        repeats=repeats,
        number=8,
    )
    both, alone = change["change and plan"], change["change"].median
    fresh = Timing(both.median - alone, both.low - alone, both.high - alone, both.samples)
    cached = timed(lambda: cache.plan(batch), repeats, 32, lambda: None)
    return fresh, cached


def evict(repeats: int) -> dict[str, Timing]:
    """Pages of leaves of 12 pages each, evicted 64 at a time out of 20,000 leaves."""
    seconds = []
    leaves = 20000
    cache = PrefixCache(leaves * 12 + 64, BLOCK)
    for leaf in range(leaves):
        cache.release(filled(cache, np.full(192, leaf, dtype=np.int32)))
    for _ in range(min(repeats * 4, leaves * 12 // 64)):
        start = time.perf_counter()
        cache.evict(64)
        seconds.append((time.perf_counter() - start) / 64)
    return {"evict, a page": Timing.of(seconds)}


# -- the round ----------------------------------------------------------------------------------------------


def rollout_round(cache: RolloutCache, work: Workload, seed: int) -> dict[str, float]:
    """Seconds that a cache takes for a round, by phase."""
    rng = random.Random(seed)
    spent = dict.fromkeys(("open", "grow", "fork", "commit", "release", "new weights"), 0.0)

    def spend(phase: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        spent[phase] += time.perf_counter() - start
        return result

    trajectories = []
    for number in range(work.trajectories):
        prompt = [number % work.prompts + 7 * k for k in range(work.prompt_tokens)]
        trajectories.append(spend("open", cache.open, prompt))
        spend("commit", cache.commit, trajectories[-1:])
    for step in range(work.trajectory_tokens):
        spend("grow", cache.grow, trajectories, [step * 64 + k for k in range(work.trajectories)])
    spend("commit", cache.commit, trajectories)
    length = work.prompt_tokens + work.trajectory_tokens
    cuts = [(t, rng.randrange(work.prompt_tokens, length)) for t in trajectories for _ in range(work.marks)]
    at_once = max(1, work.batch // work.forks)
    for start in range(0, len(cuts), at_once):
        batch: list[int] = []
        for trajectory, position in cuts[start : start + at_once]:
            batch += spend("fork", cache.fork, trajectory, position, work.forks)
        for _ in range(work.fork_tokens):
            spend("grow", cache.grow, batch, [rng.getrandbits(16) for _ in batch])
        spend("commit", cache.commit, batch)
        rng.shuffle(batch)
        for sequence in batch:
            spend("release", cache.release, [sequence])
    rng.shuffle(trajectories)
    spend("release", cache.release, trajectories)
    spend("new weights", cache.forget)
    return spent


def make(kind: type[RolloutCache], work: Workload, absent: dict[str, str]) -> RolloutCache | None:
    try:
        return kind(work.num_blocks, BLOCK)
    except (ImportError, AttributeError, TypeError) as error:  # not installed, or another version's internals
        absent[kind.name] = f"{type(error).__name__}: {error}"
        return None


def compare(work: Workload, rounds: int) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """Seconds by cache and round, the caches taking turns; and why a peer could not run."""
    seconds: dict[str, list[dict[str, float]]] = {}
    absent: dict[str, str] = {}
    caches = [cache for kind in CACHES if (cache := make(kind, work, absent)) is not None]
    for number in range(rounds):
        for cache in caches:
            gc.collect()
            seconds.setdefault(cache.name, []).append(rollout_round(cache, work, number))
    return seconds, absent


def memory() -> dict[str, float]:
    """Bytes of bookkeeping for a cached page after a round: all, and with the token ids as well."""
    work = Workload()
    cache = PrefixCache(65536, BLOCK)
    rng = np.random.default_rng(0)
    for number in range(work.trajectories):
        trunk = filled(cache, rng.integers(0, 50000, 2256, dtype=np.int32))
        for position in rng.integers(256, 2256, work.marks):
            forks = cache.fork(trunk, int(position), work.forks)
            tokens = rng.integers(0, 50000, work.forks * work.fork_tokens, dtype=np.int32)
            cache.append(forks, tokens, work.fork_tokens)
            cache.take_copies()
            cache.acknowledge_copies()
            cache.commit(forks)
            cache.release(forks)
        cache.release(trunk)
        del number
    pages = cache.stats()["cached"]
    whole_pool = cache.bookkeeping_bytes()
    return {"pages": pages, "bookkeeping": whole_pool / pages, "with token ids": whole_pool / pages + 4 * BLOCK}


# -- the report ---------------------------------------------------------------------------------------------


def latency_table(timings: dict[str, Timing], memory_bytes: dict[str, float]) -> Table:
    table = Table("gpo-fast, called from Python", ("call", "median", "middle half", "target", "median / target"))
    for name, target in TARGETS.items():
        timing = timings[name]
        spread = f"{human(timing.low)} .. {human(timing.high)}"
        table.add(name, human(timing.median), spread, human(target), f"{timing.median / target:.2f}")
    used = memory_bytes["bookkeeping"]
    table.add("bookkeeping for a cached page", f"{used:.1f} B", "", f"{PAGE_BYTES} B", f"{used / PAGE_BYTES:.2f}")
    table.add("the same with its token ids", f"{memory_bytes['with token ids']:.1f} B", "", "", "")
    return table


def round_table(
    seconds: dict[str, list[dict[str, float]]], absent: dict[str, str], work: Workload, tokens_per_second: float
) -> Table:
    model_time = work.decoded / tokens_per_second
    title = f"A GPO round: {work.decoded} tokens, {model_time:.1f} s of the model at {tokens_per_second:.0f} tokens/s"
    phases = tuple(next(iter(seconds.values()))[0])
    table = Table(title, ("cache", *phases, "total", "spread", "x gpo-fast", "of model's time"))
    totals = {name: Timing.of([sum(r.values()) for r in rounds]) for name, rounds in seconds.items()}
    ours = totals[CACHES[0].name].median
    for name, rounds in seconds.items():
        total = totals[name]
        by_phase = (human(Timing.of([r[phase] for r in rounds]).median) for phase in phases)
        spread = f"{human(total.low)} .. {human(total.high)}"
        share = f"{100 * total.median / model_time:.2f} %"
        table.add(name, *by_phase, human(total.median), spread, f"{total.median / ours:.1f}", share)
    for name, reason in absent.items():
        table.add(name, "not run: " + reason, *[""] * (len(phases) + 3))
    return table


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """Each call against its goal, the memory, and a round beside the other caches."""
    rows = []
    for name, goal in TARGETS.items():
        median = result["data"]["latencies"][name]["median"]
        what = f"prefix cache, from Python: {name}"
        brief = (what, human(median)) if name in BRIEF else None
        rows.append(ReadmeRow(what, "prefix_cache.py", human(median), human(goal), median > goal, brief))
    used = result["data"]["memory"]["bookkeeping"]
    memory_row = ReadmeRow(
        "bookkeeping of a cached page",
        "prefix_cache.py",
        f"{used:.0f} bytes",
        f"{PAGE_BYTES} bytes",
        used > PAGE_BYTES,
    )
    totals = {
        name: Timing.of([sum(phases.values()) for phases in rounds]).median
        for name, rounds in result["data"]["rounds"].items()
    }
    ours = totals.pop(CACHES[0].name)
    others = sorted((seconds / ours, name) for name, seconds in totals.items())
    text = "; ".join(f"{name} {ratio:.1f} x as long" for ratio, name in others)
    what = f"a GPO round of {Workload().decoded:,} tokens, all calls of the cache"
    return [*rows, memory_row, ReadmeRow(what, "prefix_cache.py", f"{human(ours)}; {text}")]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of the workload for each cache")
    arguments.add_argument("--repeats", type=int, default=400, help="measurements of each latency")
    arguments.add_argument(
        "--tokens-per-second",
        type=float,
        default=20000.0,
        help="the model's decoding speed that the share of its time refers to (an assumption: measure your own)",
    )
    args = arguments.parse_args()
    work = Workload(trajectories=4, trajectory_tokens=300, fork_tokens=40) if args.quick else Workload()
    repeats, rounds = (20, 2) if args.quick else (args.repeats, args.rounds)
    timings, used = latencies(repeats), memory()
    seconds, absent = compare(work, rounds)
    tables = [latency_table(timings, used), round_table(seconds, absent, work, args.tokens_per_second)]
    finish(args, tables, {"latencies": timings, "memory": used, "rounds": seconds, "not run": absent})


if __name__ == "__main__":
    main()
