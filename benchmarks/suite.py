"""`gpo-fast bench`: which script measures what, with the settings that this machine can run; comparing two results."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpo_fast.bench.common import Table

FOLDER = Path(__file__).parent
CONTAINERS = ("data", "times", "runs", "results", "records", "latencies", "speed", "seconds")  # keys that name no row
TIMES = ("median", "seconds", "median_ms")  # what a benchmark calls a time in its JSON


@dataclass(frozen=True)
class Benchmark:
    """A script; `dtypes` is how it names number formats, `device` whether it, or its part `part`, takes one."""

    script: str
    text: str
    part: str | None = None  # of a script in parts: the one that runs if none is named
    device: bool = True
    dtypes: tuple[str, str] | None = None  # its names of bfloat16 and float32


SUITE: dict[str, Benchmark] = {
    "rollout": Benchmark(
        "rollout.py", "Sampling branches, against transformers' ways.", dtypes=("bfloat16", "float32")
    ),
    "critical": Benchmark("critical.py", "The search for critical steps: right, and fast.", device=False),
    "loss": Benchmark("loss.py", "Losses: time and memory, against plain torch, Liger and TRL."),
    "tree": Benchmark("tree_training.py", "Training shared tokens once, against padded rows.", dtypes=("bf16", "fp32")),
    "cache": Benchmark("prefix_cache.py", "The prefix cache, against others.", device=False),
    "loop": Benchmark("loop.py", "An iteration's price, against plain GPO and TRL; its gain.", "price"),
}


def run(name: str, options: list[str]) -> int:
    """Runs one benchmark in a process of its own, as a script; options not given are this machine's. Exit status.

    Beside the JSON file, if one is written, it draws the times: a PNG of the same name.
    """
    call = command(name, options)
    status = subprocess.run([sys.executable, *call], check=False).returncode
    arguments_of = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    arguments_of.add_argument("--json", type=Path)
    result = arguments_of.parse_known_args(call)[0].json
    if status == 0 and result and result.is_file() and SUITE[name].part in (None, call[1]):
        picture = plot(result)
        if picture is not None:
            print(f"drawn in {picture}", flush=True)
    return status


def command(name: str, options: list[str]) -> list[str]:
    """The script with its options."""
    import torch

    from gpo_fast.demo.model import fast_dtype

    benchmark, given = SUITE[name], {option.partition("=")[0] for option in options}
    named = bool(options) and (options[0] == "--help" or not options[0].startswith("-"))
    part, rest = (options[0], options[1:]) if named else (benchmark.part, options)
    chosen = [] if part is None else [part]
    if benchmark.device and part == benchmark.part and "--device" not in given:
        chosen += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    if benchmark.dtypes and "--dtype" not in given:
        chosen += ["--dtype", benchmark.dtypes[fast_dtype() == torch.float32]]
    return [str(FOLDER / benchmark.script), *chosen, *rest]


def run_all(folder: Path, quick: bool) -> dict[str, int]:
    """Runs every benchmark, with a JSON file and a plot of each in `folder`; exit statuses by name."""
    folder.mkdir(parents=True, exist_ok=True)
    statuses = {}
    for name in SUITE:
        options = ["--json", str((folder / f"{name}.json").resolve()), *(["--quick"] if quick else [])]
        statuses[name] = run(name, options)
    return statuses


def compare(before: Path, after: Path) -> Table:
    """The times that two results of one benchmark have in common, and their ratio.

    Raises:
        FileNotFoundError: no such file. ValueError: they have no time in common.
    """
    from gpo_fast.bench.common import Table, human  # here: the command line reads SUITE whenever it starts

    old, new = (dict(times(json.loads(path.read_text(encoding="utf-8")))) for path in (before, after))
    common = [name for name in old if name in new]
    if not common:
        raise ValueError(f"{before} and {after} have no time in common: are they of the same benchmark?")
    table = Table(f"{before} (before) and {after} (after)", ("what", "before", "after", "after / before"))
    for name in common:
        table.add(name, human(old[name]), human(new[name]), f"{new[name] / old[name]:.2f}")
    return table


def plot(result: Path) -> Path | None:
    """Draws the times of a result as bars, a panel for what is compared with one another.

    Returns:
        The picture's path; None if the result has no times.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from gpo_fast.bench.common import human

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"no picture of {result}: it needs matplotlib: pip install matplotlib") from error
    panels: dict[str, dict[str, list[float]]] = {}
    for name, seconds in times(json.loads(result.read_text(encoding="utf-8"))):
        parts = [part for part in name.split(" / ") if part not in CONTAINERS and not part.isdigit()]
        panels.setdefault(" / ".join(parts[:-1]) or result.stem, {}).setdefault(parts[-1], []).append(seconds)
    if not panels:
        return None
    heights = [len(bars) + 1 for bars in panels.values()]
    figure = Figure((8, 0.35 * sum(heights) + 0.5))
    cells = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for cell, (title, bars) in zip(cells, panels.items()):
        middle = [statistics.median(seconds) for seconds in bars.values()]
        drawn = cell.barh(list(bars), middle, color="C0")
        cell.bar_label(drawn, [human(seconds) for seconds in middle], padding=3, fontsize=8)
        cell.invert_yaxis()
        cell.set_title(title, loc="left", fontsize=9)
        cell.set_xlim(0, 1.15 * max(middle))
        cell.set_xticks([])
        cell.tick_params(labelsize=8)
        cell.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(result.with_suffix(".png"), dpi=110)
    return result.with_suffix(".png")


def times(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """(name, seconds) of every positive time in a result; rows of a list go by their texts, not by their place."""
    if isinstance(value, list):
        for number, part in enumerate(value):
            texts = [v for v in part.values() if isinstance(v, str)] if isinstance(part, dict) else []
            yield from times(part, (*path, " ".join(texts) or str(number)))
    elif isinstance(value, dict):
        for key, part in value.items():
            if key in TIMES and isinstance(part, int | float) and part > 0:
                yield " / ".join(path), part / 1e3 if key.endswith("_ms") else float(part)
            elif key not in ("machine", "arguments", "tables", "floors"):
                yield from times(part, (*path, key))
