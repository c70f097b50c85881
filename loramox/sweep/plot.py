"""The frontier as a picture."""

from pathlib import Path
from typing import Any

from loramox.colours import CHOSEN, FORGET, RETAIN
from loramox.errors import needs
from loramox.files import replacing


def draw_frontier(
    path: Path, points: list[dict[str, Any]], chosen: float | None, retrained: dict[str, float], unit: str
) -> None:
    """Write `along_the_axis` as a PNG. Raises `MissingExtraError` when matplotlib is not installed."""
    with needs("report"):
        from matplotlib import figure

    drawn = figure.Figure(figsize=(6, 4.6), layout="constrained")
    axes = drawn.subplots()
    axes.grid(alpha=0.3)
    along_the_axis(axes, points, chosen, retrained, unit)
    drawn.legend(loc="outside lower center", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        drawn.savefig(partial, dpi=120, format="png")


def along_the_axis(
    axes: Any, points: list[dict[str, Any]], chosen: float | None, retrained: dict[str, float], unit: str
) -> None:
    """Draw the mean probabilities of forget and retain rows along alpha or scale, the `unit`.

    Each point has at, forget_probability and retain_probability; `retrained` has the retrained model's by part, if it is known.
    """
    values = [p["at"] for p in points]
    for part, color, marker, line in (("retain", RETAIN, "s", "-"), ("forget", FORGET, "o", "--")):
        curve = [p[f"{part}_probability"] for p in points]
        axes.plot(values, curve, color=color, marker=marker, linestyle=line, markersize=5, label=f"{part} rows")
        if part in retrained:
            axes.axhline(retrained[part], color=color, linestyle=":", linewidth=1.4, label=f"{part}, retrained model")
    if chosen is not None:
        axes.axvline(chosen, color=CHOSEN, linestyle="-.", linewidth=1.2, label=f"{unit} = {chosen:g}")
    axes.set(xlabel=f"{unit} (0: the reference)", ylabel="probability of the true answers", ylim=(-0.03, 1.05))
