"""The frontier as a picture."""

import math
from pathlib import Path
from typing import Any

from loramox.colours import CHOSEN, FORGET, MUTED, RETAIN, RETRAINED
from loramox.errors import needs
from loramox.files import replacing

LEAST = 1e-8  # of the logarithmic axis: smaller values are drawn there


def draw_frontier(
    path: Path, points: list[dict[str, Any]], chosen: float | None, retrained: dict[str, float], unit: str
) -> None:
    """Write a PNG: on the left both parts along the axis, on the right one against the other, forget logarithmic.

    Args:
        points: each has at, forget_probability and retain_probability.
        chosen: the value of the axis to mark.
        retrained: the retrained model's mean probabilities by part, or nothing.
        unit: of the axis, alpha or scale.

    Raises:
        MissingExtraError: when matplotlib is not installed.
    """
    with needs("report"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        from matplotlib.ticker import NullFormatter

    values = [p["at"] for p in points]
    forget, retain = ([p[f"{part}_probability"] for p in points] for part in ("forget", "retain"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    left.plot(values, retain, color=RETAIN, marker="s", markersize=4, label="retain rows")
    left.plot(values, forget, color=FORGET, marker="o", linestyle="--", markersize=4, label="forget rows")
    for part, color in (("retain", RETAIN), ("forget", FORGET)):
        if part in retrained:
            left.axhline(retrained[part], color=color, linestyle=":", linewidth=1, label=f"{part}, retrained model")
    left.set(xlabel=f"{unit} (0: the reference)", ylabel="probability of the true answers", ylim=(-0.02, 1.02))
    shown = [max(p, LEAST) for p in forget]  # near the retrained model they differ by orders of magnitude
    right.plot(shown, retain, color=MUTED, marker="o", markersize=4, label=f"one point per {unit}")
    for p, x, y in zip(points, shown, retain, strict=True):
        right.annotate(f"{p['at']:g}", (x, y), textcoords="offset points", xytext=(5, -9), fontsize=7)
    if {"forget", "retain"} <= retrained.keys():
        right.plot(
            max(retrained["forget"], LEAST),
            retrained["retain"],
            "*",
            color=RETRAINED,
            markersize=12,
            label="retrained model",
        )
    if chosen is not None:
        at = values.index(chosen)
        left.axvline(chosen, color=CHOSEN, linewidth=1, linestyle="-.", label=f"chosen: {unit} = {chosen:g}")
        right.plot(shown[at], retain[at], "D", color=CHOSEN, markersize=7, label=f"chosen: {unit} = {chosen:g}")
    right.set(
        xscale="log",
        xlabel="probability of forget answers (less is better)",
        ylabel="of retain answers (more is better)",
    )
    # However little changes, at least a decade of forget and a twentieth of retain, and so no labels between decades.
    measured = [x for x in shown if math.isfinite(x)]  # a value far too high may overflow
    right.set_xlim(left=0.8 * min(*measured, max(measured) / 10))
    right.xaxis.set_minor_formatter(NullFormatter())
    low, high = min(right.get_ylim()[0], 0.95 * retain[0]), right.get_ylim()[1]
    right.set_ylim(low, high + (high - low) / 25)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
