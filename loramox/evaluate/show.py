"""Metrics as a table in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show_states(states: list[dict[str, Any]]) -> None:
    """Print what each attack brought back of the forget rows asked, and what it did to retain rows."""
    columns = {
        "forget_probability": "forget: p",
        "forget_exact_memorization": "right",
        "forget_extraction_strength": "extraction",
        "forget_rouge_l": "ROUGE-L",
        "retain_probability": "retain: p",
    }
    table = Table("attack, state", *columns.values())
    for state in states:
        numbers = [state["metrics"].get(name) for name in columns]
        name = state["state"] if state["attack"] == "none" else f"{state['attack']}, {state['state']}"
        table.add_row(name, *("" if n is None else f"{n:.3f}" for n in numbers))
    Console().print(table)


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
