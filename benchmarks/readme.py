"""The README's table of measured numbers, made from `results/*.json`.

What a row says and which goal it has stands with the benchmark that measured it, in its `readme_rows`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from gpo_fast.bench.common import ReadmeRow

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- `gpo-fast bench readme` writes what follows -->", "<!-- and ends here -->"
# How a result's name begins, and the benchmark that it is of; in the order of the table.
BENCHMARKS = {
    "loop_price": "loop_price",
    "loop_study": "loop_study",
    "loop_gradient": "loop_gradient",
    "loop_plane": "loop_plane",
    "rollout": "rollout",
    "critical_speed": "critical",
    "critical_real": "critical_real",
    "loss": "loss",
    "tree_training": "tree_training",
    "prefix_cache": "prefix_cache",
}


def table() -> str:
    """The table in Markdown; a missed goal is in bold.

    Raises:
        ValueError: a result that no benchmark knows.
    """
    results = sorted((FOLDER / "results").glob("*.json"))
    unknown = [path.name for path in results if not path.stem.startswith(tuple(BENCHMARKS))]
    if unknown:
        known = ", ".join(BENCHMARKS)
        raise ValueError(f"no benchmark makes README rows of {', '.join(unknown)}: name it after one of {known}")
    lines = ["| what | command | result | goal |", "| --- | --- | --- | --- |"]
    for prefix, name in BENCHMARKS.items():
        rows_of = importlib.import_module(f"gpo_fast.bench.{name}").readme_rows
        for path in results:
            if path.stem.startswith(prefix):
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


def _line(row: ReadmeRow) -> str:
    goal = f"{row.goal}: **missed**" if row.missed else row.goal
    return f"| {row.what} | `{row.command}` | {row.result} | {goal} |"
