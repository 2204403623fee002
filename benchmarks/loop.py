"""GPO's loop: what an iteration costs, and what it gains at equal time.

    python benchmarks/loop.py gain                 # GRPO, GPO, random resets: two tasks, five seeds, equal time
    python benchmarks/loop.py gain --only-report   # tables and plot of what is finished
    python benchmarks/loop.py plane                # where targeted resets win: difficulty x length x pivotal or even
    python benchmarks/loop.py price --only gpo     # seconds of an iteration, SmolLM2-135M (a row alone)

`gain` and `plane` train models of 0.4M parameters from scratch: SmolLM2 is too slow on a CPU for five seeds. Each
(task, algorithm, seed) is one line of the study's file; a study that was killed goes on, and two processes with
different --seeds may work on one file. An algorithm may have settings of GPOConfig behind it, as in
`--algorithms grpo gpo:criterion=max,num_resets=4`; `dpo gpo-dpo` compares those two.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import transformers
from gpo_fast.bench import loop_price
from gpo_fast.bench.common import add_common, finish
from gpo_fast.bench.loop_gain import Trial, append, is_finished, run
from gpo_fast.bench.loop_price import HEADLINE, ROWS
from gpo_fast.bench.loop_study import plot, studies
from gpo_fast.bench.loop_tasks import Task

from gpo_fast.run_files import read_records

LENGTHS, STARTS = (4, 8, 16), (0.05, 0.3)


def main() -> None:
    arguments_of = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = arguments_of.add_subparsers(dest="command", required=True)
    gain = commands.add_parser("gain", help="accuracy at equal time")
    gain.add_argument("--tasks", nargs="+", default=["chain_sum", "basic_arithmetic"])
    gain.add_argument("--steps", type=int, default=6, help="length of a solution in lines")
    gain.add_argument("--start", type=float, default=0.3, help="solve rate at which the warm-up ends")
    gain.add_argument("--pivotal", action="store_true", help="one hard step (task modular)")
    plane = commands.add_parser("plane", help="a grid of difficulty, length, pivotal or even")
    plane.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    plane.add_argument("--starts", type=float, nargs="+", default=STARTS)
    price = commands.add_parser("price", help="seconds of an iteration")
    price.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(map(repr, ROWS))}")
    price.add_argument("--ablation", action="store_true", help="also GPO with each of its parts switched off")
    price.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    price.add_argument("--repeats", type=int, default=2, help="iterations after one that is not counted")
    price.add_argument("--folder", type=Path, default=Path("runs/price"))
    for command in (gain, plane, price):
        add_common(command)
        command.add_argument("--only-report", action="store_true", help="run nothing")
    for command, seeds, seconds in ((gain, range(5), 60.0), (plane, range(1), 30.0)):
        command.add_argument("--algorithms", nargs="+", default=["grpo", "gpo", "gpo-uniform", "random"])
        command.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
        command.add_argument("--seconds", type=float, default=seconds, help="training time of each run")
        command.add_argument("--folder", type=Path, default=Path(f"runs/{command.prog.split()[-1]}"))
    arguments = arguments_of.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.command == "price":
        prices(arguments)
    else:
        study(arguments, gain_trials(arguments) if arguments.command == "gain" else plane_trials(arguments))


def gain_trials(arguments: argparse.Namespace) -> list[Trial]:
    """Seed by seed, so that a study that is cut off has as many whole seeds as possible."""
    tasks = [Task(name, arguments.steps, arguments.pivotal) for name in arguments.tasks]
    return [
        Trial(task, algorithm, seed, arguments.start, arguments.seconds)
        for seed, task, algorithm in product(arguments.seeds, tasks, arguments.algorithms)
    ]


def plane_trials(arguments: argparse.Namespace) -> list[Trial]:
    grid = product(arguments.seeds, arguments.lengths, arguments.starts, (False, True), arguments.algorithms)
    return [
        Trial(Task("modular", steps, pivotal), algorithm, seed, start, arguments.seconds)
        for seed, steps, start, pivotal, algorithm in grid
    ]


def study(arguments: argparse.Namespace, trials: list[Trial]) -> None:
    """Runs what is not finished, then reports all that is in the study's file."""
    path = arguments.folder / "study.jsonl"
    for trial in [] if arguments.only_report else trials:
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


def prices(arguments: argparse.Namespace) -> None:
    """Measures the rows that are not in the file yet, then reports those that are."""
    size = loop_price.SIZES["quick" if arguments.quick else arguments.device]
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
