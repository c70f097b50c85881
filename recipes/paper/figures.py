"""Sensitivity to α and η, utility against forget quality over training, Figure 1, relearning: pictures with their data."""

import itertools
from collections.abc import Sequence
from typing import Any

from loramox import colours

from .frontier import FORGET, RETAIN
from .methods import ALPHAS, DEFAULT, LEVEL, PAPER, RIVALS, WITHOUT, Scale, gold_of, reference_of
from .runs import Read, Record, Run
from .show import Shown, Table, cell, found, markdown, mean, number, verdict

# Of each method its colour and marker, the same in every picture: Okabe and Ito's colours.
LOOKS = {
    "loramox": (colours.FORGET, "o"),
    "loramox without momentum": (colours.MUTED, "x"),
    "MOX, paper's setting": ("#e69f00", "^"),
    "NPO": (colours.RETAIN, "s"),
    "GradDiff": ("#cc79a7", "D"),
    "GA": ("#56b4e9", "v"),
    "GA + KL": ("#000001", "P"),
}
ALONG = {
    "loramox": DEFAULT,
    "loramox without momentum": WITHOUT["without momentum"],
    "MOX, paper's setting": PAPER,
    "NPO": RIVALS["NPO"],
    "GradDiff": RIVALS["GradDiff"],
    "GA": ("ga", {}),
    "GA + KL": ("ga_kl", {}),
}
STABLE = (0.2, 0.8)  # η, where the paper has it stable
HELD = 0.05  # share of the reference's retain probability that may be lost on the way


def _sensitivity_plan(scale: Scale, read: Read) -> list[Run]:
    seed = scale.seeds[0]
    return [scale.run("curve", DEFAULT, seed), scale.run("curve", PAPER, seed), scale.run("momentum", DEFAULT, seed)]


def _sensitivity(scale: Scale, read: Read) -> Shown:
    ours, paper, etas = (read(run) for run in _sensitivity_plan(scale, read))
    data: dict[str, Any] = {}
    for label, record in (("loramox", ours), ("MOX, paper's setting", paper)):
        if record and "failed" not in record:
            data[label] = record["points"]
    rows = [
        [label, f"{p['strength']:g}", *(number(p.get(name)) for name in (FORGET, RETAIN, "forget_quality"))]
        for label, points in data.items()
        for p in points
    ]
    if etas and "failed" not in etas:
        data["η"] = etas["points"]
        rows += [
            ["loramox", f"η = {p['momentum']:g}", *(number(p.get(name)) for name in (FORGET, RETAIN, "forget_quality"))]
            for p in etas["points"]
        ]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for label in (label for label in LOOKS if label in data):
            _two_lines(left, data[label], "strength", label)
        left.set(xlabel="strength α (log scale)", xscale="log", ylabel="probability of the true answers")
        left.set_xticks((*ALPHAS, 16), [f"{alpha:g}" for alpha in (*ALPHAS, 16)])
        left.minorticks_off()
        if "η" in data:
            _two_lines(right, data["η"], "momentum", "loramox")
        right.set(xlabel="momentum η, weight of the new model (1: off)")
        for axes in (left, right):
            axes.set_ylim(-0.02, 1.02)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)

    return Shown(
        _sensitivity_claim(data),
        data,
        markdown(["", "α, η", "forget probability ↓", "retain probability ↑", "KS p ↑"], rows),
        draw,
    )


def _two_lines(axes: Any, points: Sequence[dict[str, Any]], x: str, label: str) -> None:
    colour, marker = LOOKS[label]
    at = [p for p in points if p[x] > 0]
    for name, line, part in ((RETAIN, "-", "retain rows"), (FORGET, "--", "forget rows")):
        values = [p.get(name) for p in at]
        axes.plot([p[x] for p in at], values, line, color=colour, marker=marker, markersize=4, label=f"{label}, {part}")


def _sensitivity_claim(data: dict[str, Any]) -> str:
    parts = []
    for label in ("MOX, paper's setting", "loramox"):
        at = [p for p in data.get(label, ()) if p["strength"] in (0.0, *ALPHAS) and p.get(FORGET) is not None]
        if len(at) > 2:
            values = ", ".join(f"{number(p[FORGET])} at α = {p['strength']:g}" for p in at)
            how = f"{label}'s forget probability is {values}"
            parts.append(verdict(all(a[FORGET] >= b[FORGET] for a, b in itertools.pairwise(at)), how))
    stable = [p for p in data.get("η", ()) if STABLE[0] <= p["momentum"] <= STABLE[1]]
    if stable:
        widths = {name: max(p[name] for p in stable) - min(p[name] for p in stable) for name in (FORGET, RETAIN)}
        how = f"from η = {STABLE[0]} to {STABLE[1]} forget probability varies by {number(widths[FORGET])}, retain by {number(widths[RETAIN])}"
        parts.append(verdict(max(widths.values()) < HELD, how))
    return " ".join(
        ["The paper: forgetting grows with α, of which it takes 4, and η is stable from 0.2 to 0.8.", *parts]
    )


def _trajectory_plan(scale: Scale, read: Read) -> list[Run]:
    runs = [scale.run("trajectory", of, scale.seeds[0]) for of in ALONG.values()]
    return [*(run for run in (reference_of(runs[0]), gold_of(runs[0])) if run), *runs]


def _along(scale: Scale, read: Read, labels: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    runs = {label: read(scale.run("trajectory", ALONG[label], scale.seeds[0])) for label in labels}
    return {label: record["points"] for label, record in runs.items() if record and "failed" not in record}


def _least(points: Sequence[dict[str, Any]]) -> float:
    """The lowest retain probability on the way."""
    return min(p[RETAIN] if p[RETAIN] is not None else 0.0 for p in points)


def _trajectory(scale: Scale, read: Read) -> Shown:
    data = _along(scale, read, tuple(ALONG))
    rows = [
        [label, str(p["step"]), *(number(p.get(name)) for name in (FORGET, RETAIN, "forget_quality"))]
        for label, points in data.items()
        for p in points
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for label, points in data.items():
            colour, marker = LOOKS[label]
            look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.3, "label": label}
            left.plot([p.get(FORGET) for p in points], [p[RETAIN] for p in points], **look)
            shown = [(p[RETAIN], p["forget_quality"]) for p in points if p.get("forget_quality")]
            right.plot([retain for retain, _ in shown], [quality for _, quality in shown], **look)
        left.set(
            xlabel="forget probability (less is better; starts at the right)",
            ylabel="retain probability",
            ylim=(-0.02, 1.02),
        )
        right.set(
            xlabel="retain probability",
            ylabel="KS p beside the retrained model (log scale)",
            yscale="log",
            xlim=(-0.02, 1.02),
        )
        right.axhline(0.05, color=colours.MUTED, linestyle=":", linewidth=1)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        left.legend(fontsize=8)

    claim = "The paper: MOX converges throughout training, where ascent collapses. "
    if not {"loramox", "GA"} <= data.keys():
        return Shown(claim + "Not all of it has been run", data, [], None)
    known = data["loramox"][0][RETAIN]
    ends = {label: points[-1] for label, points in data.items()}
    how = (
        f"the lowest retain probability on the way is {', '.join(f'{number(_least(points))} ({label})' for label, points in data.items())}; "
        f"loramox ends at forget {number(ends['loramox'][FORGET])}, GA at {number(ends['GA'].get(FORGET))}"
    )
    holds = _least(data["loramox"]) > (1 - HELD) * known > _least(data["GA"])
    heads = ["", "step", "forget probability ↓", "retain probability ↑", "KS p ↑"]
    return Shown(claim + verdict(holds, how), data, markdown(heads, rows), draw)


def _figure1_plan(scale: Scale, read: Read) -> list[Run]:
    return [
        scale.run("trajectory", ALONG[label], scale.seeds[0]) for label in ("GA", "MOX, paper's setting", "loramox")
    ]


def _figure1(scale: Scale, read: Read) -> Shown:
    data = _along(scale, read, ("GA", "MOX, paper's setting", "loramox"))
    rows = [
        [label, str(p["step"]), number(p[RETAIN]), number(p["distance"]), number(p["trained_distance"])]
        for label, points in data.items()
        for p in points
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for label, points in data.items():
            colour, marker = LOOKS[label]
            steps = [p["step"] for p in points]
            for axes, name in ((left, RETAIN), (right, "distance")):
                axes.plot(steps, [p[name] for p in points], color=colour, marker=marker, markersize=4, label=label)
            if label != "GA":
                trained = [p["trained_distance"] for p in points]
                right.plot(steps, trained, "--", color=colour, linewidth=1.2, label=f"{label}, memorization model")
        left.set(xlabel="step", ylabel="retain probability", ylim=(-0.02, 1.02))
        right.set(xlabel="step", ylabel="‖θ − θ_ref‖, all adapted layers")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        right.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.32))  # between the curves; of both sides

    claim = "The paper: ascent runs away from the reference and ruins utility; descent stays near it, and so does what is extrapolated from it. "
    if not {"loramox", "GA"} <= data.keys():
        return Shown(claim + "Not all of it has been run", data, [], None)
    ends = {label: points[-1] for label, points in data.items()}
    how = "; ".join(
        f"{label} ends at retain {number(p[RETAIN])}, {number(p['distance'])} away"
        + ("" if label == "GA" else f" (memorization model {number(p['trained_distance'])})")
        for label, p in ends.items()
    )
    ours, ascent = ends["loramox"], ends["GA"]
    parts = [
        f"Utility: {verdict((ours[RETAIN] or 0) > (ascent[RETAIN] or 0), how)}",
        f"Distance of what was trained: {verdict(ours['trained_distance'] < ascent['trained_distance'], _times(ascent['trained_distance'], ours['trained_distance']))}",
        f"Distance of the forget model: {verdict(ours['distance'] < ascent['distance'], _times(ascent['distance'], ours['distance']))}",
    ]
    heads = ["", "step", "retain probability ↑", "‖θ − θ_ref‖ of the forget model", "of what was trained"]
    return Shown(claim + " ".join(parts), data, markdown(heads, rows), draw)


def _times(theirs: float, ours: float) -> str:
    return f"ascent's is {theirs / ours:.2g} times that of loramox" if ours else "loramox did not move"


LITTLE = 0.1  # forgotten, in probability: a share of less says nothing
BY = {"attacker": "a fifth of the forget rows", "retain": "rows that are to stay"}


def _relearn_plan(scale: Scale, read: Read) -> list[Run]:
    return [scale.run("relearn", of, seed) for of in RIVALS.values() for seed in scale.seeds]


def _back(record: Record, rows: str, step: int) -> float | None:
    """The share of what was forgotten that has come back; None where next to nothing was."""
    points = {p["step"]: p[FORGET] for p in record["points"] if p["rows"] == rows}
    forgotten = record["reference"][FORGET] - points[0]
    return (points[step] - points[0]) / forgotten if forgotten > LITTLE else None


def _relearn(scale: Scale, read: Read) -> Shown:
    records = {
        label: found(read, [scale.run("relearn", of, seed) for seed in scale.seeds]) for label, of in RIVALS.items()
    }
    records = {label: some for label, some in records.items() if some}
    rows, data = [], {}
    for label, some in records.items():
        for by, what in BY.items():
            steps = sorted({p["step"] for p in some[0]["points"] if p["rows"] == by})
            values = {
                step: [p[FORGET] for r in some for p in r["points"] if (p["rows"], p["step"]) == (by, step)]
                for step in steps
            }
            data[f"{label}, {what}"] = values
            back = [_back(record, by, steps[-1]) for record in some]
            rows.append([label, what, *(cell(values[step]) for step in steps), cell(back)])

    def draw(figure: Any) -> None:
        for axes, (_by, what) in zip(figure.subplots(1, 2, sharey=True), BY.items(), strict=True):
            for label in records:
                colour, marker = LOOKS[label]
                values = data[f"{label}, {what}"]
                axes.plot(list(values), [mean(v) for v in values.values()], color=colour, marker=marker, label=label)
                axes.fill_between(
                    list(values), *([f(v) for v in values.values()] for f in (min, max)), color=colour, alpha=0.15
                )
            axes.set(xlabel="steps of relearning", title=f"trained on {what}", ylim=(-0.02, 1.02))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.axes[0].set_ylabel("probability of forget answers not trained on")

    claim = f"Expected (the paper's figures for it are not at hand): less comes back than with NPO, each at its strength nearest to the retrained model with retain ≥ {LEVEL}. "
    if not {"loramox", "NPO"} <= records.keys():
        return Shown(claim + "Not all of it has been run", data, [], None)
    parts = []
    for by, what in BY.items():
        last = max(p["step"] for p in records["NPO"][0]["points"])
        ours, npo = (mean([_back(r, by, last) for r in records[label]]) for label in ("loramox", "NPO"))
        if None in (ours, npo):
            parts.append(f"Nothing to compare on {what}: one of the two has forgotten less than {LITTLE} there.")
            continue
        how = f"after {last} steps on {what}, {ours:.1%} of what was forgotten is back with loramox, {npo:.1%} with NPO"
        parts.append(verdict(ours < npo, how))
    heads = ["", "trained on", *(f"step {step}" for step in data[f"NPO, {BY['retain']}"]), "share back"]
    return Shown(claim + " ".join(parts), data, markdown(heads, rows), draw)


FIGURES = {
    "sensitivity": Table("Sensitivity to α and η", _sensitivity_plan, _sensitivity),
    "trajectory": Table("Utility against forgetting over training", _trajectory_plan, _trajectory),
    "figure1": Table(
        "Figure 1: what ascent and descent do to utility and to the distance from the reference",
        _figure1_plan,
        _figure1,
    ),
    "relearn": Table("Relearning", _relearn_plan, _relearn),
}
