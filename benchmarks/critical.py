"""The search for critical steps, measured: right in worlds where the answer is known, and fast on a real model.

`exact`: in worlds given by a table (tests/exact_world.py), hit rate and tokens of uniform, racing and bisection
against N, and errors among the searches that state a confidence of 1 - delta. `coverage` of uniform's intervals, and
`reuse`: the bias of reused samples.

`a` to `d`: wall-clock time of searching trajectories of 8 to 16 steps with SmolLM2-135M. An outcome hangs on one
token at a random place of the trajectory, so one step decides. Nothing ends early, so uniform searches do the same
work:
    (a) `model.generate`, a call for each step (with --every K each K-th call is timed, and scaled by tokens);
    (b) all cut points in padded `generate` batches;
    (c) uniform on our engine;                    (d) racing on our engine, with the same N;
    (e) racing with half of N as its budget.
The hit rate says how often the step with the deciding token was found: the ways differ in that too.

With --progress what is finished is kept, and the script can be cut off and started again, or run in slices. After a
change of the code remove that file.

    python benchmarks/critical.py --progress critical.jsonl --only a
    python benchmarks/critical.py --progress critical.jsonl --json critical.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gpo_fast.bench.common import Progress, ReadmeRow, Table, Timing, finish, human, parser

from gpo_fast import Completion, CriticalStepFinder, Request, RolloutEngine, SamplingParams, StepSplitter
from gpo_fast.critical.step import SCORES
from gpo_fast.demo.model import fast_dtype, load_demo_model
from gpo_fast.demo.task import training
from gpo_fast.evaluation import wilson_interval

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import exact_world as exact

WORLDS: dict[str, tuple[list[exact.World], float | None, str]] = {
    "even, mistakes stay": ([exact.even(10, 0.9)], 0.0, "min"),
    "even, repaired 1 in 10": ([exact.even(10, 0.85, 0.1)], 0.0, "min"),
    "even, repaired 3 in 10, abs": ([exact.even(12, 0.8, 0.3)], None, "abs"),
    "even, repaired 1 in 10, max": ([exact.even(10, 0.85, 0.1)], 0.0, "max"),
    "one pivot, fall": ([exact.pivotal(k) for k in (2, 5, 8, 10)], 0.0, "min"),
    "one pivot, gain": ([exact.pivotal(k) for k in (2, 5, 8, 10)], 1.0, "max"),
}
ESTIMATORS = [("uniform", n) for n in (2, 4, 8, 12, 32)] + [("racing", n) for n in (1, 2, 4, 8, 12, 32)]
BISECTIONS = [("bisect", n) for n in (2, 4, 12)]
WAYS = {
    "a": "generate, a call per step",
    "b": "generate, padded batches",
    "c": "uniform on our engine",
    "d": "racing on our engine",
    "e": "racing on our engine, half of N",
}
GOALS = {("a", "c"): 15, ("b", "c"): 5, ("c", "d"): 2, ("c", "e"): 2}  # how many times as long the first has to take


def main() -> None:
    arguments = parse()
    if arguments.quick:
        arguments.count, arguments.trajectories, arguments.new_tokens, arguments.repeats = 60, 2, 24, 1
    progress = Progress(arguments.progress)
    tables: list[Table] = []
    data: dict[str, Any] = {}
    if "exact" in arguments.only:
        data["exact"] = [row for name in WORLDS for row in exact_rows(name, arguments.count, progress)]
        tables += [exact_table(name, [r for r in data["exact"] if r["world"] == name]) for name in WORLDS]
    if "coverage" in arguments.only:
        data["coverage"], _ = progress.piece(f"coverage, {arguments.count}", partial(coverage, arguments.count))
        tables.append(coverage_table(data["coverage"]))
    if "reuse" in arguments.only:
        name = f"reuse bias, {arguments.count}"
        data["reuse"], _ = progress.piece(name, lambda: {r: reuse_bias(r, arguments.count) for r in ("split", "all")})
        tables.append(reuse_table(data["reuse"]))
    ways = [way for way in WAYS if way in arguments.only]
    if ways:
        measured = speed(ways, arguments, progress)
        data["speed"] = {f"{way} {WAYS[way]}": record for way, record in measured.items()}
        tables += speed_tables(measured, arguments)
    finish(arguments, tables, data)


def parse() -> argparse.Namespace:
    result = parser(__doc__ or "")
    parts = ["exact", "coverage", "reuse", *WAYS]
    result.add_argument("--only", nargs="*", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    result.add_argument("--progress", type=Path, help="file of the finished pieces")
    result.add_argument("--count", type=int, default=400, help="searches of each exact world and method")
    result.add_argument("--trajectories", type=int, default=32, help="of the speed rows")
    result.add_argument("--new-tokens", type=int, default=64, help="length of a trajectory in the speed rows")
    result.add_argument("--n-samples", type=int, default=4, help="N of the speed rows")
    result.add_argument("--repeats", type=int, default=3, help="of the speed rows")
    result.add_argument("--padded-rows", type=int, default=128, help="rows of a padded generate batch in (b)")
    result.add_argument(
        "--every",
        type=int,
        default=1,
        help="run every so many-th call of (a) and scale its time by tokens",
    )
    return result.parse_args()


# -- exact worlds -------------------------------------------------------------------------------------------------


def exact_rows(name: str, count: int, progress: Progress) -> list[dict[str, Any]]:
    rows = []
    for estimator, n in [*ESTIMATORS, *(BISECTIONS if WORLDS[name][2] == "min" else [])]:
        piece = f"{name}, {estimator} N={n}, {count} searches"
        measured, _ = progress.piece(piece, partial(measure, name, count, estimator, n))
        rows.append({"world": name, "estimator": estimator, "n": n, **measured})
    return rows


def exact_table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(name, ("estimator", "N", "hit rate", "95 % interval", "tokens", "rounds", "stated", "wrong of them"))
    for row in rows:
        low, high = row["interval"]
        table.add(
            row["estimator"],
            str(row["n"]),
            f"{row['hit_rate']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['tokens']:.0f}",
            f"{row['rounds']:.1f}",
            f"{row['stated']:.2f}",
            f"{row['wrong_of_stated']:.3f}",
        )
    return table


def measure(name: str, count: int, estimator: Any, n: int) -> dict[str, Any]:
    worlds, outcome, criterion = WORLDS[name]
    hits, found = [], []
    for number, world in enumerate(worlds):
        backend = exact.ChainBackend(world)
        drawn = exact.trajectories(backend, count // len(worlds), seed=number, outcome=outcome)
        others = exact.rewards(exact.trajectories(backend, 8 * len(drawn), seed=99, outcome=None))
        roots = [others[8 * i : 8 * i + 8] for i in range(len(drawn))]
        finder = exact_finder(backend, criterion=criterion, estimator=estimator, n_samples=n)
        steps = finder.find(drawn, root_values=roots)
        for trajectory, step in zip(drawn, steps):
            true = SCORES[criterion](np.diff(world.values(trajectory.token_ids)))
            hits.append(bool(true[step.index] >= true.max() - 1e-9))
        found += steps
    rate = wilson_interval(sum(hits), len(hits))
    stated = [hit for hit, step in zip(hits, found) if step.confidence >= 0.9]
    return {
        "searches": len(hits),
        "hit_rate": rate.accuracy,
        "interval": (rate.low, rate.high),
        "tokens": statistics.mean(s.num_tokens for s in found),
        "rollouts": statistics.mean(s.num_rollouts for s in found),
        "rounds": statistics.mean(s.num_rounds for s in found),
        "mean_confidence": statistics.mean(s.confidence for s in found),
        "stated": len(stated) / len(hits),
        "wrong_of_stated": 1 - sum(stated) / len(stated) if stated else 0.0,
    }


def exact_finder(backend: Any, **options: Any) -> CriticalStepFinder:
    sampling = SamplingParams(max_tokens=exact.MAX_TOKENS)
    return CriticalStepFinder(backend, exact.rewards, exact.splitter(), sampling=sampling, **options)


def coverage(count: int) -> dict[str, float]:
    """Share of the intervals value +- 1.96 standard errors that hold the true value, by N (0.2 < V < 0.8)."""
    world = exact.even(6, 0.8, 0.2)
    backend = exact.ChainBackend(world)
    drawn = exact.trajectories(backend, count, seed=3, outcome=None)
    truth = np.array([world.values(t.token_ids)[:-1] for t in drawn])
    middle = (truth > 0.2) & (truth < 0.8)
    shares = {}
    for n in (4, 12, 32, 80):
        found = exact_finder(backend, n_samples=n).find(drawn)
        values = np.array([f.values[:-1] for f in found])
        errors = np.array([f.standard_errors[:-1] for f in found])
        shares[str(n)] = float((np.abs(values - truth) <= 1.96 * errors)[middle].mean())
    return shares


def reuse_bias(reuse: Any, count: int) -> dict[str, float]:
    """Mean of (reward of a reused sample - true value of its state), with its standard error."""
    world = exact.even(8, 0.85, 0.15)
    backend = exact.ChainBackend(world)
    drawn = exact.trajectories(backend, count, seed=2, outcome=None)
    gaps = []
    for trajectory, step in zip(drawn, exact_finder(backend, n_samples=4, reuse=reuse).find(drawn)):
        true = world.values(trajectory.token_ids)[step.reset_state]
        gaps.append(float(np.mean(step.reusable_rewards)) - true)
    return {"mean": float(np.mean(gaps)), "standard_error": float(np.std(gaps) / len(gaps) ** 0.5)}


def coverage_table(shares: dict[str, float]) -> Table:
    table = Table("Intervals of uniform's values that hold the true value", ("N", "share"))
    for n, share in shares.items():
        table.add(n, f"{share:.1%}")
    return table


def reuse_table(bias: dict[str, dict[str, float]]) -> Table:
    table = Table("Reward of reused samples less the value of their state", ("reuse", "mean", "standard error"))
    for reuse, gap in bias.items():
        table.add(reuse, f"{gap['mean']:+.4f}", f"{gap['standard_error']:.4f}")
    return table


# -- speed --------------------------------------------------------------------------------------------------------


class Workload:
    """Trajectories with an outcome that one of their tokens decides, and the four ways to search them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.arguments = arguments
        self.model, tokenizer = load_demo_model(fast_dtype())
        self.model.eval()
        self.engine = RolloutEngine(self.model, tokenizer, max_batch_size=256)
        self.sampling = SamplingParams(max_tokens=arguments.new_tokens, ignore_eos=True)
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in training(arguments.trajectories)]
        self.drawn = self.engine.generate([Request(p, 1, self.sampling, seed=i) for i, p in enumerate(prompts)])
        rng = np.random.default_rng(0)
        numbers = rng.integers(8, 17, len(self.drawn))  # steps of each trajectory
        self.decisive = rng.integers(0, arguments.new_tokens, len(self.drawn))  # place of the token that decides
        self.cuts_of = {tuple(c.token_ids): cuts(arguments.new_tokens, int(n)) for c, n in zip(self.drawn, numbers)}
        self.states = [(c, cut) for c in self.drawn for cut in self.cuts_of[tuple(c.token_ids)]]

    def run(self, way: str) -> tuple[int, int | None]:
        """Searches once; the number of sampled tokens, and of the trajectories whose deciding step was found."""
        if way in ("c", "d", "e"):
            return self.ours("uniform" if way == "c" else "racing", self.arguments.n_samples // (1 + (way == "e")))
        if way == "a":
            per_step(self.model, self.states[:: self.arguments.every], self.arguments)
        else:
            padded(self.model, self.states, self.arguments)
        return sum(self.arguments.n_samples * (self.arguments.new_tokens - cut) for _, cut in self.states), None

    def ours(self, estimator: Any, n_samples: int) -> tuple[int, int]:
        self.engine.update_weights()  # the search of the round before has left its keys and values
        finder = CriticalStepFinder(
            self.engine,
            self.outcome,
            StepSplitter(lambda tokens, _: self.cuts_of[tuple(tokens)], min_tokens=1),
            n_samples=n_samples,
            estimator=estimator,
            sampling=self.sampling,
            criterion="abs",
        )
        roots = [[0.0, 1.0]] * len(self.drawn)  # V(s_0) is known from the group, as in training
        found = finder.find(self.drawn, root_values=roots)
        ends = [[*(s.start for s in step.steps[1:]), self.arguments.new_tokens] for step in found]
        hits = [e[step.index] > d >= step.steps[step.index].start for step, e, d in zip(found, ends, self.decisive)]
        return sum(step.num_tokens for step in found), sum(map(int, hits))

    def outcome(self, completions: Sequence[Completion]) -> list[float]:
        return [float(c.token_ids[self.decisive[c.request_index]] % 2 == 0) for c in completions]


def speed(ways: list[str], arguments: argparse.Namespace, progress: Progress) -> dict[str, dict[str, Any]]:
    """Seconds and tokens of each way. The ways take turns; only what is not known already is run.

    With --every, (a) runs a sample of its calls. Their seconds are scaled by the tokens of all calls over theirs.
    """
    workload = cache(lambda: Workload(arguments))

    def run(way: str) -> tuple[int, int | None]:
        return workload().run(way)

    size = f"{arguments.trajectories} x {arguments.new_tokens}, N={arguments.n_samples}"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    last: dict[str, tuple[int, int | None]] = {}
    for repeat in range(arguments.repeats):
        for way in ways:
            name = f"({way}) {size}, {repeat}"
            if not progress.has(name):
                workload()  # loading is not part of the time
            last[way], spent = progress.piece(name, partial(run, way))
            seconds[way].append(spent)
    if arguments.every > 1 and "a" in ways:
        left = [arguments.new_tokens - cut for _, cut in workload().states]
        seconds["a"] = [spent * sum(left) / sum(left[:: arguments.every]) for spent in seconds["a"]]
    return {
        way: {"seconds": asdict(Timing.of(seconds[way])), "tokens": last[way][0], "hits": last[way][1]} for way in ways
    }


def speed_tables(measured: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> list[Table]:
    size = f"{arguments.trajectories} trajectories of {arguments.new_tokens} tokens, N = {arguments.n_samples}"
    times = Table(size, ("way", "time", "middle half", "tokens", "deciding steps found"))
    for way, row in measured.items():
        timing = Timing(**row["seconds"])
        spread = f"{human(timing.low)} - {human(timing.high)}"
        hits = "" if row["hits"] is None else f"{row['hits']} of {arguments.trajectories}"
        sampled = f", 1 of {arguments.every} calls timed" if way == "a" and arguments.every > 1 else ""
        times.add(f"({way}) {WAYS[way]}{sampled}", human(timing.median), spread, f"{row['tokens']:,}", hits)
    ratios = Table("How many times as long", ("ways", "ratio", "goal"))
    for (slow, fast), goal in GOALS.items():
        if slow in measured and fast in measured:
            ratio = measured[slow]["seconds"]["median"] / measured[fast]["seconds"]["median"]
            ratios.add(f"({slow}) over ({fast})", f"{ratio:.2f} x", f"{goal} x")
    return [times, ratios]


def cuts(length: int, count: int) -> list[int]:
    """The inner cuts of `count` even steps."""
    return [i * length // count for i in range(1, count)]


@torch.no_grad()
def per_step(model: Any, states: list[tuple[Completion, int]], options: argparse.Namespace) -> None:
    for completion, cut in states:
        ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids[:cut]]])
        left = options.new_tokens - cut
        model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=options.n_samples, **sampled(model, left)
        )


@torch.no_grad()
def padded(model: Any, states: list[tuple[Completion, int]], options: argparse.Namespace) -> None:
    """Rows are ordered by what they have left, so that a batch wastes as little as it can."""
    prefixes = [[*c.prompt_token_ids, *c.token_ids[:cut]] for c, cut in states for _ in range(options.n_samples)]
    left = [options.new_tokens - cut for _, cut in states for _ in range(options.n_samples)]
    order = sorted(range(len(left)), key=left.__getitem__)
    for start in range(0, len(order), options.padded_rows):
        batch = order[start : start + options.padded_rows]
        width = max(len(prefixes[i]) for i in batch)
        ids = torch.tensor([[0] * (width - len(prefixes[i])) + prefixes[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(prefixes[i])) + [1] * len(prefixes[i]) for i in batch])
        model.generate(ids, attention_mask=mask, **sampled(model, max(left[i] for i in batch)))


def sampled(model: Any, new_tokens: int) -> dict[str, Any]:
    pad = model.generation_config.pad_token_id or 0
    return {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "pad_token_id": pad,
    }


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """The ratios of ways to search, with the goals that the result's own table names."""
    what, ratios = result["tables"][0]["title"], result["tables"][1]["rows"]
    options = result["arguments"]
    command = f"critical.py --trajectories {options['trajectories']} --repeats {options['repeats']}"
    if int(options.get("every", 1)) > 1:
        command += f" --every {options['every']}"
    named = {}
    for row in result["tables"][0]["rows"]:
        name, text = row[0].split(" ", 1)
        hits = row[4] if len(row) > 4 else ""  # older results do not have them
        named[name] = text + (f" ({hits} found)" if hits else "")
    rows = []
    for pair, ratio, goal in ratios:
        slow, fast = (named[way] for way in pair.split(" over "))
        text = f"search of {what}: {fast}, against {slow}"
        missed = float(ratio.split()[0]) < float(goal.split()[0])
        rows.append(ReadmeRow(text, command, f"{ratio} as fast", goal, missed, (text, f"{ratio} as fast")))
    return rows


if __name__ == "__main__":
    main()
