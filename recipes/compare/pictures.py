"""The pictures: one colour and marker for each method, the retrained model green, in Okabe and Ito's colours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from loramox import colours
from loramox.files import replacing

from .choose import KEEP, TESTS, B, Point, chosen_point, distances, kept, values

LOOKS = {
    "mox": ("#0072b2", "o"), "npo_mean": ("#e69f00", "s"), "npo": ("#cc79a7", "^"), "simnpo": ("#56b4e9", "v"),
    "npo, LoRA scale 8": ("#882255", "P"), "mox_static": ("#d55e00", "D"), "task_vector": ("#777777", "X"),
    "mox, one temperature": ("#009e73", "h"),
    "– one inner step": ("#e69f00", "s"), "– half the inner step": ("#999999", "P"), "– without momentum": ("#cc79a7", "^"),
    "mox, one temperature, without KL": ("#d55e00", "D"), "– KL of weight 5": ("#117733", "v"),
}  # fmt: skip
LEAST = 1e-4  # smaller shares lost are drawn there
D_AT_005 = 1.358 * np.sqrt(2)  # over √n: D at which p = 0.05, for two samples of n rows


def save(path: Path, draw: Callable[..., None], *what: Any) -> None:
    """Draw on a new figure and write it as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(12, 4.6), layout="constrained")
    draw(figure, *what)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)


def draw_frontier(figure: Any, rows: list, controls: Any) -> None:
    """Retain probability lost against forget probability over the scales, mean of seeds; D of both tests with its interval."""
    *lost, tests = figure.subplots(1, 3)
    for axes, (part, title) in zip(lost, (("given", "given"), ("never", "never given")), strict=True):
        for row in rows:
            points = list(zip(*(record["points"] for record in row.records), strict=True))  # of all seeds, by scale
            x = [np.mean([forget_probability(point, B) for point in some]) for some in points]
            y = [np.mean([kept(point, controls.reference, part) for point in some]) for some in points]
            curve(axes, row.label, [some[0]["scale"] for some in points], x, lost_of(y), row.label)
        of_retrained = lost_of([kept(controls.retrained, controls.reference, part)])
        axes.plot(forget_probability(controls.retrained, B), *of_retrained, "*", color=colours.RETRAINED, markersize=13, label="retrained model")  # fmt: skip
        axes.axhline(1 - KEEP, color=colours.MUTED, linestyle=":", linewidth=1, label=f"limit, {1 - KEEP:.0%}")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="forget probability, half B",
            ylabel=f"share of retain probability lost, ≥ {LEAST:g}",
        )
        axes.set_title(f"retain rows {title}; ringed: as shipped", fontsize=10)
    lost[0].legend(fontsize=8)
    for place, row in enumerate(reversed(rows)):
        points = [chosen_point(record, controls.reference, controls.retrained) for record in row.records]
        for test, shift, fill in zip(TESTS, (0.15, -0.15), ("full", "none"), strict=True):
            if None not in points:
                each, low, high = distances(points, controls.retrained, test)
                colour, marker = LOOKS[row.label]
                tests.plot([low, high], [place + shift] * 2, color=colour, linewidth=1.5)
                tests.plot(np.mean(each), place + shift, marker, color=colour, markersize=7, fillstyle=fill)
    rows_in_b = len(values(controls.retrained, "log_p", B))
    tests.axvline(D_AT_005 / np.sqrt(rows_in_b), color=colours.RETRAINED, linestyle=":", linewidth=1.2)
    tests.set(xlabel="D, half B (dotted: p = 0.05)", xlim=(-0.02, 1.04), ylim=(-0.6, len(rows) - 0.4))
    tests.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
    tests.set_title("from the retrained model, by truth ratio\n(filled) and log-probability (hollow)", fontsize=10)


def draw_relearn(figure: Any, rows: list, controls: Any) -> None:
    """The other rows' probability over the attacker's steps: mean of seeds, and the range from the lowest to the highest."""
    axes = figure.subplots()
    curves = [("retrained model: the control", controls.attacked, colours.RETRAINED, "*")]
    curves += [(row.label, row.records, *LOOKS[row.label]) for row in rows]
    for label, records, colour, marker in curves:
        steps = sorted(map(int, records[0]["relearn"]))
        seeds = np.array([[np.mean(record["relearn"][str(step)]) for step in steps] for record in records])
        axes.plot(steps, seeds.mean(0), color=colour, marker=marker, markersize=6, label=label)
        axes.fill_between(steps, seeds.min(0), seeds.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set(
        yscale="log",
        xlabel="steps of relearning on a fifth of the forget rows",
        ylabel="mean probability of the other forget rows",
    )
    axes.set_xticks(steps)
    axes.set_title("mean of seeds; band: lowest to highest seed", fontsize=10)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_overlap(figure: Any, rows: list, controls: Any) -> None:
    """Retain probability lost against forget probability over the scales, one line a seed."""
    panels = {("kept", "given"): "kept and given", ("kept", "given", "never"): "kept, given and never-given"}
    for axes, (parts, names) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for row in rows:
            for seed, record in enumerate(row.records):
                points = record["points"]
                y = lost_of([kept(point, controls.reference, *parts) for point in points])
                x = [forget_probability(point) for point in points]
                curve(axes, row.label, [point["scale"] for point in points], x, y, None if seed else row.label)
        axes.axhline(1 - KEEP, color=colours.MUTED, linestyle=":", linewidth=1, label=f"limit, {1 - KEEP:.0%}")
        axes.set(xscale="log", yscale="log", xlabel="forget probability")
        axes.set_title(f"the largest loss of {names} rows; ringed: as shipped", fontsize=10)
    figure.axes[0].set_ylabel(f"share of retain probability lost, ≥ {LEAST:g}")
    figure.axes[0].legend(fontsize=9)


def curve(axes: Any, name: str, scales: list[float], x: list[float], y: list[float], label: str | None) -> None:
    """One method's line over the scales, with a ring at what ships."""
    colour, marker = LOOKS[name]
    axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1, label=label)
    shipped = scales.index(1)
    axes.plot(x[shipped], y[shipped], marker, color=colour, markersize=9, markeredgecolor="black", markeredgewidth=1)


def forget_probability(point: Point, half: slice = slice(None)) -> float:
    return float(np.exp(values(point, "log_p", half)).mean())


def lost_of(shares: list[float]) -> list[float]:
    return [max(1 - share, LEAST) for share in shares]
