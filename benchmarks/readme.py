"""The README's table of measured numbers, made from `results/*.json`.

What a row says and which goal it has stands with the benchmark that measured it, in its `readme_rows`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpo_fast.bench.common import ReadmeRow

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- `gpo-fast bench readme` writes what follows -->", "<!-- and ends here -->"
# In the order of the table; a result belongs to the benchmark whose name its own begins with.
BENCHMARKS = ("loop_price", "loop_study", "rollout", "critical_speed", "critical_real", "prefix_cache")


def table() -> str:
    """The table in Markdown; a missed goal is in bold.

    Raises:
        ValueError: a result that no benchmark knows.
    """
    results = sorted((FOLDER / "results").glob("*.json"))
    unknown = [path.name for path in results if not path.stem.startswith(BENCHMARKS)]
    if unknown:
        raise ValueError(f"no benchmark makes README rows of {', '.join(unknown)}: name it after one of {BENCHMARKS}")
    lines = ["| what | command | result | goal |", "| --- | --- | --- | --- |"]
    for name in BENCHMARKS:
        rows_of = CRITICAL.get(name) or importlib.import_module(f"gpo_fast.bench.{name}").readme_rows
        for path in results:
            if path.stem.startswith(name):
                lines += [_line(row) for row in rows_of(json.loads(path.read_text(encoding="utf-8")))]
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The README with the table of now between its two marks.

    Raises:
        ValueError: not exactly one pair of marks.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README needs the lines {BEGIN!r} and {END!r} around its table, once and in that order")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def critical_speed_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """The ratios of ways to search, with the goals that the result's own table names."""
    what, ratios = result["tables"][0]["title"], result["tables"][1]["rows"]
    options = result["arguments"]
    command = f"critical.py --trajectories {options['trajectories']} --repeats {options['repeats']}"
    names = dict(row[0].split(" ", 1) for row in result["tables"][0]["rows"])
    rows = []
    for pair, ratio, goal in ratios:
        slow, fast = (names[way] for way in pair.split(" over "))
        text = f"search of {what}: {fast}, against {slow}"
        missed = float(ratio.split()[0]) < float(goal.split()[0])
        rows.append(ReadmeRow(text, command, f"{ratio} as fast", goal, missed))
    return rows


def critical_real_rows(result: dict[str, Any]) -> list[ReadmeRow]:
    """How often each method finds the first wrong line; there is no goal."""
    table = result["tables"][0]
    text = "; ".join(f"{method} {hits} ({tokens} tokens)" for method, hits, _, tokens, _ in table["rows"])
    return [ReadmeRow(table["title"].replace("The first", "finding the first"), "critical_real.py", text)]


# These two are scripts that no module can import; their results name their goals themselves.
CRITICAL: dict[str, Callable[[dict[str, Any]], list[ReadmeRow]]] = {
    "critical_speed": critical_speed_rows,
    "critical_real": critical_real_rows,
}


def _line(row: ReadmeRow) -> str:
    goal = f"{row.goal}: **missed**" if row.missed else row.goal
    return f"| {row.what} | `{row.command}` | {row.result} | {goal} |"
