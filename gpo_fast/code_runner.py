"""Runs a program that a model wrote, in a confined subprocess.

The program gets a folder of its own, an empty environment, limits on CPU time, memory, file size and processes, and a
wall-clock limit after which it and all its children are killed. Where the system permits it (Linux with
unprivileged user namespaces), it has no network and sees only its own processes; `confinement()` says so. It can
still read what this user can read: run untrusted code on a machine that holds no secrets, or in a container.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

MAX_OUTPUT = 1 << 20  # bytes of standard output that are kept

# Limits are set by the child itself before the program starts: a `preexec_fn` is not safe in a process with threads.
_START = """
import resource, runpy, sys
seconds, memory, file_size, processes, program = sys.argv[1:]
limits = {"CPU": seconds, "AS": memory, "FSIZE": file_size, "NPROC": processes, "NOFILE": 64, "CORE": 0}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(limit), int(limit)))
sys.argv = [program]
runpy.run_path(program, run_name="__main__")
"""


class ProgramResult(NamedTuple):
    """How a program ended. `ok`: with exit status 0 within its limits."""

    ok: bool
    output: str
    reason: str  # "", "timeout", or the exit status


def run_program(
    source: str,
    *,
    standard_input: str = "",
    seconds: float = 5.0,
    memory: int = 512 << 20,
    file_size: int = 1 << 20,
    processes: int = 16,
) -> ProgramResult:
    """Runs Python source in a confined subprocess of this interpreter, without its installed packages.

    Args:
        seconds: wall-clock and CPU time.
        memory: bytes of address space.
        file_size: bytes of the largest file that it may write, its output included.
        processes: of this user at once (the kernel does not hold root to it).
    """
    if sys.platform == "win32":
        raise RuntimeError("programs can be run on Linux and macOS only: Windows has no resource limits")
    with tempfile.TemporaryDirectory(prefix="gpo-fast-code-") as folder:
        program = Path(folder) / "program.py"
        program.write_text(source, encoding="utf-8", errors="replace")
        limits = [str(max(1, round(seconds))), str(memory), str(file_size), str(processes)]
        command = [*confinement(), sys.executable, "-I", "-S", "-c", _START, *limits, str(program)]
        # Output goes to a file: its size is limited, and a child that keeps a pipe open cannot hold us up.
        with tempfile.TemporaryFile(dir=folder) as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PATH": os.defpath},
                start_new_session=True,
            )
            timed_out = False
            try:
                process.communicate(standard_input.encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _kill_group(process)
            output.seek(0)
            text = output.read(MAX_OUTPUT).decode(errors="replace")
    reason = "timeout" if timed_out else "" if process.returncode == 0 else f"exit status {process.returncode}"
    return ProgramResult(not reason, text, reason)


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """Ends the program and the children that it left behind."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def confinement() -> tuple[str, ...]:
    """The command that takes network and foreign processes away, or () where the system does not permit it."""
    if shutil.which("unshare") is not None:
        command = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
        probe = subprocess.run([*command, "true"], capture_output=True, timeout=10, check=False)
        if probe.returncode == 0:
            return command
    logger.warning(
        "this system does not let programs run without network (unprivileged user namespaces): code rewards are "
        "limited in time, memory and files, but not cut off from the network"
    )
    return ()
