"""Training runs that are killed at random moments end like one that was not; `make kill-test` kills 50 times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_killed_runs_end_like_an_undisturbed_one() -> None:
    # A process of its own: its forked children must not inherit the threads that other tests have started.
    script = Path(__file__).with_name("kill_resume.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "3", "--seed", "1"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 3
