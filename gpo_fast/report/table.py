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
        table.caption, table.caption_justify = _audit(record), "left"
        for index, step in enumerate(record["steps"]):
            critical = index == record["critical"]
            error = step["standard_error"]
            spread = "" if error is None or math.isnan(error) else f" ± {error:.2f}"
            value, advantage = step["value"], step["advantage"]
            style = "" if advantage is None or abs(advantage) <= 0.05 else "green" if advantage > 0 else "red"
            table.add_row(
                "▶" if critical else "",
                Text(step["text"].strip("\n"), style="bold" if critical else ""),
                "–" if value is None else f"{value:.2f}{spread}",
                Text("–" if advantage is None else f"{advantage:+.2f}", style=style),
            )
        tables.append(table)
    return Group(*tables)


def _audit(record: dict[str, Any]) -> str:
    """What the search cost and how sure it is."""
    confidence = record.get("confidence")
    sure = "" if confidence is None else f", confidence {confidence:.2f}"
    return (
        f"{record['estimator']}: {record['num_rollouts']} rollouts, {record['num_tokens']} tokens "
        f"({record['rollouts_saved']} and {record['tokens_saved']} fewer than uniform){sure}"
    )
