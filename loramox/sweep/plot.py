"""The frontier as a picture."""

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

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    _along_the_axis(left, points, chosen, retrained, unit)
    _one_against_the_other(right, points, chosen, retrained, unit)
    for axes, side in ((left, "left"), (right, "right")):
        axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc=f"outside lower {side}", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)


def _along_the_axis(
    axes: Any, points: list[dict[str, Any]], chosen: float | None, retrained: dict[str, float], unit: str
) -> None:
    values = [p["at"] for p in points]
    for part, color, marker, line in (("retain", RETAIN, "s", "-"), ("forget", FORGET, "o", "--")):
        curve = [p[f"{part}_probability"] for p in points]
        axes.plot(values, curve, color=color, marker=marker, linestyle=line, markersize=4, label=f"{part} rows")
        if part in retrained:
            axes.axhline(retrained[part], color=color, linestyle=":", linewidth=1, label=f"{part}, retrained model")
    if chosen is not None:
        axes.axvline(chosen, color=CHOSEN, linewidth=1, linestyle="-.", label=f"chosen: {unit} = {chosen:g}")
    axes.set(xlabel=f"{unit} (0: the reference)", ylabel="probability of the true answers", ylim=(-0.02, 1.02))


def _one_against_the_other(
    axes: Any, points: list[dict[str, Any]], chosen: float | None, retrained: dict[str, float], unit: str
) -> None:
    # On a logarithmic axis: near the retrained model, forget probabilities differ by orders of magnitude.
    at = {p["at"]: (max(p["forget_probability"], LEAST), p["retain_probability"]) for p in points}
    axes.plot(*zip(*at.values(), strict=True), color=MUTED, marker="o", markersize=4, label=f"one point per {unit}")
    for value, point in at.items():
        axes.annotate(f"{value:g}", point, textcoords="offset points", xytext=(5, -9), fontsize=7)
    if {"forget", "retain"} <= retrained.keys():
        point = max(retrained["forget"], LEAST), retrained["retain"]
        axes.plot(*point, "*", color=RETRAINED, markersize=12, label="retrained model")
    if chosen is not None:
        axes.plot(*at[chosen], "D", color=CHOSEN, markersize=7, label=f"chosen: {unit} = {chosen:g}")
    axes.set(
        xscale="log",
        xlabel="probability of forget answers (less is better)",
        ylabel="of retain answers (more is better)",
    )
