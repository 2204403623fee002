"""What a study's records say: accuracy by time, tokens and steps with intervals over seeds, as tables and a picture."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gpo_fast.bench.common import Interval, ReadmeRow, Table, mean_interval
from gpo_fast.bench.loop_models import MODELS
from gpo_fast.bench.loop_tasks import Task

Record = dict[str, Any]  # as loop_gain.run gives it
GOAL = 0.5  # share of the base's time in which its final accuracy is to be reached
AXES = {
    "seconds": "training time (s)",
    "rollouts": "sampled rollouts",
    "tokens": "sampled tokens",
    "steps": "optimiser steps",
}
# Equal in all records that are compared.
COMPARED = (
    "model",
    "task",
    "start",
    "learning_rate",
    "seconds",
    "evaluations",
    "problems",
    "clock",
)
GRID = 200  # points of a mean curve
# In the README's picture, and what they are.
SHOWN = {
    "grpo:num_generations=8": "GRPO, 8 completions",
    "grpo": "GRPO, 4 completions",
    "gpo-default": "GPO as it comes",
    "grpo-optimal": "GRPO, our baseline",
}


def base_of(algorithm: str) -> str:
    """What an algorithm is compared with: GRPO or DPO as published, with as many completions."""
    name, _, settings = algorithm.partition(":")
    completions = re.search(r"num_generations=\d+", settings)
    return ("dpo" if "dpo" in name else "grpo") + (f":{completions[0]}" if completions else "")


class Study:
    """The records of one task, start and time: several algorithms, each with several seeds."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.by_algorithm: dict[str, dict[int, Record]] = defaultdict(dict)
        for record in records:
            self.by_algorithm[record["algorithm"]][record["seed"]] = record
        first = records[0]
        self.seconds, self.start, self.learning_rate = first["seconds"], first["start"], first["learning_rate"]
        self.model, self.task = MODELS[first["model"]], Task(**first["task"])

    @property
    def title(self) -> str:
        rate = f"learning rate {self.learning_rate:g}"
        return f"{self.model.label}: {self.task.label}, {self.start:.0%} at the start, {rate}, {self.seconds:g} s each"

    def accuracy(self, algorithm: str, axis: str, at: float) -> list[float]:
        """Accuracy of each seed where the axis has the value `at`, between two measurements in a straight line."""
        return [_at(record, axis, at) for record in self.by_algorithm[algorithm].values()]

    def final(self, algorithm: str) -> list[float]:
        return self.accuracy(algorithm, "seconds", self.seconds)

    def gain(self, algorithm: str) -> Interval:
        """Final accuracy less the base's, over the seeds that both have: they began with the same weights."""
        ours, theirs = self.by_algorithm[algorithm], self.by_algorithm.get(base_of(algorithm), {})
        common = sorted(ours.keys() & theirs.keys())
        end = self.seconds
        return mean_interval([_at(ours[s], "seconds", end) - _at(theirs[s], "seconds", end) for s in common])

    def shortest(self, axis: str) -> float:
        """The value of the axis that every run has reached."""
        return min(r["points"][-1][axis] for records in self.by_algorithm.values() for r in records.values())

    def time_to_base(self, algorithm: str) -> float | None:
        """Share of the time after which the mean curve stays at or above the base's mean final accuracy."""
        grid, curve = self.mean_curve(algorithm, "seconds")
        below = np.flatnonzero(curve < float(np.mean(self.final(base_of(algorithm)))) - 1e-12)
        if len(below) == 0:
            return 0.0
        share = float(grid[below[-1] + 1] / self.seconds) if below[-1] + 1 < len(grid) else math.inf
        return share if share <= 1 else None  # a run ends a little after its time

    def mean_curve(self, algorithm: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        grid = np.linspace(0, min(r["points"][-1][axis] for r in self.by_algorithm[algorithm].values()), GRID)
        return grid, np.array([np.mean(self.accuracy(algorithm, axis, at)) for at in grid])

    def table(self) -> Table:
        tokens, steps = self.shortest("tokens"), self.shortest("steps")
        columns = ("algorithm", "seeds", "start", "final", "final less base's", "time to base's final")
        table = Table(self.title, (*columns, f"at {tokens:,.0f} tokens", f"at {steps:.0f} steps", "tokens", "steps"))
        for algorithm, records in self.by_algorithm.items():
            compared = base_of(algorithm) in self.by_algorithm.keys() - {algorithm}
            reached = self.time_to_base(algorithm) if compared else None
            table.add(
                algorithm,
                str(len(records)),
                f"{mean_interval(self.accuracy(algorithm, 'seconds', 0)).mean:.1%}",
                _percent(mean_interval(self.final(algorithm))),
                "" if not compared else _percent(self.gain(algorithm), signed=True),
                "" if not compared else "not reached" if reached is None else f"{reached:.0%} of it",
                f"{np.mean(self.accuracy(algorithm, 'tokens', tokens)):.1%}",
                f"{np.mean(self.accuracy(algorithm, 'steps', steps)):.1%}",
                f"{np.mean([r['points'][-1]['tokens'] for r in records.values()]):,.0f}",
                f"{np.mean([r['points'][-1]['steps'] for r in records.values()]):.0f}",
            )
        return table


def studies(records: Iterable[Record]) -> list[Study]:
    """The records that may be compared, together."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        key = {name: record[name] for name in COMPARED}
        groups[repr(key)].append(record)
    return [Study(group) for group in groups.values()]


def plot(all_studies: Sequence[Study], path: Path) -> None:
    """A row for each study, a column for each axis; the band is the 95 % interval of the mean over seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure((4.2 * len(AXES) + 2, 3.2 * len(all_studies)))
    cells = figure.subplots(len(all_studies), len(AXES), squeeze=False, sharey="row")
    names = dict.fromkeys(name for study in all_studies for name in study.by_algorithm)
    colours = {name: colormaps["tab20"](number % 20) for number, name in enumerate(names)}
    for row, study in zip(cells, all_studies):
        for cell, axis in zip(row, AXES):
            for algorithm in study.by_algorithm:
                _draw(cell, study, algorithm, axis, colours[algorithm])
        row[0].set_title(study.title, loc="left", fontsize=9)
        row[0].set_ylabel("held-out accuracy")
        row[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(figure, path)


def plot_time(all_studies: Sequence[Study], path: Path) -> None:
    """The README's picture: accuracy over time, a panel for each study, of the algorithms SHOWN."""
    from matplotlib.figure import Figure

    figure = Figure((3.6 * len(all_studies), 3.2))
    (cells,) = figure.subplots(1, len(all_studies), squeeze=False)
    for cell, study in zip(cells, all_studies):
        for colour, (algorithm, label) in enumerate(SHOWN.items()):
            if algorithm in study.by_algorithm:
                _draw(cell, study, algorithm, "seconds", f"C{colour}", label)
        cell.set_title(f"{study.model.label}\n{study.task.label}", loc="left", fontsize=9)
    cells[0].set_ylabel("held-out accuracy")
    cells[min(1, len(cells) - 1)].legend(fontsize=7, loc="lower right")
    _save(figure, path)


def _draw(cell: Any, study: Study, algorithm: str, axis: str, colour: Any, label: str | None = None) -> None:
    from matplotlib.ticker import EngFormatter

    grid, curve = study.mean_curve(algorithm, axis)
    cell.plot(grid, curve, color=colour, label=label or algorithm)
    intervals = [mean_interval(study.accuracy(algorithm, axis, at)) for at in grid]
    cell.fill_between(grid, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.1, lw=0)
    cell.set_xlabel(AXES[axis])
    if axis in ("rollouts", "tokens"):
        cell.xaxis.set_major_formatter(EngFormatter(sep=""))
    cell.grid(alpha=0.3)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """Each study's algorithms against their base at equal time, and the goal: its accuracy in half the time."""
    found = []
    for study in studies(result["data"]["records"]):
        for base in ("grpo", "dpo"):
            others = [name for name in study.by_algorithm if name != base and base_of(name).startswith(base)]
            if others and base in study.by_algorithm:
                found.append(_readme_row(study, base, others))
    return found


def _readme_row(study: Study, base: str, others: Sequence[str]) -> ReadmeRow:
    """In short, for the README, without what has settings of its own unless it is a base."""
    seeds = min(len(study.by_algorithm[name]) for name in (base, *others))
    final, passed = study.final(base), []
    full, short = [f"`{base}` {_percent(mean_interval(final))}"], [f"`{base}` {np.mean(final):.1%}"]
    for name in others:
        mean, is_base = f"`{name}` {np.mean(study.final(name)):.1%}", name == base_of(name)
        if is_base or base_of(name) not in study.by_algorithm:
            full.append(mean)
        else:
            reached = study.time_to_base(name)
            time = "not reached" if reached is None else f"{reached:.0%}"
            full.append(f"{mean}, {_percent(study.gain(name), signed=True)}, {time}")
            mean += "" if reached is None else f", {time}"
            if reached is not None and reached <= GOAL:
                passed.append(f"`{name}`")
        if is_base or ":" not in name:
            short.append(mean)
    goal = f"{base}'s end in {GOAL:.0%} of its time"
    setting = f"{study.model.label}, {study.task.label}, {study.start:.0%} at the start, {study.seconds:g} s"
    return ReadmeRow(
        f"{study.title}, at least {seeds} seeds: held-out accuracy, less {base}'s with as many completions at equal "
        f"time, {base}'s end after",
        "loop.py gain",
        "; ".join(full),
        f"{goal}: {', '.join(passed)}; **missed** by the others" if passed else goal,
        not passed,
        (f"{setting}: accuracy, {base}'s end after", "; ".join(short)),
    )


def _at(record: Record, axis: str, at: float) -> float:
    points = record["points"]
    return float(np.interp(at, [p[axis] for p in points], [p["accuracy"] for p in points]))


def _percent(interval: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if math.isnan(interval.low):
        return f"{interval.mean:{sign}.1%}"  # a single seed has no interval
    return f"{interval.mean:{sign}.1%} ({interval.low:{sign}.1%} to {interval.high:{sign}.1%})"
