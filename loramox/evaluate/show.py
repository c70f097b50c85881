"""Metrics as a table in the terminal."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from loramox.evaluate.attacks.attacked import NEVER_KNOWN
from loramox.evaluate.attacks.leaks import CRITERIA
from loramox.evaluate.metric import REFERENCE, RETRAINED

SHORT = {REFERENCE: "adapter off", RETRAINED: "retrained model"}  # what a metric is compared to
APART = ("reference model", "retrained model", NEVER_KNOWN)  # ends of the names of states that are not the forget rows'


def show_states(states: list[dict[str, Any]]) -> None:
    """Print what each attack brought back of the forget rows asked, and what it did to retain rows; the reference and the
    controls apart. Sampled answers are in a table of their own."""
    columns = {
        "forget_probability": "forget\np",
        "forget_exact_memorization": "right",
        "forget_extraction_strength": "extracted",
        "forget_rouge_l": "ROUGE-L",
        "retain_probability": "retain\np",
    }
    some = {"leak": "leak", "rouge_l_beyond_base": "beyond\nbase"}  # columns of some attacks alone
    columns |= {name: head for name, head in some.items() if any(name in s["metrics"] for s in states)}
    table = _table("attack, state", columns.values())
    for apart in (None, *APART):
        for state in (s for s in states if _apart(s) == apart and set(columns) & s["metrics"].keys()):
            numbers = [state["metrics"].get(name) for name in columns]
            name = state["state"] if state["attack"] == "none" else f"{state['attack']}, {state['state']}"
            table.add_row(name, *("" if n is None else f"{n:.3f}" for n in numbers))
        table.add_section()
    Console().print(table)
    sampled = [state for state in states if state["attack"] == "sample"]
    if sampled:
        _show_leaks(sampled)


def _apart(state: dict[str, Any]) -> str | None:
    """Of which other model or rows a state is, if it is not of the attacked model and the forget rows."""
    return next((name for name in APART if state["state"].endswith(name)), None)


def _show_leaks(states: list[dict[str, Any]]) -> None:
    """Print leak@k of sampled answers by each criterion, with the interval where there is one."""
    names = list(dict.fromkeys(name for state in states for name in state["metrics"]))
    table = _table("leak@k", (state["state"] for state in states))
    for name in names:
        cells = []
        for state in states:
            value, interval = state["metrics"].get(name), state.get("intervals", {}).get(name)
            between = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
            cells.append("" if value is None else f"{value:.3f}{between}")
        k, _, by = name.removeprefix("leak_at_").partition("_by_")
        table.add_row(f"k = {k}, {CRITERIA[by]}", *cells)
    console = Console()
    console.print()
    console.print(table)


def show_absent(absent: dict[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in absent.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        Console().print(f"[dim]absent: {', '.join(names)}: {reason}[/]", highlight=False)


def show(summary: dict[str, Any]) -> None:
    """Print every metric with its interval, number of rows and direction; what tests say, general ability, and what is absent."""
    table = _table(Column("metric", no_wrap=True), ("value", "95 %", "n"), "better", "compared to")
    for name, metric in summary["metrics"].items():
        compared = SHORT.get(metric["reference"], metric["reference"] or "")
        numbers = (f"{metric['value']:.4g}", _between(metric), str(metric["n"]))
        table.add_row(name, *numbers, metric["direction"], compared)
    console = Console()
    console.print(table)
    for name, metric in summary["metrics"].items():
        if "reading" in metric:
            console.print(f"{name.removesuffix('_equivalence')}: {metric['reading']}", highlight=False)
    if general := summary["metrics"].get("general_ability"):
        between = f" ({_between(general)})" if "interval" in general else ""
        told = f"{general['value']:.3f}{between} of the reference's, the {general['source']}"
        console.print(f"general ability: {told}", highlight=False)
    if "depth" in summary:
        _show_layers(summary["depth"]["layers"])
    show_absent(summary["absent"])


def _between(metric: dict[str, Any]) -> str:
    low, high = metric.get("interval") or (None, None)
    return "" if low is None else f"{low:.3g} to {high:.3g}"


def _show_layers(layers: list[dict[str, Any]]) -> None:
    """Print for each layer what the retrained and the forget model lack there, and which share of it is erased."""
    table = _table("layer", ("rows", "retrained\nlacks", "forget\nlacks", "erased"))
    for each in layers:
        lacks = (f"{each[model]:.3f}" for model in ("retrained", "forget"))
        erased = "" if each["erased"] is None else f"{each['erased']:.3f}"
        table.add_row(str(each["layer"]), str(each["rows"]), *lacks, erased)
    Console().print(table)


def _table(name: str | Column, numbers: Iterable[str], *words: str) -> Table:
    """Without upright lines, which take the room that names need; numbers are never cut, words wrap."""
    columns = [Column(n, justify="right", no_wrap=True) for n in numbers]
    return Table(name, *columns, *words, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
