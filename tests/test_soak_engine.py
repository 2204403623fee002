"""Ten seconds of the engine's soak, and 10,000 branches queued at once; `make soak-engine` runs for half an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_engine_under_random_load() -> None:
    pytest.importorskip("psutil")
    script = Path(__file__).parent.parent / "benchmarks" / "soak_engine.py"
    done = subprocess.run(
        [sys.executable, str(script), "--seconds", "10", "--seed", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for event in ("cancelled", "dropped streams", "weight updates", "integrity checks", "preemptions", "trace_forks"):
        assert said[event] > 0, f"{event} did not happen"
