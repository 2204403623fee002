"""Live progress in the terminal; plain lines where the output is not a terminal."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table


class TrainingDisplay:
    """Shows phase, iteration, reward, speed and time left. Use as a context manager."""

    def __init__(self, console: Console | None = None, seconds: float | None = None) -> None:
        self.console = console or Console()
        self.seconds = seconds
        self._live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self._phase, self._total, self._done = "start", 0, 0
        self._rewards: deque[float] = deque(maxlen=40)
        self._row: dict[str, str] = {}
        self._phase_start = time.perf_counter()

    def __enter__(self) -> TrainingDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str, total: int = 0) -> None:
        """A phase begins; `total` units of work if that is known."""
        self._phase, self._total, self._done = name, total, 0
        self._phase_start = time.perf_counter()
        self._show()

    def advance(self, done: int, loss: float) -> None:
        """`done` units of the phase's work are done."""
        self._done = done
        left = (time.perf_counter() - self._phase_start) / done * (self._total - done)
        self._row = {"step": f"{done} of {self._total}", "loss": f"{loss:.3f}", "left": f"{left:.0f} s"}
        self._show()
        if self._live is None and (done % 10 == 0 or done == self._total):
            self.console.print(f"{self._phase}: " + ", ".join(f"{k} {v}" for k, v in self._row.items()))

    def iteration(self, step: int, metrics: dict[str, float], elapsed: float) -> None:
        """An iteration of training has ended."""
        self._rewards.append(metrics["reward"])
        recent = list(self._rewards)[-5:]
        left = "" if self.seconds is None else f"{max(0.0, self.seconds - elapsed):.0f} s"
        self._row = {
            "step": str(step),
            "reward": f"{metrics['reward']:.3f}",
            "mean of 5": f"{sum(recent) / len(recent):.3f}",
            "tokens/s": f"{metrics.get('tokens_per_second', 0):.0f}",
            "searches": f"{metrics.get('num_searches', 0):.0f}",
            "elapsed": f"{elapsed:.0f} s",
            "left": left,
        }
        self._show()
        if self._live is None:
            self.console.print(", ".join(f"{k} {v}" for k, v in self._row.items()))

    def _show(self) -> None:
        if self._live is None:
            return
        table = Table("phase", *self._row, "rewards", box=None)
        table.add_row(self._phase, *self._row.values(), _sparkline(self._rewards))
        self._live.update(table)


def _sparkline(values: deque[float]) -> str:
    marks = "▁▂▃▄▅▆▇█"
    if not values:
        return ""
    low, high = min(values), max(values)
    return "".join(marks[int((v - low) / (high - low or 1) * (len(marks) - 1))] for v in values)
