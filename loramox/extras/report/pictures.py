"""The pictures of a report. Each curve has its own colour, marker and line, and each picture has a description in words."""

import itertools
import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from loramox.evaluate.attacks.attacked import NEVER_KNOWN
from loramox.evaluate.attacks.leaks import CRITERIA
from loramox.extras.report.answers import fit
from loramox.extras.report.facts import PARTS, leak_curves, relearned, shown, spreads, trajectory
from loramox.extras.report.read import FORGET, REFERENCE, RETRAINED, Inputs, number
from loramox.extras.report.recovery import Family, families, in_words
from loramox.extras.report.svg import COLOURS, Picture, picture
from loramox.sweep.plot import along_the_axis

SIZE = (4.8, 3.7)
LOOKS: dict[str, dict[str, Any]] = {
    "retain": {"color": COLOURS["retain"], "marker": "s", "linestyle": "-", "markersize": 5},
    "forget": {"color": COLOURS["forget"], "marker": "o", "linestyle": "--", "markersize": 5},
}
MODELS = {
    REFERENCE: COLOURS["muted"],
    FORGET: COLOURS["forget"],
    **dict.fromkeys((RETRAINED, NEVER_KNOWN), COLOURS["retrained"]),
}
FLOOR = 1e-6  # probabilities below it are drawn there


def frontier_picture(inputs: Inputs) -> Picture:
    """Both parts along the axis of the sweep."""
    unit = inputs.unit
    points = [
        {"at": p["at"]} | {f"{part}_probability": number(p.get(f"{part}_probability")) for part in PARTS}
        for p in inputs.frontier["points"]
    ]
    theirs = {part: float(p[RETRAINED].mean()) for part in PARTS if RETRAINED in (p := spreads(inputs, part))}

    def along(figure: Figure) -> None:
        along_the_axis(figure.subplots(), points, inputs.at, theirs, unit)
        figure.legend(loc="outside lower center", ncols=2)

    words = "; ".join(
        f"{unit} {p['at']:g}: forget {shown(p['forget_probability'])}, retain {shown(p['retain_probability'])}"
        for p in points
    )
    caption = f"Mean probability of the true answers at each {unit}."
    return picture("along-the-axis", SIZE, along, f"{caption} {words}", caption)


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


def training_picture(inputs: Inputs) -> Picture | None:
    """The rows scored while training, where the run's log has them."""
    curves = trajectory(inputs)
    if not curves:
        return None

    def watched(figure: Figure) -> None:
        axes = figure.subplots()
        for part, (epochs, p) in curves.items():
            # Some markers tell curves apart; a marker a point would hide them.
            axes.plot(epochs, p, label=f"{part} rows", markevery=max(1, len(epochs) // 12), **LOOKS[part])
        axes.set(xlabel="epoch", ylabel="probability of the true answers", ylim=(-0.03, 1.05))
        figure.legend(loc="outside lower center", ncols=2)

    ends = ", ".join(f"{part} from {shown(p[0])} to {shown(p[-1])}" for part, (_, p) in curves.items())
    alpha = number(inputs.run.get("alpha"))
    at = "" if math.isnan(alpha) else f", at alpha = {alpha:g}, which is trained for"
    caption = f"On the rows scored while training{at}: {ends}."
    return picture("watched", SIZE, watched, f"Probability over training: {ends}", caption)


def relearning_picture(inputs: Inputs) -> Picture | None:
    """What relearning brings back step by step, of the forget model and of its control; None if it was not attacked so."""
    found = relearned(inputs)
    if not found:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (rows, curves), marker in zip(found.items(), itertools.cycle("os^"), strict=False):
            for model, (steps, p) in curves.items():
                line = "-" if model == FORGET else ":"
                axes.plot(steps, p, line + marker, color=MODELS[model], label=f"{model}, {fit(rows, 30)['text']}")
        axes.set(xlabel="steps of training", ylabel="probability of the true answers", ylim=(-0.03, 1.05))
        figure.legend(loc="outside lower center", ncols=1)

    words = "; ".join(
        f"{model}, trained on {rows}: {', '.join(f'step {s} {shown(v)}' for s, v in zip(*curve, strict=True))}"
        for rows, curves in found.items()
        for model, curve in curves.items()
    )
    caption = "What some steps of training bring back of the other forget rows, by what is trained on"
    beside = any(inputs.control in each for each in found.values())
    caption += f"; dotted: the control, {inputs.control}." if beside else "; no control."
    return picture("relearning", SIZE, draw, fit(f"{caption} {words}", 4000)["text"], caption)


def sampling_picture(inputs: Inputs) -> Picture | None:
    """leak@k of the forget model and of its control along k; None where fewer than two k were estimated."""
    found = leak_curves(inputs)
    every = [(by, model, curve) for by, models in found.items() for model, curve in models.items()]
    ks = sorted({int(each["k"]) for *_, curve in every for each in curve})
    if len(ks) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for by, model, curve in every:
            k, value, low, high = ([each[name] for each in curve] for name in ("k", "value", "low", "high"))
            line, colour = dict(zip(CRITERIA, ("-o", "--s"), strict=True))[by], MODELS[model]
            axes.plot(k, value, line, color=colour, markersize=5, label=f"{model}, by {CRITERIA[by]}")
            axes.fill_between(k, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set(xlabel="k, answers sampled to a question", ylabel="leak@k", xscale="log", ylim=(-0.01, None))
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=1)

    def at(each: dict[str, float]) -> str:
        return f"k = {each['k']:.0f} {shown(each['value'])}"

    words = "; ".join(f"{model}, by {CRITERIA[by]}: {', '.join(map(at, curve))}" for by, model, curve in every)
    caption = "How often at least one of k sampled answers leaks, with 95 % intervals over rows"
    caption += f"; the control: {inputs.control}." if any(model != FORGET for _, model, _ in every) else "; no control."
    return picture("sampling", SIZE, draw, f"{caption} {words}", caption)


def recovery_picture(inputs: Inputs) -> Picture | None:
    """The worst state of each family of attacks under the three models; who was not measured is named."""
    found = families(inputs)
    if len(found) < 2:
        return None
    models = {
        FORGET: ("forget model", COLOURS["forget"]),
        inputs.control: (f"control: {inputs.control or 'none'}", COLOURS["retrained"]),
        REFERENCE: ("reference, which knows them", COLOURS["muted"]),
    }
    down, bars = 5.4, list(enumerate(models.items(), 2))
    note: dict[str, Any] = {"va": "center", "fontsize": 9, "color": COLOURS["muted"]}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, family in enumerate(found):
            axes.text(0, i * down, family.title, va="center", fontweight="bold")
            axes.text(0, i * down + 1, in_words(family.measure) + (family.where and f"; {family.where}"), **note)
            for y, (model, (_, colour)) in bars:
                at, (value, attacked) = i * down + y, family.value(model)
                if math.isnan(value):
                    axes.text(0.01, at, "no control" if model == inputs.control else "not measured", **note)
                    continue
                axes.barh(at, value, 0.8, facecolor=colour if attacked else COLOURS["paper"], edgecolor=colour)
                axes.text(value + 0.01, at, shown(value), va="center", fontsize=9)
        handles = [Patch(facecolor=colour, edgecolor=colour, label=label) for label, colour in models.values()]
        axes.set(xlim=(0, 1.12), ylim=(len(found) * down - 0.8, -0.8), yticks=[])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.grid(visible=False, axis="y")
        figure.legend(handles=handles, loc="outside lower center", ncols=1)

    def words(family: Family) -> str:
        each = (f"{label} {shown(family.value(model)[0])}" for model, (label, _) in models.items())
        return f"{family.title}, {in_words(family.measure)}: {', '.join(each)}"

    caption = "The worst state of each family of attacks; the further right, the more is recovered."
    if any(not family.value(model)[1] and family.value(model)[0] >= 0 for family in found for model in models):
        caption += " Hollow: before any attack, where none was made in that way."
    every = "; ".join(map(words, found))
    return picture(
        "recovery", (4.8, 0.9 + 1.05 * len(found)), draw, fit(f"What attacks recover. {every}", 4000)["text"], caption
    )
