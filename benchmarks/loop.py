"""GPO's loop: what an iteration costs, and what it gains at equal time.

    python benchmarks/loop.py gain                 # GRPO, GPO and others: two tasks, five seeds, equal time
    python benchmarks/loop.py gain --only-report   # tables and plot of what is finished
    python benchmarks/loop.py gradient             # what an update is worth per second, at weights that stay
    python benchmarks/loop.py plane                # where resets can win: difficulty, length, how it is spread
    python benchmarks/loop.py price --only gpo     # seconds of an iteration, SmolLM2-135M (a row alone)

`gain` trains a model of 0.4M parameters as a whole, or with `--model smollm2` the demo's model with LoRA. Each (task,
algorithm, seed) is one line of the study's file; a study that was killed goes on, and two processes with different
--seeds may work on one file. An algorithm may have settings of GPOConfig behind it, as in
`--algorithms grpo gpo:criterion=max,num_resets=4`; `dpo gpo-dpo` compares those two. `gradient` takes algorithms in
the same way and adds a warm start to its file with each call (see loop_gradient.py). `plane` trains nothing either: it
computes the progress that a token buys (see loop_plane.py).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import transformers
from gpo_fast.bench import loop_gradient, loop_plane, loop_price
from gpo_fast.bench.common import add_common, device_name, finish
from gpo_fast.bench.loop_gain import Trial, append, is_finished, run
from gpo_fast.bench.loop_models import MODELS
from gpo_fast.bench.loop_price import HEADLINE, ROWS
from gpo_fast.bench.loop_study import plot, studies
from gpo_fast.bench.loop_tasks import Task

from gpo_fast.run_files import read_records


def main() -> None:
    arguments_of = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments_of.add_subparsers(dest="command", required=True)
    gain = commands.add_parser("gain", help="accuracy at equal time")
    gain.add_argument("--model", choices=MODELS, default="tiny")
    gain.add_argument("--tasks", nargs="+", default=["chain_sum", "basic_arithmetic"])
    gain.add_argument("--steps", type=int, default=6, help="length of a solution in lines")
    gain.add_argument("--start", type=float, default=0.3, help="solve rate at which the warm-up ends")
    gain.add_argument(
        "--algorithms", nargs="+", default=["grpo", "gpo", "random", "gpo-default", "grpo-optimal", "gpo-optimal"]
    )
    gain.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    gain.add_argument("--seconds", type=float, default=60.0, help="training time of each run")
    gain.add_argument("--learning-rate", type=float, help="by default the model's, tuned for GRPO")
    gain.add_argument("--folder", type=Path, default=Path("runs/gain"))
    gradient = commands.add_parser("gradient", help="what an update is worth per second")
    gradient.add_argument("--tasks", nargs="+", default=["chain_sum"])
    gradient.add_argument("--steps", type=int, default=6, help="length of a solution in lines")
    gradient.add_argument("--start", type=float, default=0.3, help="solve rate at which the warm-up ends")
    gradient.add_argument("--algorithms", nargs="+", default=["grpo", "gpo", "random", "grpo-optimal", "gpo-optimal"])
    gradient.add_argument("--batches", type=int, default=40, help="of 64 problems, for each algorithm")
    gradient.add_argument("--folder", type=Path, default=Path("runs/gain"), help="its warm starts are those of gain")
    plane = commands.add_parser("plane", help="progress per token over difficulty, length and how it is spread")
    plane.add_argument("--prompts", type=int, default=2000, help="drawn in each cell")
    plane.add_argument("--price", type=float, default=1.0, help="of training on a token; sampling one costs 1")
    plane.add_argument("--hit", type=float, default=0.85, help="how often a proposal names the right step")
    price = commands.add_parser("price", help="seconds of an iteration")
    price.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(map(repr, ROWS))}")
    price.add_argument("--ablation", action="store_true", help="also GPO with each of its parts switched off")
    price.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    price.add_argument("--repeats", type=int, default=2, help="iterations after one that is not counted")
    price.add_argument("--folder", type=Path, default=Path("runs/price"))
    for command in (gain, gradient, plane, price):
        add_common(command)
    for command in (gain, gradient, price):
        command.add_argument("--only-report", action="store_true", help="run nothing")
    arguments = arguments_of.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    runs = {"gain": study, "gradient": gradient_quality, "plane": progress_plane, "price": prices}
    runs[arguments.command](arguments)


def gain_trials(arguments: argparse.Namespace) -> list[Trial]:
    """Seed by seed, so that a study that is cut off has as many whole seeds as possible."""
    tasks = [Task(name, arguments.steps) for name in arguments.tasks]
    return [
        Trial(
            task,
            algorithm,
            seed,
            arguments.start,
            arguments.seconds,
            learning_rate=arguments.learning_rate,
            model=arguments.model,
        )
        for seed, task, algorithm in product(arguments.seeds, tasks, arguments.algorithms)
    ]


def study(arguments: argparse.Namespace) -> None:
    """Runs what is not finished, then reports all that is in the study's file."""
    path = arguments.folder / "study.jsonl"
    for trial in [] if arguments.only_report else gain_trials(arguments):
        if not is_finished(trial, read_records(path)):
            record = run(trial, arguments.folder)
            append(path, record)
            first, last = record["points"][0]["accuracy"], record["points"][-1]["accuracy"]
            print(f"{trial.task.label}, {trial.algorithm}, seed {trial.seed}: {first:.1%} to {last:.1%}", flush=True)
    records = read_records(path)
    if not records:
        raise SystemExit(f"no finished run in {path}")
    found = studies(records)
    plot(found, arguments.folder / "study.png")
    finish(arguments, [s.table() for s in found], {"records": records})


def gradient_quality(arguments: argparse.Namespace) -> None:
    """Measures what is not in the file yet, then reports all that is."""
    path, batches = arguments.folder / "gradient.jsonl", 3 if arguments.quick else arguments.batches

    def measured() -> list[dict[str, Any]]:
        return [record for record in read_records(path) if record["batches"] == batches]

    for name, algorithm in product(arguments.tasks, arguments.algorithms):
        trial = Trial(Task(name, arguments.steps), algorithm, 0, arguments.start, 0.0)
        if not arguments.only_report and not is_finished(trial, measured()):
            record = loop_gradient.measure(trial, arguments.folder, batches)
            append(path, record)
            print(f"{trial.task.label}, {algorithm}: {record['cpu_seconds']:.2f} s for a batch", flush=True)
    records = measured()
    if not loop_gradient.cells(records):
        raise SystemExit(f"no warm start with {loop_gradient.REFERENCE} and {batches} batches in {path}")
    finish(arguments, loop_gradient.tables(records), {"records": records})


def progress_plane(arguments: argparse.Namespace) -> None:
    """Computes every cell."""
    prompts = 50 if arguments.quick else arguments.prompts
    records = loop_plane.measure(prompts, arguments.price, arguments.hit)
    finish(arguments, [loop_plane.table(records)], {"records": records})


def prices(arguments: argparse.Namespace) -> None:
    """Measures the rows that are not in the file yet, then reports those that are."""
    size = replace(loop_price.SIZES[arguments.device], **(loop_price.QUICK if arguments.quick else {}))
    path, repeats = arguments.folder / "price.jsonl", arguments.repeats
    wanted = arguments.only or (ROWS if arguments.ablation else HEADLINE)

    def measured() -> dict[str, dict[str, Any]]:
        same = {"size": asdict(size), "repeats": repeats}
        return {r["row"]: r for r in read_records(path) if all(r[name] == value for name, value in same.items())}

    for row in [] if arguments.only_report else [row for row in wanted if row not in measured()]:
        append(path, loop_price.measure(row, size, repeats))
        print(f"{row}: {measured()[row]['seconds']:.2f} s", flush=True)
    records = [measured()[row] for row in ROWS if row in measured()]
    if not records:
        raise SystemExit(f"no finished row of this size in {path}")
    finish(arguments, loop_price.tables(records), {"records": records})


if __name__ == "__main__":
    main()
