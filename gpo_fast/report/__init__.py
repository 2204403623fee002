"""The run's report: one HTML file without scripts or network, and the terminal's table of critical steps."""

from gpo_fast.report.html import write_critical_report, write_report
from gpo_fast.report.table import critical_table

__all__ = ["critical_table", "write_critical_report", "write_report"]
