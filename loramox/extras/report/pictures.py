"""The pictures of a report. Each curve has its own colour, marker and line, and each picture has a description in words."""

import math
import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from loramox.extras.report.answers import fit
from loramox.extras.report.facts import attack_rows, losses, shown, spreads, trajectory
from loramox.extras.report.read import FORGET, REFERENCE, RETRAINED, Inputs, number
from loramox.extras.report.svg import COLOURS, Picture, picture

SIZE = (4.8, 3.7)
LOOKS: dict[str, dict[str, Any]] = {
    "retain": {"color": COLOURS["retain"], "marker": "s", "linestyle": "-", "markersize": 5},
    "forget": {"color": COLOURS["forget"], "marker": "o", "linestyle": "--", "markersize": 5},
}
MODELS = {REFERENCE: COLOURS["muted"], FORGET: COLOURS["forget"], RETRAINED: COLOURS["retrained"]}
FLOOR = 1e-6  # probabilities below it are drawn there


def frontier_pictures(inputs: Inputs) -> list[Picture]:
    """Both parts along the axis of the sweep; and one against the other."""
    points = (inputs.frontier or {"points": []})["points"]
    at, unit = [p["at"] for p in points], inputs.unit
    curves = {part: [number(p.get(f"{part}_probability")) for p in points] for part in ("retain", "forget")}
    theirs = {part: float(p[RETRAINED].mean()) for part in curves if RETRAINED in (p := spreads(inputs, part))}
    chosen = inputs.at

    def along(figure: Figure) -> None:
        axes = figure.subplots()
        for part, curve in curves.items():
            axes.plot(at, curve, label=f"{part} rows", **LOOKS[part])
            if part in theirs:
                label = f"{part}, {RETRAINED}"
                axes.axhline(theirs[part], color=LOOKS[part]["color"], linestyle=":", linewidth=1.4, label=label)
        if chosen is not None:
            axes.axvline(
                chosen, color=COLOURS["ink"], linestyle="-.", linewidth=1.2, label=f"shown: {unit} = {chosen:g}"
            )
        axes.set(xlabel=f"{unit} (0: the reference)", ylabel="probability of the true answers", ylim=(-0.03, 1.05))
        figure.legend(loc="outside lower center", ncols=2)

    kept = [p for p in (*curves["retain"], theirs.get("retain", math.nan)) if math.isfinite(p)] or [1.0]
    # Never less than a fifth of the scale, so that little does not look like much.
    bottom, top = min(0.8, min(kept) - 0.04), max(kept)

    def against(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(
            curves["forget"],
            curves["retain"],
            color=COLOURS["muted"],
            marker="o",
            markersize=5,
            label=f"one {unit} each",
        )
        if {"forget", "retain"} <= theirs.keys():
            axes.plot(
                theirs["forget"], theirs["retain"], "*", color=COLOURS["retrained"], markersize=13, label=RETRAINED
            )
        if chosen is not None:
            x, y = (curves[part][at.index(chosen)] for part in ("forget", "retain"))
            axes.plot(x, y, "D", color=COLOURS["ink"], markersize=8, label=f"shown: {unit} = {chosen:g}")
        for value, x, y in _apart(at, curves, chosen):
            # Beside the curve: below it where it is level, to the right where it falls.
            level = y > top - 0.15 * (1.02 - bottom)
            axes.annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(7, -13) if level else (9, -4))
        axes.set(xlabel="of forget answers (left is better)", ylabel="of retain answers (up is better)")
        axes.set(xlim=(-0.03, 1.05), ylim=(bottom, 1.02))
        figure.legend(loc="outside lower center", ncols=3)

    words = "; ".join(
        f"{unit} {value:g}: forget {shown(f)}, retain {shown(r)}"
        for value, f, r in zip(at, curves["forget"], curves["retain"], strict=True)
    )
    return [
        picture(
            "along-the-axis", SIZE, along, f"Mean probability of the true answers at each {unit}. {words}",
            f"Mean probability of the true answers at each {unit}.",
        ),
        picture(
            "trade-off", SIZE, against, f"Retain against forget probability, one point for each {unit}. {words}",
            f"The same points, retain against forget: the best place is the upper left corner. Numbers are values of {unit}.",
        ),
    ]  # fmt: skip


def _apart(at: list[float], curves: dict[str, list[float]], chosen: float | None) -> list[tuple[float, float, float]]:
    """The points whose labels do not lie upon each other; the chosen one and the ends first."""
    points = list(zip(at, curves["forget"], curves["retain"], strict=True))
    points = [p for p in points if np.isfinite(p).all()]
    height = max((p[2] for p in points), default=1) - min((p[2] for p in points), default=0) or 1
    points.sort(key=lambda p: (p[0] != chosen, p[0] not in (at[0], at[-1]), p[0]))
    kept: list[tuple[float, float, float]] = []
    for p in points:
        if all(abs(p[1] - k[1]) > 0.07 or abs(p[2] - k[2]) > 0.07 * height for k in kept):
            kept.append(p)
    return kept


def spread_picture(inputs: Inputs, part: str) -> Picture | None:
    """How the rows of a part are distributed under each model: one histogram above the other."""
    found = spreads(inputs, part)
    if not found:
        return None
    # Forget rows differ by orders of magnitude, retain rows by a little.
    logarithmic = part == "forget"
    least = min(float(p.min()) for p in found.values())
    if logarithmic:
        edges = np.geomspace(10.0 ** math.floor(math.log10(max(FLOOR, min(least, 0.1)))), 1, 31)
    else:
        edges = np.linspace(max(0, min(0.9, math.floor(least * 10) / 10)), 1, 31)

    def draw(figure: Figure) -> None:
        every = np.atleast_1d(figure.subplots(len(found), 1, sharex=True))
        for axes, (model, p) in zip(every, found.items(), strict=True):
            share = np.histogram(np.clip(p, edges[0], 1), edges)[0] / len(p)
            axes.stairs(share, edges, fill=True, color=MODELS[model], alpha=0.55)
            axes.stairs(share, edges, color=MODELS[model], linewidth=1.3)
            axes.plot(
                np.clip(np.median(p), edges[0], 1), 0, "^", color=COLOURS["ink"], markersize=8, clip_on=False, zorder=5
            )
            axes.set_title(f"{model}: median {shown(np.median(p))}", loc="left")
            axes.set(ylim=(0, max(1e-9, share.max()) * 1.08))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
            axes.yaxis.set_major_locator(MaxNLocator(3))
            if logarithmic:
                axes.set_xscale("log")
                axes.minorticks_off()
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlim(edges[0], 1.2 if logarithmic else 1 + 0.02 * (1 - edges[0]))
        every[-1].set_xlabel(f"probability of the true answer{', logarithmic' if logarithmic else ''}")
        figure.supylabel("share of rows", fontsize=11)

    words = "; ".join(
        f"{model}: 5 % of the rows below {shown(np.quantile(p, 0.05))}, median {shown(np.median(p))}, 5 % above "
        f"{shown(np.quantile(p, 0.95))}"
        for model, p in found.items()
    )
    n = len(next(iter(found.values())))
    begins = f" The axis begins at {edges[0]:g}." if not logarithmic and edges[0] > 0 else ""
    return picture(
        f"spread-{part}", (4.8, 1.2 * len(found) + 0.9), draw, f"Probability of each {part} row. {words}",
        f"The {n:,} {part} rows, by the probability of the true answer. ▲ is the median.{begins}",
    )  # fmt: skip


def training_pictures(inputs: Inputs) -> list[Picture]:
    """The rows scored while training, and the two terms of the loss, where the run's log has them."""
    made = []
    if curves := trajectory(inputs):

        def watched(figure: Figure) -> None:
            axes = figure.subplots()
            for part, (epochs, p) in curves.items():
                axes.plot(epochs, p, label=f"{part} rows", **LOOKS[part] | _few(epochs))
            axes.set(xlabel="epoch", ylabel="probability of the true answers", ylim=(-0.03, 1.05))
            figure.legend(loc="outside lower center", ncols=2)

        ends = ", ".join(f"{part} from {shown(p[0])} to {shown(p[-1])}" for part, (_, p) in curves.items())
        alpha = number(inputs.run.get("alpha"))
        at = "" if math.isnan(alpha) else f", at alpha = {alpha:g}, which is trained for"
        caption = f"On the rows scored while training{at}: {ends}."
        made.append(picture("watched", SIZE, watched, f"Probability over training: {ends}", caption))
    if len((terms := losses(inputs))["epoch"]) > 1:

        def both(figure: Figure) -> None:
            looks = {
                "forget_loss": ("forget", "loss on forget rows"),
                "retain_kl": ("retain", "KL on retain rows"),
            }
            for axes, (name, (look, label)) in zip(figure.subplots(2, 1, sharex=True), looks.items(), strict=True):
                axes.plot(terms["epoch"], terms[name], **LOOKS[look] | _few(terms["epoch"]))
                axes.set_title(f"{label}, nats", loc="left")
            axes.set(xlabel="epoch")

        ends = ", ".join(
            f"{n} from {shown(terms[n][0])} to {shown(terms[n][-1])}" for n in ("forget_loss", "retain_kl")
        )
        caption = (
            "The two terms of the loss: the one on the forget rows, and the KL that holds the retain rows in place."
        )
        made.append(picture("losses", SIZE, both, f"The terms of the loss over training: {ends}", caption))
    return made


def _few(x: list[float]) -> dict[str, Any]:
    """Some markers tell curves apart; a marker a point would hide them."""
    return {"markevery": max(1, len(x) // 12)}


def attack_picture(inputs: Inputs) -> Picture | None:
    """How probable forget answers are after each attack, beside what they were before."""
    every = attack_rows(inputs)
    rows = [r for r in every if r["attack"] != "none"]
    if not rows:
        return None
    before = next((r for r in every if r["attack"] == "none"), {"forget": math.nan, "reference": math.nan})
    lines = {REFERENCE: before["reference"], FORGET: before["forget"]}
    attacks = list(dict.fromkeys(r["attack"] for r in rows))
    markers = dict(zip(attacks, "osD^vPX*" * (len(attacks) // 8 + 1), strict=False))
    labels: list[tuple[str, list[dict[str, Any]]]] = []
    for attack in attacks:
        labels.append((fit(attack, 34)["text"], []))
        for label in dict.fromkeys(r["label"] for r in rows if r["attack"] == attack):
            same = [r for r in rows if (r["attack"], r["label"]) == (attack, label)]
            labels.append(("\n".join(textwrap.wrap(fit(label, 60)["text"], 26)), same))
    height = 1.0 + 0.22 * sum(label.count("\n") + 1 for label, _ in labels)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        at, places = 0.0, []
        for label, same in labels:
            deep = label.count("\n") + 1
            places.append(at + deep / 2)
            at += deep
            for row in same:
                look = {"marker": markers[row["attack"]], "markersize": 7}
                if math.isfinite(row["reference"]):
                    axes.plot(
                        row["reference"], places[-1], color=MODELS[REFERENCE], markerfacecolor=COLOURS["paper"], **look
                    )
                axes.plot([0, row["forget"]], [places[-1]] * 2, color=MODELS[FORGET], linewidth=1.2)
                axes.plot(row["forget"], places[-1], color=MODELS[FORGET], **look)
        for (name, value), line in zip(lines.items(), (":", "-."), strict=True):
            if math.isfinite(value):
                axes.axvline(value, color=COLOURS["ink"], linestyle=line, linewidth=1.2, label=f"{name}, not attacked")
        axes.set_yticks(places, [label for label, _ in labels])
        for tick, (_, same) in zip(axes.get_yticklabels(), labels, strict=True):
            tick.set(fontsize=10, fontweight="normal" if same else "bold", color=COLOURS["ink" if same else "muted"])
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(-0.02, 1.04), ylim=(at, 0), xlabel="probability of forget answers")
        if any(map(math.isfinite, lines.values())):
            figure.legend(loc="outside lower center", ncols=1)

    words = "; ".join(f"{r['attack']}, {r['label']}: {shown(r['forget'])}" for r in rows)
    hollow = (
        " Hollow grey: the reference in the same state." if any(math.isfinite(r["reference"]) for r in rows) else ""
    )
    caption = f"How much of the forget rows is recovered: the further right, the more.{hollow}"
    return picture(
        "came-back",
        (4.8, height),
        draw,
        fit(f"Probability of forget answers after attacks. {words}", 4000)["text"],
        caption,
    )
