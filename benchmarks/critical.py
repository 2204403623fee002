"""The search for critical steps, measured: right in worlds where the answer is known, and fast on a real model.

`exact`: in worlds given by a table (tests/exact_world.py), hit rate and tokens of uniform, racing and bisection
against N, errors among the searches that state a confidence of 1 - delta, coverage of uniform's intervals, and the
bias of reused samples.

`speed`: wall-clock time of searching trajectories of 8 to 16 steps with SmolLM2-135M. An outcome hangs on one token
at a random place of the trajectory, so one step decides. Nothing ends early, so uniform searches do the same work:
    (a) `model.generate`, a call for each step;   (b) all cut points in padded `generate` batches;
    (c) uniform on our engine;                    (d) racing on our engine, with the same N.

    python benchmarks/critical.py --json critical.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

import gpo_fast
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("exact", "speed", "both"), default="both")
    parser.add_argument("--count", type=int, default=1000, help="searches of each exact world and method")
    parser.add_argument("--trajectories", type=int, default=32, help="of the speed part")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of a trajectory in the speed part")
    parser.add_argument("--n-samples", type=int, default=4, help="N of the speed part")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--padded-rows", type=int, default=128, help="rows of a padded generate batch in (b)")
    parser.add_argument("--quick", action="store_true", help="60 searches; 2 trajectories of 24 tokens, once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.count, options.trajectories, options.new_tokens, options.repeats = 60, 2, 24, 1
    result: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}, **machine()}
    if options.part in ("exact", "both"):
        result["exact"] = exact_part(options.count)
    if options.part in ("speed", "both"):
        result["speed"] = speed_part(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


# -- exact worlds -------------------------------------------------------------------------------------------------


def exact_part(count: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name, (_, _, criterion) in WORLDS.items():
        methods = [("uniform", n) for n in (2, 4, 8, 12, 32)] + [("racing", n) for n in (1, 2, 4, 8, 12, 32)]
        methods += [("bisect", n) for n in (2, 4, 12)] if criterion == "min" else []
        table = Table("estimator", "N", "hit rate", "tokens", "rounds", "states >= 0.9", "wrong of them", title=name)
        for estimator, n in methods:
            row = {"world": name, "estimator": estimator, "n": n, **measure(name, count, estimator, n)}
            rows.append(row)
            low, high = row["interval"]
            table.add_row(
                estimator,
                str(n),
                f"{row['hit_rate']:.3f} ({low:.3f} to {high:.3f})",
                f"{row['tokens']:.0f}",
                f"{row['rounds']:.1f}",
                f"{row['stated']:.2f}",
                f"{row['wrong_of_stated']:.3f}",
            )
        Console().print(table)
    extra = {"coverage": coverage(count), "reuse_bias": {r: reuse_bias(r, count) for r in ("split", "all")}}
    print(json.dumps(extra, indent=1))
    return {"rows": rows, **extra}


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


# -- speed --------------------------------------------------------------------------------------------------------


def speed_part(options: argparse.Namespace) -> dict[str, Any]:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = load_demo_model(fast_dtype())
    model.eval()
    engine = RolloutEngine(model, tokenizer, max_batch_size=256)
    sampling = SamplingParams(max_tokens=options.new_tokens, ignore_eos=True)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in training(options.trajectories)]
    drawn = engine.generate([Request(p, 1, sampling, seed=i) for i, p in enumerate(prompts)])
    rng = np.random.default_rng(0)
    numbers = rng.integers(8, 17, len(drawn))  # steps of each trajectory
    decisive = rng.integers(0, options.new_tokens, len(drawn))  # place of the token that the outcome hangs on

    def outcome(completions: Sequence[Completion]) -> list[float]:
        return [float(c.token_ids[decisive[c.request_index]] % 2 == 0) for c in completions]

    own = outcome([Completion(i, 0, c.prompt_token_ids, c.token_ids, [], [], "length") for i, c in enumerate(drawn)])
    cuts_of = {tuple(c.token_ids): cuts(options.new_tokens, int(n)) for c, n in zip(drawn, numbers)}
    splitter = StepSplitter(lambda tokens, _: cuts_of[tuple(tokens)], min_tokens=1)
    roots = [[0.0, 1.0]] * len(drawn)  # V(s_0) is known from the group, as in training
    tokens: dict[str, list[int]] = {"c": [], "d": []}

    def ours(key: str, estimator: Any) -> None:
        engine.update_weights()  # the search of the round before has left its keys and values
        finder = CriticalStepFinder(
            engine,
            outcome,
            splitter,
            n_samples=options.n_samples,
            estimator=estimator,
            sampling=sampling,
            criterion="abs",
        )
        tokens[key].append(sum(s.num_tokens for s in finder.find(drawn, rewards=own, root_values=roots)))

    states = [(c, cut) for c in drawn for cut in cuts_of[tuple(c.token_ids)]]
    rows: dict[str, tuple[str, Callable[[], None]]] = {
        "a": ("generate, a call per step", lambda: per_step(model, states, options)),
        "b": (f"generate, padded, {options.padded_rows} rows", lambda: padded(model, states, options)),
        "c": ("uniform on our engine", lambda: ours("c", "uniform")),
        "d": ("racing on our engine", lambda: ours("d", "racing")),
    }
    seconds: dict[str, list[float]] = {key: [] for key in rows}
    for _ in range(options.repeats):
        for key, (_, run) in rows.items():
            began = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - began)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    table = Table("", "method", "seconds", "spread", "ratio to (c)", "tokens", title=f"{len(drawn)} trajectories")
    for key, (name, _) in rows.items():
        spread = f"{min(seconds[key]):.1f} to {max(seconds[key]):.1f}"
        work = str(tokens[key][-1]) if key in tokens else "as (c), and padding" if key == "b" else "as (c)"
        table.add_row(f"({key})", name, f"{medians[key]:.1f}", spread, f"{medians[key] / medians['c']:.2f}", work)
    Console().print(table)
    return {"seconds": seconds, "medians": medians, "tokens": tokens, "states": len(states)}


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


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "machine": platform.platform(),
        "cpu": cpu[0] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "gpo_fast": gpo_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
