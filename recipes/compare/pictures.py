"""The pictures: one colour and marker for each method, the retrained model green, in Okabe and Ito's colours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from loramox import colours
from loramox.files import replacing

from .choose import KEEP, TESTS, B, chosen_point, distances, kept, values

LOOKS = {
    "mox": ("#0072b2", "o"), "npo_mean": ("#e69f00", "s"), "npo": ("#cc79a7", "^"), "simnpo": ("#56b4e9", "v"),
    "mox_static": ("#d55e00", "D"), "task_vector": ("#777777", "X"),
    "one inner step": ("#e69f00", "s"), "without momentum": ("#cc79a7", "^"), "without KL": ("#d55e00", "D"), "KL of weight 5": ("#56b4e9", "v"),
}  # fmt: skip
LEAST = 1e-4  # smallest share lost that is drawn
WITH_P_005 = 1.358 * np.sqrt(2)  # times 1/√n: D at which p = 0.05, for two samples of n


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
            colour, marker = LOOKS[row.label]
            points = list(zip(*(record["points"] for record in row.records), strict=True))  # of all seeds, by scale
            x = [np.mean([np.exp(values(point, "log_p", B)).mean() for point in some]) for some in points]
            y = [1 - np.mean([kept(point, controls.reference, part) for point in some]) for some in points]
            axes.plot(x, np.maximum(y, LEAST), color=colour, marker=marker, markersize=4, linewidth=1, label=row.label)
        x, y = (
            np.exp(values(controls.retrained, "log_p", B)).mean(),
            1 - kept(controls.retrained, controls.reference, part),
        )
        axes.plot(x, max(y, LEAST), "*", color=colours.RETRAINED, markersize=13, label="retrained model")
        axes.axhline(1 - KEEP, color=colours.MUTED, linestyle=":", linewidth=1)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="forget probability, half B",
            ylabel="share of the reference's probability lost",
        )
        axes.set_title(f"retain rows {title}", fontsize=10)
    lost[0].legend(fontsize=8)
    size = len(values(controls.retrained, "log_p", B))
    for place, row in enumerate(reversed(rows)):
        points = [chosen_point(record, controls.reference, controls.retrained) for record in row.records]
        for test, shift, marker in zip(TESTS, (0.15, -0.15), ("o", "D"), strict=True):
            if None not in points:
                each, low, high = distances(points, controls.retrained, test)
                colour = LOOKS[row.label][0]
                tests.plot([low, high], [place + shift] * 2, color=colour, linewidth=1.5)
                tests.plot(
                    np.mean(each),
                    place + shift,
                    marker,
                    color=colour,
                    markersize=6,
                    fillstyle="full" if marker == "o" else "none",
                )
    tests.axvline(WITH_P_005 / np.sqrt(size), color=colours.RETRAINED, linestyle=":", linewidth=1.2)
    tests.set(xlabel="D on half B: ● truth ratio, ◇ log-probability", xlim=(0, 1.02), ylim=(-0.6, len(rows) - 0.4))
    tests.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
    tests.set_title("distance from the retrained model; dotted: p = 0.05", fontsize=10)


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
    axes.set_title("band: lowest to highest seed", fontsize=10)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_overlap(figure: Any, rows: list, controls: Any) -> None:
    """Forget probability against the retain probability kept, over the scales, one line a seed."""
    for axes, parts in zip(
        figure.subplots(1, 2, sharey=True), (("kept", "given"), ("kept", "given", "never")), strict=True
    ):
        for row in rows:
            colour, marker = LOOKS[row.label]
            for seed, record in enumerate(row.records):
                points = [controls.reference, *record["points"]]
                x = [kept(point, controls.reference, *parts) for point in points]
                y = [np.exp(values(point, "log_p")).mean() for point in points]
                axes.plot(
                    x, y, color=colour, marker=marker, markersize=4, linewidth=1, label=None if seed else row.label
                )
        axes.axvline(KEEP, color=colours.MUTED, linestyle=":", linewidth=1)
        axes.set(
            yscale="log",
            xlabel=f"share of the reference's probability kept: least of {', '.join(parts)}",
            xlim=(0.8, 1.005),
        )
    figure.axes[0].set_ylabel("probability of the forget answers")
    figure.axes[0].legend(fontsize=9)
