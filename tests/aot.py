"""Compiles Triton kernels ahead of time for GPUs that are not there, and reads what the compiler says of them.

    job = Job("gpo_fast.kernels.kv_blocks:write_kernel", {"keys": "*bf16", "count": "i32", "BLOCK": 64})
    for built in compile_ahead([job], archs=(80, 90, 100)):
        assert built.spill_bytes == 0 and built.shared <= SHARED_LIMIT[built.arch]

An argument of a job is a Triton type ("*bf16" is a pointer; "i32:16" promises divisibility by 16, as Triton finds it
out at a real call; pointers always promise it) or, for anything that is not a string, a compile-time constant.
The compilation runs in a process of its own, since a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100)
# The test suite compiles the kernels that matter most; with this set in the environment, all of them (minutes).
COMPILE_ALL = bool(os.environ.get("GPO_FAST_COMPILE_ALL"))
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory for one block
MATRIX_INSTRUCTION = {  # one of these stands in the code if tensor cores are used
    80: ("mma.sync",),
    90: ("wgmma.mma_async", "mma.sync"),
    100: ("tcgen05.mma", "mma.sync"),
}


@dataclass(frozen=True)
class Job:
    """One kernel with the types of its arguments, in any order, and its launch options."""

    kernel: str  # "module:function"
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What came out of one job for one architecture."""

    job: Job
    arch: int
    ptx: str
    shared: int  # bytes of shared memory for one block
    registers: int  # for one thread
    spill_bytes: int  # stored to and loaded from local memory

    def uses(self, instruction: str) -> bool:
        return instruction in self.ptx

    def uses_matrix_instructions(self) -> bool:
        return any(self.uses(name) for name in MATRIX_INSTRUCTION[self.arch])


def compile_ahead(jobs: Sequence[Job], archs: Sequence[int] = ARCHS) -> list[Compiled]:
    """Compiles every job for every architecture, jobs outermost. Raises RuntimeError with the compiler's words."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request"), Path(folder, "answer")
        request.write_bytes(pickle.dumps((list(jobs), list(archs))))
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        # An empty cache: the register counts come from the assembler's log, which a cached kernel does not have.
        environment |= {"TRITON_CACHE_DIR": str(Path(folder, "cache")), "TRITON_DUMP_PTXAS_LOG": "1"}
        command = [sys.executable, __file__, str(request), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ahead-of-time compilation failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return pickle.loads(answer.read_bytes())


def _compile(job: Job, arch: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    missing = set(kernel.arg_names) ^ set(job.arguments)
    if missing:
        raise ValueError(f"{job.kernel}: arguments that are missing or not the kernel's: {sorted(missing)}")
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        value = job.arguments[argument]
        if not isinstance(value, str):
            signature[argument], constants[argument] = "constexpr", value
            continue
        signature[argument], _, divisor = value.partition(":")
        if divisor or value.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", int(divisor or 16)]]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        built = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": job.num_warps, "num_stages": job.num_stages, **job.options},
        )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    if not spills or not registers:
        raise RuntimeError(f"{job.kernel}: the assembler's log names no registers:\n{log.getvalue()}")
    return Compiled(job, arch, built.asm["ptx"], built.metadata.shared, max(map(int, registers)), sum(map(int, spills)))


def main() -> None:
    """The compiling process: reads the jobs, writes the results."""
    request, answer = map(Path, sys.argv[1:])
    jobs, archs = pickle.loads(request.read_bytes())
    answer.write_bytes(pickle.dumps([_compile(job, arch) for job in jobs for arch in archs]))


if __name__ == "__main__":
    # Classes are pickled under this file's module name, not as __main__.
    sys.path.insert(0, str(Path(__file__).parent))
    import aot

    aot.main()
