"""What the benchmarks share: arguments, timing with spread, resuming, the machine's description, a table and JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpo_fast import _C
from gpo_fast.run_files import read_records

PACKAGES = ("torch", "transformers", "triton", "numpy", "trl", "vllm", "flash-attn", "liger-kernel", "gpo-fast")


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with what every benchmark takes."""
    result = argparse.ArgumentParser(description=description)
    add_common(result)
    return result


def add_common(arguments: argparse.ArgumentParser) -> None:
    """What every benchmark takes, or each of its subcommands."""
    arguments.add_argument("--quick", action="store_true", help="a small size, to see that the script runs")
    arguments.add_argument("--json", type=Path, metavar="PATH", help="write the results there")


def device_name(name: str) -> str:
    """The type of a `--device` option: cpu, or cuda where torch sees a GPU."""
    import torch

    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name!r} is neither cpu nor cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU for cuda here: use cpu")
    return name


@dataclass
class Timing:
    """Seconds of one call: median, and the middle half of the measurements."""

    median: float
    low: float
    high: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        ordered = sorted(seconds)
        low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
        return Timing(statistics.median(ordered), low, high, len(ordered))


def interleave(
    calls: dict[str, Callable[[], object]], *, repeats: int, number: int = 1, after: Callable[[], object] | None = None
) -> dict[str, Timing]:
    """Times each call `repeats` times, taking turns, so that a slow minute of the machine hits all alike.

    Args:
        number: calls in one measurement; the time is per call.
        after: runs after each measurement, outside the time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(number):
                call()
            seconds[name].append((time.perf_counter() - start) / number)
            if after is not None:
                after()
    return {name: Timing.of(values) for name, values in seconds.items()}


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of a few independent measurements with Student's 95 % interval; NaN ends for a single one."""
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = _student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


@cache
def _student_quantile(freedom: int) -> float:
    """t with P(|T| < t) = 0.95, by integrating Student's density."""
    t = np.linspace(0, 20, 200_001)  # the quantile is 12.7 for one degree of freedom, less for more
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(t**2 / freedom))
    between = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) * np.diff(t))])  # P(|T| < t)
    return float(np.interp(0.95, between, t))


class Progress:
    """The finished pieces of a long benchmark, a line of JSON each: one that was cut off goes on where it stood.

    Args:
        path: the file of the pieces; None keeps them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._pieces = {piece["name"]: piece for piece in ([] if path is None else read_records(path))}

    def has(self, name: str) -> bool:
        return name in self._pieces

    def piece(self, name: str, compute: Callable[[], Any]) -> tuple[Any, float]:
        """A piece's result as JSON gives it back, and the seconds that it took; computed if it is not there."""
        if name not in self._pieces:
            began = time.perf_counter()
            result = compute()
            line = json.dumps({"name": name, "seconds": time.perf_counter() - began, "result": result})
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(line + "\n")
            self._pieces[name] = json.loads(line)
            print(f"{name}: {self._pieces[name]['seconds']:.1f} s", flush=True)
        return self._pieces[name]["result"], self._pieces[name]["seconds"]


def human(seconds: float) -> str:
    """1.23 us, 45.6 ms, 7.89 s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def machine() -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    import torch

    installed = {
        distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()
    }
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "system": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": _C.cpu_kernels().upper(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or "unknown",
    }


@dataclass
class Table:
    """Rows for people and for the JSON file."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *row: str) -> None:
        self.rows.append(row)

    def show(self) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        Console(width=140).print(table)


class ReadmeRow(NamedTuple):
    """A row of the table of measured numbers in the documentation, and perhaps, in short, of the README's."""

    what: str
    command: str
    result: str
    goal: str = ""  # empty: there is none
    missed: bool = False
    brief: tuple[str, str] | None = None  # what and result for the README; None: it has the row only if it is missed


def floors(device: str = "cpu") -> dict[str, float]:
    """What this machine can do at best, measured now: bytes/s of a large copy (read and written), and FLOP/s of a
    matrix product in float32 and bfloat16."""
    import torch

    source = torch.ones((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target, size = torch.empty_like(source), 8192 if device == "cuda" else 2048
    result = {"copy_bytes_per_second": 8 * source.numel() / _fastest(lambda: target.copy_(source), device)}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        name = str(dtype).removeprefix("torch.")
        result[f"{name}_flop_per_second"] = 2 * size**3 / _fastest(lambda m=matrix: m @ m, device)
    return result


def _fastest(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Seconds of the fastest of a few calls: a floor is what the machine can do undisturbed."""
    import torch

    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_memory() -> dict[str, int]:
    """Most bytes that this process has held so far: resident, and on the GPU if it has used one."""
    import torch

    result = {"resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if torch.cuda.is_available():
        result["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return result


def finish(arguments: argparse.Namespace, tables: Sequence[Table], data: dict[str, Any]) -> None:
    """Prints the tables and writes the JSON file if one was asked for."""
    for table in tables:
        table.show()
    described, peak = machine(), peak_memory()
    print(f"{described['cpu']}, {described['cores']} cores, load {described['load']:.1f}, commit {described['commit']}")
    if arguments.json:
        # Of a path only the name: folders tell nothing about the numbers.
        options = {n: value.name if isinstance(value, Path) else str(value) for n, value in vars(arguments).items()}
        plain = {
            "machine": described,
            "arguments": options,
            "floors": floors(getattr(arguments, "device", "cpu")),
            "peak_memory": peak,
            "tables": [asdict(table) for table in tables],
            "data": data,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(plain, indent=2, default=lambda value: asdict(value)) + "\n")
