"""The files of a run that people and the report read: run.json, metrics.jsonl, trajectories.jsonl."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

COMPLETE_MARK = "gpo_state.json"  # written last in a checkpoint: a folder without it was cut off


class RunFiles:
    """Appends records to a run's folder; `resume` drops what was written after the checkpoint that goes on.

    Raises:
        FileExistsError: the folder holds something that is not a run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.folder} is a file: give a folder for the run")
        # A run that was killed while it wrote its first file has left only that file's temporary form.
        begun = self.folder.is_dir() and {p.name for p in self.folder.iterdir()} - {temporary_name("run.json")}
        if begun and not (self.folder / "run.json").is_file():
            raise FileExistsError(
                f"{self.folder} is not empty and not a run (it has no run.json): give a new or an empty folder"
            )
        self.elapsed = 0.0
        self._start = time.perf_counter()

    def begin(self, description: dict[str, Any], step: int) -> None:
        """Starts or continues a run at `step`: later records are dropped, the clock goes on where it stood."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "run.json", json.dumps(description, indent=1, default=str))
        for name in ("metrics.jsonl", "trajectories.jsonl"):
            kept = [r for r in read_records(self.folder / name) if _step(r) <= step] if step > 0 else []
            write_atomically(self.folder / name, "".join(json.dumps(r) + "\n" for r in kept))
            self.elapsed = max([self.elapsed, *(float(r.get("time", 0)) for r in kept)])
        self._start = time.perf_counter() - self.elapsed

    def time(self) -> float:
        """Seconds of this run, time before an interruption included."""
        return time.perf_counter() - self._start

    def metrics(self, record: dict[str, Any]) -> None:
        self._append("metrics.jsonl", record)

    def trajectories(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self._append("trajectories.jsonl", record)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that was cut off is left out, a missing file is empty."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline behind it: the writer was killed
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one, also after a crash."""
    temporary = path.with_name(temporary_name(path.name))
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def temporary_name(name: str) -> str:
    """What `write_atomically` calls a file until it is whole."""
    return name + ".tmp"


def mark_complete(checkpoint: Path, state: str) -> None:
    """Declares a checkpoint whole, once all of its files have reached the disk."""
    for path in checkpoint.rglob("*"):
        _sync(path)
    write_atomically(checkpoint / COMPLETE_MARK, state)
    _sync(checkpoint.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # Windows opens no folder and syncs no file that was opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. One that was cut off is passed over."""
    whole = [p for p in Path(folder).glob("checkpoint-*") if (p / COMPLETE_MARK).is_file()]
    return max(whole, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def _step(record: dict[str, Any]) -> int:
    return int(record.get("step", record.get("eval", {}).get("step", 0)))
