"""The frontier as a table in the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

COLUMNS = {
    "forget_probability": "forget\np",
    "forget_rouge_l": "ROUGE-L",
    "retain_probability": "retain\np",
    "forget_quality": "KS p of\ntruth ratio",
    "forget_probability_quality": "KS p of\nprobability",
    "mia_min_k": "Min-K\nAUC",
}


def show_frontier(points: list[dict[str, Any]], unit: str) -> None:
    columns = {name: head for name, head in COLUMNS.items() if any(point.get(name) is not None for point in points)}
    numbers = [Column(head, justify="right", no_wrap=True) for head in columns.values()]
    table = Table(unit, *numbers, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for point in sorted(points, key=lambda point: point["at"]):
        found = [point.get(name) for name in columns]
        table.add_row(f"{point['at']:g}", *("" if number is None else f"{number:.3g}" for number in found))
    Console().print(table)
