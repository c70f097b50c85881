"""The five tables: their runs, and their text and picture from the records of these runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loramox.files import replacing

from . import methods, pictures
from .choose import (
    KEEP,
    TESTS,
    B,
    Point,
    chosen_point,
    distances,
    forgotten_at,
    kept,
    lesser_p,
    p_value,
    shipped,
    values,
)  # fmt: skip
from .methods import GRID, OVERLAP, Size
from .runs import Read, Record, Run

RELEARNED = 0.1  # probability of the other rows at which they count as relearned
Cells = list[list[str]]


class Row(NamedTuple):
    """A line of a table: a method at one setting, with the record of each seed."""

    label: str
    setting: str
    records: list[Record]


class Controls(NamedTuple):
    """The world's own models: their points, and the attack on the retrained model with each seed."""

    reference: Point
    retrained: Point
    attacked: list[Record]


@dataclass(frozen=True)
class Table:
    """A table of runs: `runs` are its rows; where these are the best of a grid, `grid` has the grid's methods."""

    title: str
    runs: Callable[[Size, Read], dict[str, list[Run]]]
    lines: Callable[[list[Row], Controls], list[str]]
    draw: Callable[[Any, list[Row], Controls], None]
    grid: Sequence[str] = ()
    split: str = "whole"

    def plan(self, size: Size, read: Read) -> list[Run]:
        """All runs that it needs, as far as the records that exist say."""
        own = [run for runs in self.runs(size, read).values() for run in runs]
        controls = [size.reference(), size.reference(self.split), *size.retrained()]
        return list(dict.fromkeys([*controls, *size.grid(self.grid), *own]))

    def write(self, name: str, out: Path, size: Size, read: Read) -> None:
        """Write OUT/tables/NAME.md and NAME.png from records alone."""
        reference, attacked = read(size.reference(self.split)), found(read, size.retrained())
        runs = self.runs(size, read).items()
        rows = [Row(label, some[0].label, records) for label, some in runs if (records := found(read, some))]
        lines = [f"# {self.title}", ""]
        if reference and attacked and rows:
            controls = Controls(reference["points"][0], attacked[0]["points"][0], attacked)
            pictures.save(out / f"tables/{name}.png", self.draw, rows, controls)
            lines += [*self.lines(rows, controls), "", f"![{self.title}]({name}.png)", "", made_by(rows, size)]
        else:
            lines.append("Not enough of its runs have a record.")
        with replacing(out / f"tables/{name}.md") as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def found(read: Read, runs: Sequence[Run]) -> list[Record]:
    """The records of those runs that have one and did not fail."""
    return [record for run in runs if (record := read(run)) is not None and "failed" not in record]


def made_by(rows: list[Row], size: Size) -> str:
    """The commands, settings and seeds of the records in a table."""
    records = [record for row in rows for record in row.records]
    commands = ", ".join(dict.fromkeys(f"`{record['command']}`" for record in records))
    settings, versions = records[0]["settings"], records[0]["versions"]
    length = (
        f"{settings['num_train_epochs']:g} epochs" if "max_steps" not in settings else f"{settings['max_steps']} steps"
    )
    return (
        f"{commands}. Seeds {' '.join(map(str, size.seeds))}; LoRA of r = {settings['r']}; {length}, "
        f"{settings['per_device_train_batch_size']} forget rows and {settings['retain_per_forget']} times as many retain rows a step, "
        f"learning rate {settings['learning_rate']:g}; {settings.get('auto_retain', 0)} retain rows asked of the reference; "
        f"loramox {versions['loramox']}, torch {versions['torch']}, CPU, fp32."
    )


def frontier_lines(rows: list[Row], controls: Controls) -> list[str]:
    body: Cells = []
    for name in ("reference", "retrained"):
        point = [getattr(controls, name)]
        body.append([name, "", "", "", *compared(point, controls), *as_shipped(point, controls)])
    for row in rows:
        points = [chosen_point(record, controls.reference, controls.retrained) for record in row.records]
        where = [f"none keeps {KEEP}", "", "", "", "", ""]
        if None not in points:
            where = [", ".join(f"{point['scale']:g}" for point in points), *compared(points, controls)]
        own = as_shipped([shipped(record) for record in row.records], controls)
        body.append([row.label, row.setting, str(len(row.records)), *where, *own])
    heads = ["method", "setting", "seeds", "scale", *(f"p, {test} ↑" for test in TESTS.values()), "lesser p by seed ↑"]
    heads += [f"D, {test} (90 % interval) ↓" for test in TESTS.values()]
    heads += [
        "lesser p, scale 1 ↑",
        "forget probability ↓",
        "forget tokens right ↓",
        "retain given ↑",
        "retain never given ↑",
    ]
    return [
        f"The scale of what ships is chosen on half A of the forget rows: of those that keep {KEEP} of the reference's probability on "
        "the given retain rows, the one with the highest lesser p of two Kolmogorov-Smirnov tests against the retrained model. p and D: "
        "half B at that scale. Last five columns: half B and the retain rows at scale 1, as shipped. Mean ± standard deviation over seeds.",
        "",
        *markdown(heads, body),
    ]


def compared(points: list[Point], controls: Controls) -> list[str]:
    """p of both tests on half B, the lesser of them for each seed, and D."""
    p = [cell([p_value(point, controls.retrained, test, B) for point in points]) for test in TESTS]
    lesser = ", ".join(number(lesser_p(point, controls.retrained, B)) for point in points)
    d = (distances(points, controls.retrained, test) for test in TESTS)
    return [*p, lesser, *(f"{cell(each)} ({low:.2f} … {high:.2f})" for each, low, high in d)]


def as_shipped(points: list[Point], controls: Controls) -> list[str]:
    return [
        cell([lesser_p(point, controls.retrained, B) for point in points]),
        cell([np.exp(values(point, "log_p", B)).mean() for point in points]),
        cell([values(point, "right", B).mean() for point in points]),
        *(cell([values(point, part).mean() for point in points]) for part in ("given", "never")),
    ]


def relearn_lines(rows: list[Row], controls: Controls) -> list[str]:
    steps = sorted(map(int, controls.attacked[0]["relearn"]))
    control = steps_needed(controls.attacked, steps)
    body: Cells = []
    for row in [Row("retrained: the control", "", controls.attacked), *rows]:
        curve = [cell([np.mean(record["relearn"][str(step)]) for record in row.records]) for step in steps]
        needed = steps_needed(row.records, steps)
        saved = (
            f"{'at least ' if control is None else ''}{(control or steps[-1]) - needed:.1f}"
            if needed is not None
            else ""
        )
        count = str(len(row.records))
        body.append(
            [row.label, row.setting, count, *curve, f"> {steps[-1]}" if needed is None else f"{needed:.1f}", saved]
        )
    heads = [
        "method",
        "setting",
        "seeds",
        *(f"step {step} ↓" for step in steps),
        f"steps to {RELEARNED} ↑",
        "saved against the control ↓",
    ]
    return [
        "Probability of the other forget rows while a fresh LoRA is trained on a fifth of them, from what ships (scale 1). A model that "
        f"never saw them learns from the attacker's rows too: the control. Steps to {RELEARNED}: of the mean curve, log-linear between "
        "the steps that were measured; saved: how many fewer than the control needs. Mean ± standard deviation over seeds.",
        "",
        *markdown(heads, body),
    ]


def steps_needed(records: list[Record], steps: Sequence[int]) -> float | None:
    """The step at which the mean probability of the other rows reaches RELEARNED; None where it does not."""
    curve = [
        np.log(np.mean([np.mean(record["relearn"][str(step)]) for record in records]) / RELEARNED) for step in steps
    ]
    above = next((place for place, value in enumerate(curve) if value >= 0), None)
    if above is None or above == 0:
        return above
    return float(np.interp(0, curve[above - 1 : above + 1], steps[above - 1 : above + 1]))


def overlap_lines(rows: list[Row], controls: Controls) -> list[str]:
    parts = ("kept", "given", "never")
    body: Cells = []
    for row in rows:
        forgotten = (
            [forgotten_at(record, controls.reference, *some) for record in row.records] for some in (parts[:2], parts)
        )
        own = [shipped(record) for record in row.records]
        at_own = [[np.exp(values(point, "log_p")).mean() for point in own]]
        at_own += [[kept(point, controls.reference, part) for point in own] for part in parts]
        body.append([row.label, row.setting, str(len(row.records)), *map(cell, [*forgotten, *at_own])])
    heads = [
        "method",
        "setting",
        "seeds",
        f"forget where kept and given rows are at {KEEP} ↓",
        "forget where never-given rows are too ↓",
    ]
    heads += ["forget at scale 1 ↓", "kept ↑", "given ↑", "never given ↑"]
    return [
        "Half of the rows of four authors are forgotten; their other rows, `kept`, are among the given retain rows. Forget probability at "
        f"the scale at which it is lowest while retain rows have {KEEP} of the reference's probability, between scales linear in that share. "
        "Last four columns: at scale 1, as shipped, retain rows as shares of the reference's. Mean ± standard deviation over seeds.",
        "",
        *markdown(heads, body),
    ]


def all_lines(rows: list[Row], controls: Controls) -> list[str]:
    return [*frontier_lines(rows, controls), "", *relearn_lines(rows, controls)]


def written_lines(rows: list[Row], controls: Controls) -> list[str]:
    return [*all_lines(rows, controls), *below_lines(rows, controls)]


def below_lines(rows: list[Row], controls: Controls) -> list[str]:
    """What a lower scale than 1 forgets and keeps, and how soon it is relearned; nothing for records without it."""
    steps = sorted(map(int, controls.attacked[0]["relearn"]))
    body: Cells = []
    for row in rows:
        records = [record for record in row.records if "relearn_below" in record]
        for scale in records[0]["relearn_below"] if records else ():
            points = [shipped(record, float(scale)) for record in records]
            curves = [record["relearn_below"][scale] for record in records]
            relearned = (cell([np.mean(curve[str(step)]) for curve in curves]) for step in steps)
            body.append([row.label, scale, str(len(records)), *as_shipped(points, controls), *relearned])
    heads = ["method", "scale", "seeds", "lesser p ↑", "forget probability ↓", "forget tokens right ↓"]
    heads += ["retain given ↑", "retain never given ↑", *(f"relearned, step {step} ↓" for step in steps)]
    if not body:
        return []
    return ["", "The same at a lower scale, and what relearning brings back from there.", "", *markdown(heads, body)]


def cell(some: Sequence[float]) -> str:
    """Mean, and the sample standard deviation over seeds where there are several."""
    mean, spread = np.mean(some), np.std(some, ddof=1) if len(some) > 1 else 0.0
    more = f" ± {number(spread if spread > 1e-9 * abs(mean) else 0.0)}"  # less than that is rounding
    return number(mean) + (more if len(some) > 1 else "")


def number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}" if value else "0"


def markdown(heads: Sequence[str], rows: Cells) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


TABLES = {
    "frontier": Table(
        "Forgetting, beside a model that never saw the forget rows", methods.frontier, frontier_lines, pictures.draw_frontier, list(GRID)
    ),
    "relearn": Table("What relearning brings back", methods.frontier, relearn_lines, pictures.draw_relearn, list(GRID)),
    "overlap": Table(
        "Half of an author's rows are forgotten, the other half is retained",
        methods.overlap, overlap_lines, pictures.draw_overlap, OVERLAP, "overlap",
    ),
    "written": Table("Retain rows that the model writes", methods.written, written_lines, pictures.draw_frontier),
    "ablation": Table("What each part of mox does", methods.ablation, all_lines, pictures.draw_frontier),
}  # fmt: skip
