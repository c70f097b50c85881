"""Metrics as a table in the terminal."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table


def show_states(states: list[dict[str, Any]]) -> None:
    """Print what each attack brought back of the forget rows asked, and what it did to retain rows; the reference apart."""
    columns = {
        "forget_probability": "forget\np",
        "forget_exact_memorization": "right",
        "forget_extraction_strength": "extracted",
        "forget_rouge_l": "ROUGE-L",
        "retain_probability": "retain\np",
    }
    table = _table("attack, state", columns.values())
    of_reference = [state["state"].endswith("reference model") for state in states]
    for apart in (False, True):
        for state in (s for s, reference in zip(states, of_reference, strict=True) if reference is apart):
            numbers = [state["metrics"].get(name) for name in columns]
            name = state["state"] if state["attack"] == "none" else f"{state['attack']}, {state['state']}"
            table.add_row(name, *("" if n is None else f"{n:.3f}" for n in numbers))
        table.add_section()
    Console().print(table)


def show(summary: dict[str, Any]) -> None:
    """Print every metric with its direction and number of rows, and what is absent with the reason."""
    table = _table(Column("metric", no_wrap=True), ("value", "n"), "better", "compared to")
    for name, metric in summary["metrics"].items():
        value, compared = f"{metric['value']:.4g}", metric["reference"] or ""
        table.add_row(name, value, str(metric["n"]), metric["direction"], compared)
    console = Console()
    console.print(table)
    by_reason: dict[str, list[str]] = {}
    for name, reason in summary["absent"].items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        console.print(f"[dim]absent: {', '.join(names)}: {reason}[/]", highlight=False)


def _table(name: str | Column, numbers: Iterable[str], *words: str) -> Table:
    """Without upright lines, which take the room that names need; numbers are never cut, words wrap."""
    columns = [Column(n, justify="right", no_wrap=True) for n in numbers]
    return Table(name, *columns, *words, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
