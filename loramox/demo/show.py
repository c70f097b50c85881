"""The results of the demo, on one screen."""

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loramox.unlearning import SHIPPED, TRAINED

TITLES = {"forget": "To be forgotten", "retain": "To be retained"}


def show(console: Console, out: Path, record: dict[str, Any]) -> None:
    """Print a demo's record: answers side by side, probabilities, the folder of the adapter, and the next command."""
    run = out / "run"
    rows = [word for part in TITLES for word in (f"--{part}", str(out / "rows" / f"{part}.jsonl"))]
    sweep = shlex.join(["loramox", "sweep", "--trained", str(run / TRAINED), *rows, "--out", str(run / "sweep")])
    for part, answers in record["answers"].items():
        console.print(_side_by_side(TITLES[part], answers))
    console.print(_probabilities(record["probability"]))
    console.print(
        f"[bold]{escape(str(run / SHIPPED))}[/] is the forget adapter, and [bold]{escape(str(out / 'reference'))}[/] the model it was made for.",
        "Switched off, it brings everything back: this is suppression, not erasure.",
        f"Next, score it at several values of alpha, without training: {escape(sweep)}",
        sep="\n",
        soft_wrap=True,  # a command that is broken over lines cannot be copied
    )


def _side_by_side(title: str, answers: list[dict[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in answers[0]:
        table.add_column(name, ratio=1)
    for row in answers:
        table.add_row(*(text or "(nothing)" for text in row.values()))
    return table


def _probabilities(probability: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Probability of the true answers", title_justify="left", title_style="bold")
    table.add_column("rows")
    for model in probability:
        table.add_column(model, justify="right")
    for part in TITLES:
        table.add_row(part, *(f"{of_part[part]:.3f}" for of_part in probability.values()))
    return table
