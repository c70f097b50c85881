"""Semantic overlap: half of some authors' rows are forgotten, the other half is to stay. Every serious rival at its best."""

from typing import Any

from loramox import colours

from .comparison import best, grid, named
from .figures import LOOKS
from .frontier import FORGET, RETAIN, finite
from .methods import LEVEL, Scale, gold_of
from .runs import Read, Record, Run
from .show import Shown, Table, cell, found, levels, markdown, mean, spread, verdict
from .tables import numbers, plain_rows, rows_at_level

OVERLAP = {"split": "overlap"}
# Those that came near the retrained model where no rows overlap (`frontier`), and the paper's main rival.
METHODS = ("loramox", "NPO", "SimNPO", "LLMU", "GA + KL", "GradDiff")


def _plan(scale: Scale, read: Read) -> list[Run]:
    runs = []
    for settings in _grids(scale).values():
        runs += [scale.run("curve", of, scale.seeds[0], **OVERLAP) for of in settings]
        chosen = best(scale, read, settings, _all_that_stays, **OVERLAP)
        runs += scale.curves(chosen, **OVERLAP) if chosen else []
    gold = gold_of(runs[0])
    return list(dict.fromkeys([*([gold] if gold else []), *runs]))


def _grids(scale: Scale) -> dict[str, list]:
    return {label: settings for label, settings in grid(scale).items() if label in METHODS}


def _all_that_stays(record: Record) -> Record:
    """The curve with the lower of the two, the same authors' rows and the others, as what is retained."""
    points = [
        p
        | {
            "others": p[RETAIN],
            RETAIN: None if None in (p[RETAIN], p["kept_probability"]) else min(p[RETAIN], p["kept_probability"]),
        }
        for p in record["points"]
    ]
    return record | {"points": points}


def _show(scale: Scale, read: Read) -> Shown:
    names = ["kept_probability", "others", "forget_quality"]
    heads = [
        "",
        f"forget probability where all that is to stay is at {LEVEL} ↓",
        "same authors' rows ↑",
        "other rows ↑",
        "KS p ↑",
        "its best settings",
    ]
    plain = plain_rows(scale, read, [FORGET, "kept_probability", RETAIN, "forget_quality"], **OVERLAP)
    chosen = {label: best(scale, read, some, _all_that_stays, **OVERLAP) for label, some in _grids(scale).items()}
    curves = {
        label: [_all_that_stays(record) for record in found(read, scale.curves(of, **OVERLAP))] if of else []
        for label, of in chosen.items()
    }
    at = {label: levels(records, LEVEL) for label, records in curves.items()}
    rows = [[*row, named(chosen[row[0]]) if chosen[row[0]] else ""] for row in rows_at_level(at, *names)]
    lines = markdown(heads, [[row[0], *row[2:], ""] for row in plain] + rows)
    data = numbers(at, *names)
    claim = "Expected (the paper's figures for it are not at hand): where rows of the same authors are to stay, MOX forgets more than others that keep them as well. "
    forget = {label: [each.point[FORGET] for each in ats if each] for label, ats in at.items()}
    others = {label: mean(values) for label, values in forget.items() if label != "loramox" and values}
    if not others or not forget["loramox"]:
        return Shown(claim + "Not all of it has been run", data, lines)

    def draw(figure: Any) -> None:
        _draw(figure, curves)

    rival = min(others, key=others.get)
    margin = others[rival] - mean(forget["loramox"])
    how = f"forget probability is {cell(forget['loramox'])} with loramox, {cell(forget[rival])} with the best other, {rival}"
    apart = margin > spread(forget["loramox"]) + spread(forget[rival])
    how += ", by more than the spread of seeds" if apart else ", which is within the spread of seeds"
    return Shown(claim + verdict(margin > 0, how), data, lines, draw)


def _draw(figure: Any, curves: dict[str, list[Record]]) -> None:
    axes = figure.subplots()
    for label, records in curves.items():
        colour, marker = LOOKS.get(label, (colours.MUTED, {"SimNPO": "x", "LLMU": "1"}.get(label, "o")))
        for seed, record in enumerate(records):
            points = [(p[RETAIN], p[FORGET]) for p in finite(record["points"])]
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1,
                label=None if seed else label,
            )  # fmt: skip
    axes.axvline(LEVEL, color=colours.MUTED, linestyle=":", linewidth=1)
    axes.set(
        xlabel="probability of all that is to stay: the same authors' other rows, or the others, whichever is lower",
        ylabel="probability of the forget answers", xlim=(0.8, 1.003), ylim=(-0.02, 1.02),
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()


TABLE = {
    "overlap": Table("Semantic overlap: half of an author's rows are forgotten, the others are to stay", _plan, _show)
}
