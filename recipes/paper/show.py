"""From records to a table, a picture and a line that says whether the paper's claim holds."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramox.files import replacing, write_json

from .frontier import FORGET, RETAIN, At, at_level
from .methods import Scale
from .runs import Read, Record, Run

TABLES = "tables"
HEADS = {
    FORGET: "forget probability ↓",
    RETAIN: "retain probability ↑",
    "kept_probability": "same authors' rows ↑",
    "forget_quality": "KS p ↑",
    "forget_exact_memorization": "forget tokens right ↓",
    "forget_rouge_l": "forget ROUGE-L ↓",
    "retain_rouge_l": "retain ROUGE-L ↑",
}


@dataclass
class Shown:
    """What a table or figure says."""

    claim: str
    data: Any  # as JSON
    lines: list[str]  # of Markdown
    draw: Callable[[Any], None] | None = None  # on a matplotlib figure


@dataclass(frozen=True)
class Table:
    """A table or figure: the runs that it wants, and what it makes of their records."""

    title: str
    plan: Callable[[Scale, Read], list[Run]]
    show: Callable[[Scale, Read], Shown]


def write(out: Path, name: str, title: str, shown: Shown, scale: str) -> None:
    """OUT/tables/NAME.json, NAME.md and, where there is one, NAME.png, each whole or not at all."""
    folder = out / TABLES
    lines = [f"# {title}", "", scale, "", *shown.lines, ""]
    if shown.draw:
        lines += [f"![{shown.claim}]({name}.png)", ""]
        _picture(folder / f"{name}.png", shown.draw)
    write_json(folder / f"{name}.json", {"title": title, "scale": scale, "claim": shown.claim, "data": shown.data})
    with replacing(folder / f"{name}.md") as partial:
        partial.write_text("\n".join([*lines, shown.claim]) + "\n", encoding="utf-8")


def _picture(path: Path, draw: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(11, 4.8), layout="constrained")
    draw(figure)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known else None


def spread(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return statistics.stdev(known) if len(known) > 1 else 0.0


def cell(values: Sequence[float | None]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    known = [v for v in values if v is not None]
    return number(mean(known)) + (f" ± {number(spread(known))}" if len(known) > 1 else "")


def level_cell(ats: Sequence[At | None]) -> str:
    """Forget probability at a level, over seeds; `none` where no strength keeps it."""
    if None in ats:
        return "none"
    text = cell([at.point[FORGET] for at in ats])
    return (
        text
        if any(at.crossed for at in ats)
        else f"{text} (at retain {number(mean([at.point[RETAIN] for at in ats]))})"
    )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def found(read: Read, runs: Sequence[Run]) -> list[Record]:
    """The records of those runs that have one and did not fail."""
    return [record for run in runs if (record := read(run)) is not None and "failed" not in record]


def at_own(record: Record) -> dict[str, float]:
    """A curve's point at the strength that the method ships."""
    return next(p for p in record["points"] if p["strength"] == record["strength"])


def levels(records: Sequence[Record], level: float) -> list[At | None]:
    return [at_level(record["points"], level) for record in records]


def verdict(holds: bool, how: str) -> str:
    return f"{'Holds' if holds else 'Does not hold'}: {how}."
