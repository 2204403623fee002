"""What an algorithm's update is worth per second, at weights that stay as they are.

A few seeds of a training curve differ by chance as much as algorithms do. So nothing is trained here. At a warm start
an algorithm computes the gradient g of many batches of problems, with all the sampling that this takes. The gradient G
of the solve rate itself is measured apart, from many more rollouts (RLOO, groups of 16) and on other problems: what
an update learns of its own problems alone is not counted.

An update along g of the best size gains (G.g)^2 / (2 L |g|^2), with a bound L on the curvature. On average over
batches, where noise dominates |g|^2, that is in proportion to (G.m)^2 / v with the mean m and the variance v of g: the
quality of a batch. Divided by the CPU time of a batch it is what a second buys. Both are given as multiples of GRPO's.
All products are Adam's: each component is divided by the root mean square of that component in GRPO's gradients. The
square of a mean is estimated without the bias that its own noise adds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gpo_fast.bench.common import ReadmeRow, Table, machine
from gpo_fast.bench.loop_gain import TRAIN_SEED, Trial, build
from gpo_fast.bench.loop_tasks import Task, solved

from gpo_fast.run_files import read_records

REFERENCE = "grpo"
TRUE = "grpo:num_generations=16,loss_type=rloo"  # its mean is the gradient of the solve rate
OTHER_PROBLEMS = 13  # the seed of the true gradient's problems
RESAMPLES = 400  # of the bootstrap
_SEEDS = {"true": 3, "scale": 5, "own": 7}  # of rollouts: none are used twice


def gradients(
    trial: Trial, folder: Path, batches: int, seed: int, problems: int = TRAIN_SEED
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Gradients [batches, parameters], CPU seconds [batches] and metrics of batches, after one that is not counted.

    Args:
        problems: the seed that draws them.
    """
    found, seconds = [], []
    with TemporaryDirectory() as output:
        trainer = build(replace(trial, seed=seed), folder, Path(output), solved, problems)
        model, rows, width = trainer.model, trainer.train_dataset, trainer.args.per_device_train_batch_size
        for batch in range(batches + 1):
            model.zero_grad(set_to_none=False)
            trainer.state.global_step = batch  # draws the batch's own samples
            began = time.process_time()
            trainer.training_step(model, [rows[(batch * width + i) % len(rows)] for i in range(width)])
            seconds.append(time.process_time() - began)
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).numpy())
        history = read_records(Path(output) / "metrics.jsonl")
    return np.stack(found[1:]), np.array(seconds[1:]), history[1:]


def true_gradient(trial: Trial, folder: Path, batches: int) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of the solve rate, and what Adam would divide each component by; measured once for a warm start."""
    target = folder / f"true-gradient-{trial.model}-{trial.task.name}-{trial.task.steps}-{trial.start:g}-{batches}.npz"
    if not target.is_file():
        true, _, _ = gradients(replace(trial, algorithm=TRUE), folder, batches, _SEEDS["true"], OTHER_PROBLEMS)
        usual, _, _ = gradients(replace(trial, algorithm=REFERENCE), folder, batches, _SEEDS["scale"])
        np.savez(target, gradient=true.mean(axis=0), scale=np.sqrt(np.square(usual).mean(axis=0)))
    stored = np.load(target, allow_pickle=False)
    return stored["gradient"], stored["scale"]


def measure(trial: Trial, folder: Path, batches: int) -> dict[str, Any]:
    """The record of one algorithm at one warm start."""
    true, scale = true_gradient(trial, folder, batches)
    own, seconds, history = gradients(trial, folder, batches, _SEEDS["own"])
    names = ("reward", "mixed_groups", "reset_reward", "num_tokens", "num_search_tokens", "trained_rows")
    return {
        **asdict(trial),
        "batches": batches,
        **worth(own, seconds, true, scale),
        "means": {n: float(np.mean([r[n] for r in history if n in r])) for n in names if any(n in r for r in history)},
        "machine": machine(),
    }


def worth(own: np.ndarray, seconds: np.ndarray, true: np.ndarray, scale: np.ndarray) -> dict[str, float]:
    """Quality of a batch and of a second, in a unit that is the warm start's, from gradients [batches, parameters].

    A component whose scale is 0 has no gradient in any batch and is left out. `deviation` is the standard deviation
    of `per_second`, by bootstrap over batches.
    """
    weight = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    along = own @ (weight * true)
    spread = np.square(own - own.mean(axis=0)) @ weight
    drawn = np.random.default_rng(0).integers(len(own), size=(RESAMPLES, len(own)))
    quality = _quality(along, spread)
    return {
        "quality": quality,
        "cpu_seconds": float(seconds.mean()),
        "per_second": quality / float(seconds.mean()),
        "deviation": float(np.std([_quality(along[i], spread[i]) / seconds[i].mean() for i in drawn])),
    }


def _quality(along: np.ndarray, spread: np.ndarray) -> float:
    useful = along.mean() ** 2 - along.var(ddof=1) / len(along)
    return max(0.0, float(useful)) / float(spread.mean())


# -- the report ---------------------------------------------------------------------------------------------------


def cells(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The records of each warm start that has the reference, which comes first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(f"{record['task']} {record['start']}", []).append(record)
    ordered = [sorted(cell, key=lambda r: r["algorithm"] != REFERENCE) for cell in found.values()]
    return [cell for cell in ordered if cell[0]["algorithm"] == REFERENCE]


def ratios(cell: Sequence[dict[str, Any]]) -> list[tuple[float, float, float, float]]:
    """Of each record: quality and seconds of a batch, quality per second and its 95 % interval's half, GRPO's = 1."""
    base = cell[0]
    out = []
    for record in cell:
        per_second = record["per_second"] / base["per_second"]
        errors = [r["deviation"] / r["per_second"] if r["per_second"] else np.inf for r in (record, base)]
        error = 0.0 if record is base else 1.96 * per_second * float(np.hypot(*errors))
        out.append(
            (record["quality"] / base["quality"], record["cpu_seconds"] / base["cpu_seconds"], per_second, error)
        )
    return out


def tables(records: Sequence[dict[str, Any]]) -> list[Table]:
    """A table for each warm start."""
    columns = ("algorithm", "quality", "CPU time", "quality per second", "mixed groups", "resets solved")
    shown = []
    for cell in cells(records):
        table = Table(f"An update's worth, {REFERENCE} = 1: {_title(cell)}", columns)
        for record, (quality, seconds, per_second, error) in zip(cell, ratios(cell)):
            means = record["means"]
            resets = f"{means['reset_reward']:.0%}" if "reset_reward" in means else ""
            table.add(
                record["algorithm"],
                f"{quality:.2f}",
                f"{seconds:.2f}",
                f"{per_second:.2f} ± {error:.2f}",
                f"{means['mixed_groups']:.0%}",
                resets,
            )
        shown.append(table)
    return shown


def readme_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """A row for each warm start."""
    return [
        ReadmeRow(
            f"an update's worth per second at fixed weights, GRPO = 1: {_title(cell)}",
            "loop.py gradient",
            "; ".join(
                f"`{record['algorithm']}` {per_second:.2f} ± {error:.2f}"
                for record, (_, _, per_second, error) in zip(cell[1:], ratios(cell)[1:])
            ),
        )
        for cell in cells(result["data"]["records"])
    ]


def _title(cell: Sequence[dict[str, Any]]) -> str:
    return f"{Task(**cell[0]['task']).label}, {cell[0]['means']['reward']:.0%} solved"
