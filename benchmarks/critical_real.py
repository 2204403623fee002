"""Does the search find the mistake? SmolLM2-135M on chains of sums, where arithmetic knows the first wrong line.

The model is warmed up as in `gpo-fast demo`. Failing trajectories are taken from groups with right and wrong
outcomes, and each method names a step (criterion "min"); a hit is the first line that differs from the right one.
Uniform, the posterior's choice from uniform's continuations, racing, bisection, the proposals alone, and a random step
(Satori's way of resetting).

A uniform search draws the continuations of each state from streams keyed by (seed, branch), so the first N of a
larger search are what a search with N would have drawn: uniform rows are prefixes of the largest N, drawn once.

The first wrong line need not be the largest fall: a weak model may have no hope before it, or reach the right answer
after it by another mistake. So "check" estimates all values again with many fresh continuations and reports the fall
at the step that each method names, which needs no arithmetic, and how often another step falls further for sure.

Each method runs on a chunk of the trajectories at a time, and what is finished is kept in the folder of --warm: the
script can be cut off and started again. After a change of the search, remove `searches.jsonl` there.

    python benchmarks/critical_real.py --warm /tmp/warm --json critical_real.json
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from gpo_fast.bench.common import Progress, ReadmeRow, Table, finish, parser

from gpo_fast import Completion, CriticalStepFinder, Request, RolloutEngine, SamplingParams, StepSplitter
from gpo_fast.critical.proposals import FirstMistake, GradientScore, Proposal, TokenEntropy, logprob_dip
from gpo_fast.data import decode_completion
from gpo_fast.demo.model import fast_dtype, load_demo_model
from gpo_fast.demo.run import FULL
from gpo_fast.demo.task import held_out, solution, solved
from gpo_fast.demo.warmup import warm_up
from gpo_fast.evaluation import wilson_interval
from gpo_fast.steps import Step

SPLITTER = StepSplitter("newline", min_tokens=1)
GROUP, MAX_TOKENS = 8, 64
CHUNK = 24  # trajectories that are searched at a time
LARGEST_N, SMALLER_N = 12, (2, 4, 8)
BRIEF = (f"uniform N={LARGEST_N}", f"racing N={LARGEST_N}", "logprob alone", "mistake alone")  # methods in the README
CHECK_N, CHECK_SEED = 32, 10_000
GOAL = 0.9  # share of first wrong lines that the largest uniform search is to find
SEARCHES: dict[str, dict[str, Any]] = {
    f"uniform N={LARGEST_N}": {"n_samples": LARGEST_N},
    "posterior N=4": {"n_samples": 4, "estimator": "posterior"},
    "posterior N=12": {"n_samples": 12, "estimator": "posterior"},
    "racing N=2": {"n_samples": 2, "estimator": "racing"},
    "racing N=4": {"n_samples": 4, "estimator": "racing"},
    "racing N=12": {"n_samples": 12, "estimator": "racing"},
    "bisect N=4": {"n_samples": 4, "estimator": "bisect"},
    "bisect N=12": {"n_samples": 12, "estimator": "bisect"},
    "racing N=4, logprob first": {"n_samples": 4, "estimator": "racing", "proposal": "logprob"},
    "racing N=4, entropy first": {"n_samples": 4, "estimator": "racing", "proposal": "entropy"},
    "racing N=4, gradient first": {"n_samples": 4, "estimator": "racing", "proposal": "gradient"},
}
PROPOSALS: dict[str, Callable[[Any], Proposal]] = {
    "logprob alone": lambda model: logprob_dip,
    "mistake alone": lambda model: FirstMistake(),
    "entropy alone": TokenEntropy,
    "gradient alone": GradientScore,
}


class Failing(NamedTuple):
    """A failing trajectory, its steps (lines), its problem, the rewards of its group, and its first wrong line."""

    completion: Completion
    steps: list[Step]
    row: dict[str, Any]
    group: list[float]
    mistake: int


class Found(NamedTuple):
    """What a method says of one trajectory: the step, the values behind it, and each state's rewards."""

    step: int
    values: list[float]
    rewards: list[list[float]]
    lengths: list[list[int]]
    tokens: int
    confidence: float


Method = Callable[[list[Failing], int], list[Found]]  # trajectories and the number of the first of them
Methods = dict[str, tuple[list[Found], float | None]]  # findings and seconds (None: part of another row)


def main() -> None:
    arguments = parse()
    transformers.utils.logging.disable_progress_bar()
    count = CHUNK * (1 if arguments.quick else arguments.chunks)
    model, tokenizer = warmed(arguments.warm, arguments.solve_rate, arguments.warmup_steps)
    engine = RolloutEngine(model, tokenizer, max_batch_size=128)
    progress = Progress(None if arguments.warm is None else arguments.warm / "searches.jsonl")
    failing, accuracy = failing_trajectories(engine, count, progress)
    calls: dict[str, Method] = {name: partial(search, engine, **options) for name, options in SEARCHES.items()}
    calls |= {name: partial(alone, make(model)) for name, make in PROPOSALS.items()}
    wanted = arguments.only or [*calls, "check"]
    methods: Methods = {name: pieces(progress, name, failing, call) for name, call in calls.items() if name in wanted}
    largest = f"uniform N={LARGEST_N}"
    if largest in methods:
        smaller = {f"uniform N={n}": ([prefix(f, n) for f in methods[largest][0]], None) for n in SMALLER_N}
        methods = smaller | methods
    tables = [hit_table(methods, failing, accuracy)]
    data: dict[str, Any] = {"accuracy": accuracy, "hits": hit_rows(methods, failing)}
    if largest in methods:
        data["mistakes"] = mistakes(failing, methods[largest][0])
        print(data["mistakes"])
    if largest in methods and "check" in wanted:
        checked = failing[: CHUNK * arguments.check_chunks]
        fresh, _ = pieces(progress, f"check N={CHECK_N}", checked, partial(search_afresh, engine))
        table, data["check"] = check_table(methods, checked, fresh)
        tables.append(table)
    finish(arguments, tables, data)


def parse() -> argparse.Namespace:
    result = parser(__doc__ or "")
    result.add_argument("--warm", type=Path, help="folder of the warmed-up model and of the finished searches")
    result.add_argument("--solve-rate", type=float, default=FULL.solve_rate, help="at which the warm-up ends, ...")
    result.add_argument("--warmup-steps", type=int, default=FULL.warmup_steps, help="... or after so many steps")
    result.add_argument("--chunks", type=int, default=4, help=f"{CHUNK} trajectories each")
    result.add_argument("--check-chunks", type=int, default=4, help="of the chunks above, how many are checked")
    result.add_argument(
        "--only", nargs="*", choices=[*SEARCHES, *PROPOSALS, "check"], metavar="METHOD", help="run these only"
    )
    return result.parse_args()


def warmed(folder: Path | None, solve_rate: float, max_steps: int) -> tuple[Any, Any]:
    """The demo's model after its warm-up, from `folder` if it is there."""
    if folder is not None and (folder / "config.json").is_file():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=fast_dtype(), local_files_only=True)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, tokenizer = load_demo_model(torch.float32)
    warm_up(
        model,
        tokenizer,
        solve_rate=solve_rate,
        max_steps=max_steps,
        on_step=lambda step, loss: print(f"warm-up {step}/{max_steps} loss {loss:.3f}", flush=True),
    )
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model.to(fast_dtype()).eval(), tokenizer


# -- trajectories -------------------------------------------------------------------------------------------------


def failing_trajectories(engine: RolloutEngine, count: int, progress: Progress) -> tuple[list[Failing], float]:
    """The first failing trajectory of each group with mixed outcomes, and the accuracy of all rollouts."""
    rows = held_out(1024)
    found: list[Failing] = []
    rewards: list[float] = []
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        groups, _ = progress.piece(f"rollouts from {start}", partial(rollouts, engine, batch, start))
        for row, group in zip(batch, groups):
            rewards += [reward for _, reward in group]
            failing = failing_of(engine, row, group)
            found += [failing] if failing is not None else []
        if len(found) >= count:
            return found[:count], statistics.mean(rewards)
    raise SystemExit(f"{len(found)} of {len(rows)} groups of {GROUP} have right and wrong rollouts, {count} were asked")


def rollouts(engine: RolloutEngine, rows: list[dict[str, Any]], start: int) -> list[list[tuple[Any, float]]]:
    """GROUP completions of each problem with their rewards."""
    prompts = [engine.tokenizer(row["prompt"])["input_ids"] for row in rows]
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    drawn = engine.generate([Request(p, GROUP, sampling, seed=start + i) for i, p in enumerate(prompts)])
    outcomes = scores(engine, drawn, [rows[c.request_index] for c in drawn])
    pairs = [(asdict(c), reward) for c, reward in zip(drawn, outcomes)]
    return [pairs[i : i + GROUP] for i in range(0, len(pairs), GROUP)]


def failing_of(engine: RolloutEngine, row: dict[str, Any], group: Sequence[Any]) -> Failing | None:
    """A group's first failing rollout, if others succeed and its lines can be told."""
    outcomes = [reward for _, reward in group]
    if not 0 < sum(outcomes) < len(group):
        return None
    worst = Completion(**group[outcomes.index(0.0)][0])
    steps = SPLITTER.split(worst.token_ids, engine.tokenizer)
    mistake = first_wrong_line(engine, worst, steps, row)
    return None if mistake is None else Failing(worst, steps, row, outcomes, mistake)


def first_wrong_line(
    engine: RolloutEngine, completion: Completion, steps: list[Step], row: dict[str, Any]
) -> int | None:
    """The step that holds the first line unlike the solution's; None where steps and lines do not match.

    A line is right with its end: one that goes on where the solution ends, or ends where it goes on, is wrong (the
    newline is a token of the line before it, and continuations of a state after it cannot take it back).
    """
    text = [decode_completion(completion.token_ids[s.start : s.end], engine.tokenizer).strip() for s in steps]
    right = solution(row["metadata"]["expression"]).split("\n")
    if len(text) < 2 or any("\n" in line for line in text):
        return None
    for i, (line, true) in enumerate(zip(text, right)):
        if line != true:
            return i
    return min(len(text), len(right)) - 1


def scores(engine: RolloutEngine, completions: Sequence[Completion], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 for a right final result, else 0."""
    texts = [decode_completion(c.token_ids, engine.tokenizer) for c in completions]
    return solved(texts, [r["answer"] for r in rows], [r["metadata"] for r in rows])


# -- methods ------------------------------------------------------------------------------------------------------


def pieces(progress: Progress, name: str, failing: list[Failing], method: Method) -> tuple[list[Found], float]:
    """A method's findings on all trajectories, a chunk at a time, and its seconds."""
    done = [
        progress.piece(f"{name} from {start}", partial(method, failing[start : start + CHUNK], start))
        for start in range(0, len(failing), CHUNK)
    ]
    return [Found(*found) for results, _ in done for found in results], sum(seconds for _, seconds in done)


def search(
    engine: RolloutEngine, failing: list[Failing], seed: int, *, root_known: bool = True, **options: Any
) -> list[Found]:
    """A search of all of them at once."""

    def outcome(completions: Sequence[Completion]) -> list[float]:
        return scores(engine, completions, [failing[c.request_index].row for c in completions])

    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    finder = CriticalStepFinder(engine, outcome, SPLITTER, criterion="min", sampling=sampling, seed=seed, **options)
    engine.update_weights()  # nothing of an earlier search is in the cache
    found = finder.find(
        [f.completion for f in failing],
        rewards=[0.0] * len(failing),
        root_values=[f.group if root_known else None for f in failing],
    )
    return [
        Found(
            step.index,
            step.values,
            step.continuation_rewards,
            [[len(c.token_ids) for c in drawn] for drawn in step.continuations],
            step.num_tokens,
            step.confidence,
        )
        for step in found
    ]


def search_afresh(engine: RolloutEngine, failing: list[Failing], start: int) -> list[Found]:
    """A uniform search with CHECK_N continuations that no other search has drawn."""
    return search(engine, failing, CHECK_SEED + start, root_known=False, n_samples=CHECK_N)


def prefix(found: Found, n: int) -> Found:
    """What a uniform search with a smaller N finds: the first n continuations of each state."""
    rewards = [drawn[:n] for drawn in found.rewards]
    values = [statistics.mean(drawn) if drawn else known for drawn, known in zip(rewards, found.values)]
    values.append(found.values[-1])
    falls = falls_of(values)
    lengths = [drawn[:n] for drawn in found.lengths]
    return Found(falls.index(max(falls)), values, rewards, lengths, sum(map(sum, lengths)), math.nan)


def alone(proposal: Proposal, failing: list[Failing], start: int) -> list[Found]:
    """A proposal's own favourite, without a single continuation."""
    scored = proposal([f.completion for f in failing], [f.steps for f in failing])
    return [Found(max(range(len(s)), key=s.__getitem__), [], [], [], 0, math.nan) for s in scored]


# -- results ------------------------------------------------------------------------------------------------------


def hit_rows(methods: Methods, failing: list[Failing]) -> list[dict[str, Any]]:
    """Hits, 95 % interval, tokens and seconds of each method, and of a random step."""
    chance = sum(1 / len(f.steps) for f in failing)
    rows: list[dict[str, Any]] = [{"method": "random step", "hits": chance, "tokens": 0, "seconds": 0.0}]
    for name, (found, seconds) in methods.items():
        hits = sum(f.mistake == result.step for f, result in zip(failing, found))
        rows.append({"method": name, "hits": hits, "tokens": sum(f.tokens for f in found), "seconds": seconds})
    return [{**row, "rate": wilson_interval(row["hits"], len(failing))._asdict()} for row in rows]


def hit_table(methods: Methods, failing: list[Failing], accuracy: float) -> Table:
    steps = statistics.mean(len(f.steps) for f in failing)
    table = Table(
        f"The first wrong line of {len(failing)} failing trajectories ({steps:.1f} steps on average; "
        f"the model solves {accuracy:.1%})",
        ("method", "hits", "95 % interval", "tokens", "seconds"),
    )
    for row in hit_rows(methods, failing):
        rate = row["rate"]
        interval = f"{rate['low']:.0%} to {rate['high']:.0%}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        table.add(row["method"], f"{rate['accuracy']:.1%}", interval, f"{row['tokens']:,}", seconds)
    return table


def mistakes(failing: list[Failing], uniform: list[Found]) -> dict[str, Any]:
    """Where the largest uniform search misses: by the value before the first wrong line, and by success after it.

    The values are the search's own, so this describes and does not test: see "check" for fresh ones.
    """
    groups: dict[str, list[bool]] = {"at most 0.1": [], "0.1 to 0.3": [], "above 0.3": []}
    recovered = []
    for trajectory, found in zip(failing, uniform):
        before, after = found.values[trajectory.mistake : trajectory.mistake + 2]
        name = "at most 0.1" if before <= 0.1 else "0.1 to 0.3" if before <= 0.3 else "above 0.3"
        groups[name].append(found.step == trajectory.mistake)
        if trajectory.mistake + 1 < len(trajectory.steps):
            recovered.append(after > 0)
    return {
        "hits_by_value_before": {name: [sum(hits), len(hits)] for name, hits in groups.items()},
        "success_seen_after_mistake": [sum(recovered), len(recovered)],
    }


def falls_of(values: Sequence[float]) -> list[float]:
    """How far the value falls at each step."""
    return [before - after for before, after in zip(values, values[1:])]


def check_table(methods: Methods, failing: list[Failing], fresh: list[Found]) -> tuple[Table, dict[str, Any]]:
    """The fall in value at the step that each method names, by continuations that no method has seen.

    The means are unbiased; only "largest fall" chooses by the values that it reports and is somewhat too high.
    """
    falls = [falls_of(found.values) for found in fresh]
    named: dict[str, list[int]] = {"first wrong line": [f.mistake for f in failing]}
    named |= {name: [found.step for found in results] for name, (results, _) in methods.items()}
    there = {name: [fall[step] for fall, step in zip(falls, steps)] for name, steps in named.items()}
    there["random step"] = [statistics.mean(fall) for fall in falls]
    there["largest fall"] = [max(fall) for fall in falls]
    table = Table(
        f"Fall in value at the step named, {len(failing)} trajectories, by {CHECK_N} fresh continuations of each state",
        ("method", "mean fall", "standard error"),
    )
    for name, values in there.items():
        table.add(name, f"{statistics.mean(values):.3f}", f"{statistics.stdev(values) / math.sqrt(len(values)):.3f}")
    return table, {"values": [found.values for found in fresh], "falls": there, **mistaken(failing, fresh)}


def mistaken(failing: list[Failing], fresh: list[Found]) -> dict[str, Any]:
    """How often the first wrong line is for sure not the critical step, and how low the value before it is."""
    before = [found.values[f.mistake] for f, found in zip(failing, fresh)]
    another = sum(falls_further(found.values, f.mistake) for f, found in zip(failing, fresh))
    return {
        "trajectories": len(failing),
        "another_step_falls_further": another,
        "value_before_below_0.1": sum(value < 0.1 for value in before),
    }


def falls_further(values: Sequence[float], step: int) -> bool:
    """Whether the value falls further at another step, by more than two standard errors of the difference."""
    shares = [(v * CHECK_N + 1) / (CHECK_N + 2) for v in values[:-1]]  # never 0 or 1, which would have no spread
    variances = np.array([*(p * (1 - p) / CHECK_N for p in shares), 0.0])
    fall = -np.diff(np.eye(len(values)), axis=0)  # row i: the weights of the values in the fall at step i
    weights = fall - fall[step]
    return bool((weights @ np.array(values) > 2 * np.sqrt(weights**2 @ variances) + 1e-9).any())


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """How often each method finds the first wrong line."""
    table, solve_rate = result["tables"][0], result["arguments"]["solve_rate"]
    largest = next(row for row in table["rows"] if row[0] == f"uniform N={LARGEST_N}")
    missed = float(largest[1].rstrip("%")) < 100 * GOAL
    found = {method: f"{method} {hits} ({tokens} tokens)" for method, hits, _, tokens, _ in table["rows"]}
    title = table["title"].replace("The first", "finding the first")
    command = f"critical_real.py --solve-rate {solve_rate}"
    brief = "; ".join(found[method] for method in BRIEF)
    return [
        ReadmeRow(title, command, "; ".join(found.values()), f"{GOAL:.0%} at N={LARGEST_N}", missed, (title, brief))
    ]


if __name__ == "__main__":
    main()
