"""GPO's loop: what an iteration costs, and what it gains at equal time.

    python benchmarks/loop.py gain                 # GRPO, GPO, random resets: two tasks, five seeds, equal time
    python benchmarks/loop.py gain --only-report   # tables and plot of what is finished
    python benchmarks/loop.py plane                # where targeted resets win: difficulty x length x pivotal or even
    python benchmarks/loop.py price --only gpo     # seconds of an iteration, SmolLM2-135M (a row alone)

`gain` and `plane` train models of 0.4M parameters from scratch: SmolLM2 is too slow on a CPU for five seeds. Each
(task, algorithm, seed) is one line of the study's file; a study that was killed goes on, and two processes with
different --seeds may work on one file. An algorithm may have settings of GPOConfig behind it, as in
`--algorithms grpo gpo:criterion=max,num_resets=4`.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import transformers
from gpo_fast.bench.common import finish, parser
from gpo_fast.bench.loop_gain import ALGORITHMS, Trial, append, is_finished, run
from gpo_fast.bench.loop_study import plot, studies
from gpo_fast.bench.loop_tasks import Task

from gpo_fast.run_files import read_records

LENGTHS, STARTS = (4, 8, 16), (0.05, 0.3)


def main() -> None:
    arguments_of = parser(__doc__ or "")
    commands = arguments_of.add_subparsers(dest="command", required=True)
    gain = commands.add_parser("gain", help="accuracy at equal time")
    gain.add_argument("--tasks", nargs="+", default=["chain_sum", "basic_arithmetic"])
    gain.add_argument("--steps", type=int, default=6, help="length of a solution in lines")
    gain.add_argument("--start", type=float, default=0.3, help="solve rate at which the warm-up ends")
    gain.add_argument("--pivotal", action="store_true", help="one hard step (task modular)")
    plane = commands.add_parser("plane", help="a grid of difficulty, length, pivotal or even")
    plane.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    plane.add_argument("--starts", type=float, nargs="+", default=STARTS)
    for command, seeds, seconds in ((gain, range(5), 60.0), (plane, range(1), 30.0)):
        command.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
        command.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
        command.add_argument("--seconds", type=float, default=seconds, help="training time of each run")
        command.add_argument("--folder", type=Path, default=Path(f"runs/{command.prog.split()[-1]}"))
        command.add_argument("--only-report", action="store_true", help="run nothing")
    arguments = arguments_of.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
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


if __name__ == "__main__":
    main()
