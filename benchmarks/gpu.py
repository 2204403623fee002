"""Everything that needs a GPU, in one call: the GPU tests, then every benchmark with --device cuda.

    python benchmarks/gpu.py --out gpu-results             # at most nine minutes
    python benchmarks/gpu.py --out gpu-results --quick     # small sizes: does it all run?

Writes into one folder: summary.json (machine, versions, commit, and for each part its command, exit status and
seconds), one JSON of each benchmark and one log of each part. A benchmark that is not there, that fails or that runs
out of time is named as such; the exit status is 1 unless all parts passed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "triton", "transformers", "trl", "flash-attn", "vllm", "liger-kernel", "gpo-fast")


@dataclass(frozen=True)
class Part:
    """One command and its share of the time."""

    name: str
    command: tuple[str, ...]
    seconds: int
    script: str | None = None  # the benchmark that must exist


@dataclass
class Outcome:
    """What became of a part: "passed", "failed", "missing", "out of time" or "not started"."""

    name: str
    status: str
    command: str
    seconds: float = 0.0
    exit_status: int | None = None


def parts(out: Path, quick: bool) -> list[Part]:
    """In order of importance: what comes last suffers if the time runs out."""

    def benchmark(name: str, seconds: int, *options: str, of: str = "", subcommand: tuple[str, ...] = ()) -> Part:
        script = f"benchmarks/{of or name}.py"
        written = str(out / f"{name}.json")
        command = (sys.executable, script, *subcommand, "--device", "cuda", "--json", written, *options)
        return Part(name, (*command, "--quick") if quick else command, seconds, script)

    pytest = (sys.executable, "-m", "pytest", "--timeout", "110", "-p", "no:cacheprovider")
    return [
        Part("gpu tests", (*pytest, "-m", "gpu", "tests"), 120),
        benchmark("triton_kernels", 50),
        benchmark("rollout_qwen3", 75, "--model", "qwen3-0.6b", "--only", "0", "--repeats", "1", of="rollout"),
        benchmark("rollout_qwen2", 75, "--model", "qwen2.5-1.5b", "--only", "1", "--peers", of="rollout"),
        benchmark("tree_training", 50, "--model", "qwen3-0.6b", "--unique-tokens", "16384"),
        benchmark("loss", 50),
        benchmark("loop", 70, "--folder", str(out / "loop"), "--repeats", "1", subcommand=("price",)),
        # The tests that the interpreter runs elsewhere, compiled here; ahead-of-time compilation needs no GPU.
        Part("kernel tests", (*pytest, "-k", "(test_kernels or triton) and not compile and not gpu", "tests"), 40),
    ]


def run(part: Part, out: Path, seconds: float) -> Outcome:
    """Runs one part for at most `seconds`, with its output in a log; ends it and its children if it takes longer."""
    outcome = Outcome(part.name, "missing", " ".join(part.command))
    if part.script is not None and not (ROOT / part.script).exists():
        return outcome
    start = time.monotonic()
    with (out / f"{part.name.replace(' ', '_')}.log").open("w") as log:
        process = subprocess.Popen(part.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            outcome.exit_status = process.wait(seconds)
            outcome.status = "failed" if outcome.exit_status else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome.status = "out of time"
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def environment() -> dict[str, Any]:
    """The machine, the libraries and the commit that the numbers belong to."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    def version(library: str) -> str | None:
        try:
            return metadata.version(library)
        except metadata.PackageNotFoundError:
            return None

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compute_capability": torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {library: version(library) for library in LIBRARIES},
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for all results")
    parser.add_argument("--quick", action="store_true", help="hand --quick to the benchmarks")
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole call takes no longer than this")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument("--without-gpu", action="store_true", help="go on without a GPU, to check this script itself")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.without_gpu:
        parser.error("torch sees no CUDA device here")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan = parts(out, arguments.quick)
    unknown = set(arguments.only or ()) - {part.name for part in plan}
    if unknown:
        parser.error(f"no part is called {sorted(unknown)}: there are {[part.name for part in plan]}")
    end = time.monotonic() + 60 * arguments.minutes - 10  # ten seconds to write down what happened
    outcomes: list[Outcome] = []
    summary = {"environment": environment(), "parts": []}
    for part in plan:
        if arguments.only and part.name not in arguments.only:
            continue
        left = end - time.monotonic()
        if left < 5:
            outcomes.append(Outcome(part.name, "not started", " ".join(part.command)))
        else:
            outcomes.append(run(part, out, min(part.seconds, left)))
        print(f"{outcomes[-1].name:14} {outcomes[-1].status:12} {outcomes[-1].seconds:7.1f} s", flush=True)
        # Written after every part: what is done survives if this process does not.
        summary["parts"] = [asdict(outcome) for outcome in outcomes]
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    main()
