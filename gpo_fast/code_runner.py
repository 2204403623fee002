"""Runs a program that a model wrote, in a confined subprocess.

The program gets a folder of its own, an empty environment, limits on CPU time, memory, file size and processes, and a
wall-clock limit after which it and all its children are killed. Where the system permits it (Linux with unprivileged
user namespaces), it also has no network, sees no process but its own (so no environment of another one), can write
nowhere but in its folder, which is a small file system in memory, and has no capability to undo any of that;
`confinement()` says how much of it holds. It can still read the files that this user can read: run untrusted code on
a machine that holds no secrets, or in a container.
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

FILES = 8  # so many of the largest files that a program may write fit its folder

# Confinement and limits are set by the child itself before the program starts: a `preexec_fn` is not safe in a process
# with threads. Within a mount namespace of its own it makes all that is mounted read-only, puts a file system in memory
# over the program's folder, and drops every capability that could take those two away again.
_START = """
import ctypes, os, resource, sys
seconds, memory, file_size, processes, disk, folder, program = sys.argv[1:]
if disk != "0":
    system = ctypes.CDLL(None, use_errno=True)
    def succeed(result):
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, 0x8000, 1
    MS_NOSUID, MS_NODEV, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 2, 4, 24, 38
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)
    succeed(system.syscall(MOUNT_SETATTR, -1, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes)))
    options = f"size={disk},nr_inodes=1024,mode=700".encode()
    succeed(system.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options))
    os.chdir(folder)
    capability = 0
    while system.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    succeed(system.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
limits = {"CPU": seconds, "AS": memory, "FSIZE": file_size, "NPROC": processes, "NOFILE": 64, "CORE": 0}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(limit), int(limit)))
os.execv(sys.executable, [sys.executable, "-I", "-S", program])
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
    confined = confinement()
    with tempfile.TemporaryDirectory(prefix="gpo-fast-code-") as outer:
        program, folder = Path(outer) / "program.py", Path(outer) / "work"
        folder.mkdir()
        program.write_text(source, encoding="utf-8", errors="replace")
        disk = FILES * file_size if confined.own_files else 0
        limits = [str(n) for n in (max(1, round(seconds)), memory, file_size, processes, disk)]
        command = [*confined.command, sys.executable, "-I", "-S", "-c", _START, *limits, str(folder), str(program)]
        # Output goes to a file: its size is limited, and a child that keeps a pipe open cannot hold us up.
        with tempfile.TemporaryFile(dir=outer) as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "PATH": os.defpath},
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


class Confinement(NamedTuple):
    """The command that confines a program, () for none, and whether the program also gets a file system of its own."""

    command: tuple[str, ...]
    own_files: bool


@functools.cache
def confinement() -> Confinement:
    """What this system permits, tried out once; a warning says what it does not."""
    if shutil.which("unshare") is not None:
        alone = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
        for confined in (Confinement((*alone, "--mount-proc"), True), Confinement(alone, False)):
            if _permitted(confined):
                if not confined.own_files:
                    logger.warning(
                        "this system lets programs run without network, but not with files of their own: code rewards "
                        "can write what this user can write, and read the environment of this user's processes"
                    )
                return confined
    logger.warning(
        "this system does not let programs run without network (unprivileged user namespaces): code rewards are "
        "limited in time, memory and files, but not cut off from the network, nor from this user's files and processes"
    )
    return Confinement((), False)


def _permitted(confined: Confinement) -> bool:
    with tempfile.TemporaryDirectory(prefix="gpo-fast-code-") as folder:
        arguments = ["5", str(1 << 30), str(1 << 20), "16", str(1 << 20 if confined.own_files else 0), folder]
        command = [*confined.command, sys.executable, "-I", "-S", "-c", _START, *arguments, os.devnull]
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
