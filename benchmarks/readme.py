"""The tables of measured numbers, made from the files in `results/`: a whole one for the documentation, a short one for
the README.

What a row says and which goal it has stands with the benchmark that measured it, in its `readme_rows`. The README has
the rows that say themselves in short, and every row that misses its goal. Results of another machine than the main one
are in a folder of their own, `results/<its name>/`; of theirs the README has those that miss their goal.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from gpo_fast.bench import loop_study
from gpo_fast.bench.common import ReadmeRow

FOLDER = Path(__file__).parent
README, MEASURED = FOLDER.parent / "README.md", FOLDER.parent / "docs" / "measured.md"
IMAGES = FOLDER.parent / "docs" / "images"
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


def tables() -> dict[Path, str]:
    """The page's table in Markdown for each page that has one; a missed goal is in bold.

    Raises:
        ValueError: a result that no benchmark knows.
    """
    rows = _rows()
    full = ["| what | command | result | goal | machine |", "| --- | --- | --- | --- | --- |"]
    full += [f"| {row.what} | `{row.command}` | {row.result} | {_goal(row)} | {machine} |" for row, machine in rows]
    short = ["| what | result | goal | machine |", "| --- | --- | --- | --- |"]
    for row, machine in rows:
        if row.brief or row.missed:
            what, result = row.brief or (row.what, row.result)
            short.append(f"| {what} | {result} | {_goal(row)} | {machine} |")
    return {README: "\n".join(short), MEASURED: "\n".join(full)}


def draw() -> list[Path]:
    """The gain study's pictures, the whole one and the README's; gives their paths."""
    records = json.loads((FOLDER / "results" / "loop_study.json").read_text(encoding="utf-8"))["data"]["records"]
    found = loop_study.studies(records)
    whole, over_time = IMAGES / "gain.png", IMAGES / "gain_time.png"
    loop_study.plot(found, whole)
    loop_study.plot_time([s for s in found if {"grpo", "gpo-default"} <= s.by_algorithm.keys()], over_time)
    return [whole, over_time]


def with_table(page: str, table: str) -> str:
    """The page with `table` between its two marks.

    Raises:
        ValueError: not exactly one pair of marks.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r} around its table, once and in that order")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def _rows() -> list[tuple[ReadmeRow, str]]:
    """Every row, and the machine that it was measured on."""
    results = [*sorted((FOLDER / "results").glob("*.json")), *sorted((FOLDER / "results").glob("*/*.json"))]
    unknown = [path.name for path in results if not path.stem.startswith(tuple(BENCHMARKS))]
    if unknown:
        known = ", ".join(BENCHMARKS)
        raise ValueError(f"no benchmark makes README rows of {', '.join(unknown)}: name it after one of {known}")
    rows: list[tuple[ReadmeRow, str]] = []
    for prefix, name in BENCHMARKS.items():
        rows_of = importlib.import_module(f"gpo_fast.bench.{name}").readme_rows
        for path in results:
            if path.stem.startswith(prefix):
                result = json.loads(path.read_text(encoding="utf-8"))
                of = result["machine"]
                machine = ", ".join(of[name] for name in ("gpu", "cpu", "cpu_capability") if of.get(name))
                is_main = path.parent.name == "results"
                rows += [(row if is_main else row._replace(brief=None), machine) for row in rows_of(result)]
    return rows


def _goal(row: ReadmeRow) -> str:
    return f"{row.goal}: **missed**" if row.missed else row.goal
