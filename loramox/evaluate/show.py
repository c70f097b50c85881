"""Metrics as a table in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show(summary: dict[str, Any]) -> None:
    """Print every metric with its direction and number of rows, and what is absent with the reason."""
    table = Table("metric", "value", "better", "n", "compared to")
    for name, metric in summary["metrics"].items():
        value, compared = f"{metric['value']:.4g}", metric["reference"] or ""
        table.add_row(name, value, metric["direction"], str(metric["n"]), compared)
    console = Console()
    console.print(table)
    by_reason: dict[str, list[str]] = {}
    for name, reason in summary["absent"].items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        console.print(f"[dim]absent: {', '.join(names)}: {reason}[/]", highlight=False)
