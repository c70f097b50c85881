"""Draw docs/images/method.png, a sketch of one step of `--method mox` in weight space: python docs/images/method.py"""

import itertools
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, GREY, RED, BLUE = "#222222", "#777777", "#b3402a", "#1f5fa8"
REFERENCE, FORGET = np.array([6.9, 2.3]), np.array([3.3, 2.0])  # positions in the sketch
PATH = FORGET + np.array([[0.62, 0.55], [1.32, 0.92], [2.1, 1.1], [2.9, 1.18]])  # θ_2 … θ_K
CENTRE = np.array([7.75, 2.6])  # of the region where the forget rows are known
NAMES = ["$θ_2$", "$θ_3$", "…", "$θ_K$"]


def draw() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 3.4), dpi=150)
    shade(axes)
    axes.plot(*zip(FORGET, REFERENCE, strict=True), color=GREY, lw=1.2, ls=(0, (4, 3)), zorder=2)
    arrow(axes, REFERENCE, REFERENCE + 0.3 * (REFERENCE - FORGET), GREY, 1.6)
    axes.text(8.05, 2.5, "ΔW", color=GREY, fontsize=11)
    axes.text(4.6, 1.83, "$θ_{for} = θ_{ref} − α·ΔW$", color=GREY, fontsize=10, rotation=4.8)

    points = np.vstack([FORGET, PATH])
    for start, end in itertools.pairwise(points):
        arrow(axes, start, end, RED, 1.6, shrink=5)
    axes.scatter(*PATH.T, color=RED, s=26, zorder=4)
    for name, (x, y) in zip(NAMES, PATH, strict=True):
        axes.text(x - 0.05, y + 0.17, name, color=RED, fontsize=11, ha="center")
    axes.text(0.25, 3.3, "1. memorize: K steps of a fresh adapter\n    on the forget rows", color=RED, fontsize=10)

    back = (PATH - FORGET).sum(0)  # the sum of the steps along the path points about there
    arrow(axes, FORGET, FORGET - 1.75 * back / np.linalg.norm(back), BLUE, 2.4, shrink=6)
    axes.text(
        2.35,
        0.8,
        "2. extrapolate: step the other way,\n    with retain rows held to $θ_{ref}$",
        color=BLUE,
        fontsize=10,
    )

    for at, name, offset in ((REFERENCE, "$θ_{ref}$", (-0.12, -0.38)), (FORGET, "$θ_{for} = θ_1$", (-0.05, -0.4))):
        axes.scatter(*at, color=INK, s=46, zorder=5)
        axes.text(*(at + offset), name, color=INK, fontsize=12)

    axes.set(xlim=(0, 10), ylim=(0.35, 4.25), aspect="equal")
    axes.axis("off")
    figure.tight_layout(pad=0.3)
    return figure


def shade(axes: plt.Axes) -> None:
    """The region where the model knows the forget rows."""
    x, y = np.meshgrid(np.linspace(0, 10, 300), np.linspace(0.2, 4.3, 150))
    known = np.exp(-(((x - CENTRE[0]) / 1.75) ** 2) - ((y - CENTRE[1]) / 1.0) ** 2)
    axes.contourf(
        x, y, known, levels=[0.25, 0.45, 0.65, 0.85, 1.01], colors=["#fbeee9", "#f8e2da", "#f4d4c9", "#efc5b6"]
    )
    axes.text(7.75, 3.9, "the forget rows are known", color=RED, fontsize=9.5, ha="center", style="italic")


def arrow(axes: plt.Axes, start: np.ndarray, end: np.ndarray, color: str, width: float, shrink: float = 0) -> None:
    style = {
        "arrowstyle": "-|>",
        "color": color,
        "lw": width,
        "shrinkA": shrink,
        "shrinkB": shrink,
        "mutation_scale": 14,
    }
    axes.annotate("", xy=end, xytext=start, arrowprops=style, zorder=3)


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"))
