"""Critical steps in the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def critical_table(records: list[dict[str, Any]]) -> Group:
    """One table per trajectory: its steps, V before each with its standard error, the advantage, the critical step."""
    tables = []
    for record in records:
        title = f"{escape(record['prompt'].strip()[-200:])}   reward {record['reward']:g}"
        table = Table("", "step", "V before", "advantage", title=title, title_justify="left", expand=False)
        for index, step in enumerate(record["steps"]):
            critical = index == record["critical"]
            error = step["standard_error"]
            spread = "" if error is None or math.isnan(error) else f" ± {error:.2f}"
            style = "green" if step["advantage"] > 0.05 else "red" if step["advantage"] < -0.05 else ""
            table.add_row(
                "▶" if critical else "",
                Text(step["text"].strip("\n"), style="bold" if critical else ""),
                f"{step['value']:.2f}{spread}",
                Text(f"{step['advantage']:+.2f}", style=style),
            )
        tables.append(table)
    return Group(*tables)
