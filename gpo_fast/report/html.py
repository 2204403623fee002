"""The HTML report. All text goes through jinja2's escaping, charts are SVG, and no script is allowed to run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from gpo_fast.run_files import read_records, write_atomically

MAX_TRAJECTORIES = 200
PHASES = ("rollout", "search", "reset", "reward", "train", "rest")
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 170, 46, 24

Series = list[tuple[float, float]]


def write_report(run: Path, output: Path | None = None) -> Path:
    """Writes a run's report and returns its path, `run/report.html` by default.

    Raises:
        FileNotFoundError: no such folder, or it holds no run.
        ValueError: the run says to compare with something outside of its folder.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no run.json")
    description = json.loads((run / "run.json").read_text(encoding="utf-8"))
    records = read_records(run / "metrics.jsonl")
    steps = [r for r in records if "eval" not in r]
    evaluations = [r["eval"] for r in records if "eval" in r]
    trajectories = read_records(run / "trajectories.jsonl")
    seconds = {p: sum(s.get("seconds", {}).get(p, 0.0) for s in steps) for p in PHASES}
    total = sum(seconds.values())
    page = _page(
        run=description,
        steps=steps,
        evaluations=evaluations,
        charts=_charts(steps, _comparison(run, description)),
        phases=[(p, s, s / total) for p, s in seconds.items() if total > 0 and s > 0],
        total=total,
        trajectories=[_shown(t) for t in trajectories[-MAX_TRAJECTORIES:][::-1]],
        left_out=max(0, len(trajectories) - MAX_TRAJECTORIES),
    )
    target = output or run / "report.html"
    write_atomically(target, page)
    return target


def write_critical_report(records: list[dict[str, Any]], description: dict[str, Any], output: Path) -> Path:
    """Writes searched trajectories (`CriticalStep.record`) as a report of their own; returns its path."""
    run = {"heading": "Critical steps", **description}
    trajectories = [_shown(json.loads(json.dumps(r))) for r in records[:MAX_TRAJECTORIES]]
    left_out = max(0, len(records) - MAX_TRAJECTORIES)
    empty: dict[str, Any] = {"steps": [], "evaluations": [], "charts": [], "phases": []}
    write_atomically(output, _page(run=run, total=0.0, trajectories=trajectories, left_out=left_out, **empty))
    return output


def _page(**values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("gpo_fast.report", "."), autoescape=select_autoescape(["html"]), trim_blocks=True
    )
    environment.filters["number"] = number
    return environment.get_template("report.html").render(**values)


def number(value: Any, digits: int = 2) -> str:
    """A number for people; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}"


def _comparison(run: Path, description: dict[str, Any]) -> tuple[str, list[dict[str, Any]]] | None:
    other = description.get("compare")
    if not other:
        return None
    metrics = (run / other["metrics"]).resolve()
    if not metrics.is_relative_to(run.resolve()):
        raise ValueError(f"{run / 'run.json'} compares with {other['metrics']!r}, which is not in the run's folder")
    return other["label"], [r for r in read_records(metrics) if "eval" not in r]


def _charts(steps: list[dict[str, Any]], other: tuple[str, list[dict[str, Any]]] | None) -> list[dict[str, Any]]:
    wanted = [
        ("reward", "Mean reward", "over wall-clock minutes"),
        ("reset_reward", "Reward after a reset", "over wall-clock minutes"),
        ("completion_length", "Completion length", "tokens"),
        ("kl", "Divergence from the start (k3 per token)", "nats"),
        ("tokens_per_second", "Tokens sampled per second of the whole iteration", ""),
        ("shared_tokens", "Share of tokens that branches share", ""),
    ]
    charts = []
    for key, title, note in wanted:
        own = _series(steps, key)
        theirs = _series(other[1], key) if other else []
        if len(own) >= 2:
            charts.append(
                {"title": title, "note": note, **_chart(own, theirs), "other": other[0] if other and theirs else None}
            )
    return charts


def _series(steps: list[dict[str, Any]], key: str) -> Series:
    pairs = [(s.get("time", 0.0) / 60, s.get(key)) for s in steps]
    return [(x, float(y)) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]


def _chart(own: Series, theirs: Series) -> dict[str, Any]:
    """Coordinates of a line chart: a thin line of the values, a thick one of their moving mean."""
    xs, ys = [p[0] for p in own + theirs], [p[1] for p in own + theirs]
    low, high = min(0.0, *ys), max(ys)
    high = high if high > low else low + 1
    first, last = min(xs), max(max(xs), min(xs) + 1e-9)

    def place(points: Series) -> str:
        return " ".join(
            f"{LEFT + (x - first) / (last - first) * (WIDTH - LEFT - 8):.1f},"
            f"{8 + (high - y) / (high - low) * (HEIGHT - BOTTOM - 8):.1f}"
            for x, y in points
        )

    digits = 0 if high >= 20 else 2 if high >= 0.1 else 4
    return {
        "raw": place(own),
        "mean": place(_moving_mean(own)),
        "their_mean": place(_moving_mean(theirs)) if theirs else "",
        "ticks": [(8 + (HEIGHT - BOTTOM - 8) * f, number(high - f * (high - low), digits)) for f in (0, 0.5, 1)],
        "first": number(first, 1),
        "last": number(last, 1),
    }


def _moving_mean(points: Series, width: int = 5) -> Series:
    return [
        (x, sum(y for _, y in points[max(0, i - width + 1) : i + 1]) / min(i + 1, width))
        for i, (x, _) in enumerate(points)
    ]


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    """A trajectory with a colour for each step: blue for a gain, orange for a fall, by strength."""
    for step in record["steps"]:
        advantage = step.get("advantage") or 0.0
        strength = min(1.0, abs(advantage)) if math.isfinite(advantage) else 0.0
        step["tint"] = f"rgba({'31, 119, 180' if advantage > 0 else '230, 119, 0'}, {0.55 * strength:.2f})"
    return record
