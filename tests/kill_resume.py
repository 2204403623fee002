"""Kills training runs at random moments and starts them again until they are done: they must end undisturbed.

    python tests/kill_resume.py --kills 50 --seed 0

A life of a run is a forked child of this process, so it starts in milliseconds. It says in shared memory which phase
it is in; each kill waits for a phase (all get their turn), then for a random time about as long as the phase takes,
and sends SIGKILL. Whatever moment that was, the run that ends must have the metrics and the weights of a run that was
never disturbed, bit by bit: float32 on a CPU, one thread.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import transformers
from test_trainer import deterministic, trainer
from transformers import PrinterCallback

from gpo_fast.run_files import last_checkpoint

PHASES = ("start", "rollout", "reward", "search", "reset", "train", "save")
STEPS = 8
OPTIONS = {
    "max_steps": STEPS,
    "save_steps": 2,
    "save_total_limit": 1,  # the only checkpoint may go when the next one is whole, and not before
    "steps_per_generation": 3,  # a checkpoint in the middle of an experience holds what is left of it
    "estimator": "uniform",
}


class Life:
    """One process of a run, from its start or restart to its end or its death."""

    def __init__(self, folder: Path) -> None:
        self._phase = mmap.mmap(-1, 1)
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                train(folder, self._enter)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # the parent's own exit handlers are not this child's

    def _enter(self, phase: str) -> None:
        self._phase[0] = PHASES.index(phase)

    @property
    def phase(self) -> str:
        return PHASES[self._phase[0]]

    def ended(self) -> bool:
        """Whether it has ended by itself; raises if it failed."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid and status:
            raise RuntimeError(f"a run failed with the wait status {status}; its traceback is above")
        return bool(pid)

    def wait(self) -> None:
        while not self.ended():
            time.sleep(0.01)

    def kill_in(self, phase: str, occurrence: int, delay: float) -> str | None:
        """Kills it `delay` seconds after it has entered the phase so many times; the phase that it died in."""
        seen, inside = 0, False
        while seen < occurrence:
            if self.ended():
                return None
            entered, inside = not inside and self.phase == phase, self.phase == phase
            seen += entered
            time.sleep(0.0002)
        time.sleep(delay)
        if self.ended():
            return None
        died_in = self.phase
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return died_in


def train(folder: Path, enter: Callable[[str], None]) -> None:
    """What the user's command does; `enter` is told each phase."""
    run = trainer(folder, **OPTIONS)
    run.remove_callback(PrinterCallback)
    run.on_phase = run.sampler.on_phase = enter
    save = run._save_checkpoint

    def save_checkpoint(*arguments: object) -> None:
        enter("save")
        save(*arguments)

    run._save_checkpoint = save_checkpoint
    run.train(resume_from_checkpoint=last_checkpoint(folder))


def outcome(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Metrics of all steps, and the weights of the last checkpoint."""
    checkpoint = folder / f"checkpoint-{STEPS}"
    return deterministic(folder), safetensors.torch.load_file(checkpoint / "model.safetensors")


def durations(folder: Path) -> dict[str, float]:
    """Mean seconds that a run stays in each phase, measured from outside on an undisturbed run."""
    spent: dict[str, float] = defaultdict(float)
    entries: Counter[str] = Counter()
    life, phase, since = Life(folder), "start", time.perf_counter()
    while not life.ended():
        if life.phase != phase:
            now = time.perf_counter()
            spent[phase] += now - since
            entries[phase] += 1
            phase, since = life.phase, now
        time.sleep(0.0002)
    return {name: spent[name] / max(1, entries[name]) for name in PHASES}


def same(ours: tuple[list[dict], dict[str, torch.Tensor]], theirs: tuple[list[dict], dict[str, torch.Tensor]]) -> bool:
    return ours[0] == theirs[0] and all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


def kill_and_resume(kills: int, seed: int, folder: Path) -> Counter[str]:
    """So many kills of as many runs as that takes; how many hit each phase.

    Raises:
        AssertionError: a run went back behind its last checkpoint, or did not end like the undisturbed one.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rng = random.Random(seed)
    lasts = durations(folder / "whole")
    expected = outcome(folder / "whole")
    assert len(expected[0]) == STEPS
    hit: Counter[str] = Counter()
    number = 0
    while sum(hit.values()) < kills:
        number += 1
        run, reached = folder / f"run-{number}", 0
        while sum(hit.values()) < kills:
            target = PHASES[(sum(hit.values()) + number) % len(PHASES)]
            occurrence = 1 if target == "start" else rng.randint(1, 2)
            died_in = Life(run).kill_in(target, occurrence, rng.uniform(0, lasts[target]))
            if died_in is None:
                break
            hit[died_in] += 1
            checkpoint = last_checkpoint(run)
            step = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
            assert step >= reached, f"{run} had the checkpoint of step {reached} and has only {step} after a kill"
            reached = step
        Life(run).wait()
        assert same(outcome(run), expected), f"{run} did not end like the undisturbed run (seed {seed})"
        shutil.rmtree(run)
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpo-fast-kills-") as folder:
        hit = kill_and_resume(args.kills, args.seed, Path(folder))
    missed = set(PHASES) - set(hit)
    assert args.kills < 50 or not missed, f"no kill hit {missed}"
    print(json.dumps({"kills": sum(hit.values()), "by_phase": dict(hit), "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    sys.exit(main())
