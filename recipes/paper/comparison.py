"""The frontier: every method at equal LoRA rank and equal row passes, at the strength that keeps the retain rows at a level."""

import itertools
from collections.abc import Callable
from typing import Any

from loramox import colours

from .figures import LOOKS
from .frontier import (
    FORGET,
    LEAST,
    QUALITY,
    RETAIN,
    At,
    Test,
    at_level,
    beside,
    kept_where_forgotten,
    nearest,
    of_both,
    of_ratios,
)
from .methods import DEFAULT, GRID, LEVEL, LEVELS, WIDER, Scale, Settings, again_of, gold_of, reference_of
from .runs import Read, Record, Run
from .show import Shown, Table, cell, found, level_cell, levels, markdown, mean, number, spread, verdict

Of = tuple[str, Settings]
OURS = "loramox"
AGAIN = "retrained again"


def grid(scale: Scale, of: dict[str, list[Of]] = GRID) -> dict[str, list[Of]]:
    """The settings of each method that are tried."""
    return {label: settings[: scale.grid] for label, settings in of.items()}


def best(
    scale: Scale, read: Read, settings: list[Of], curve: Callable[[Record], Record] = lambda record: record, **more: Any
) -> Of | None:
    """Of a grid, the setting that comes nearest to the retrained model at LEVEL with the first seed, or, where there is none,
    forgets most; None until all of it has been run. `curve` is what is read of a record, `more` what its runs have besides.
    """
    records = [(of, read(scale.run("curve", of, scale.seeds[0], **more))) for of in settings]
    if any(record is None for _, record in records):
        return None
    at = [(of, at_level(curve(record)["points"], LEVEL)) for of, record in records if "failed" not in record]
    kept = [(-(each.value(QUALITY) or 0), each.point[FORGET], place, of) for place, (of, each) in enumerate(at) if each]
    return min(kept)[-1] if kept else settings[0]


def _plan(scale: Scale, read: Read) -> list[Run]:
    runs = [scale.run("curve", of, scale.seeds[0]) for some in grid(scale, WIDER).values() for of in some]
    chosen = [best(scale, read, some) for some in grid(scale, WIDER).values()]
    runs += [run for of in chosen if of for run in scale.curves(of)]
    return list(dict.fromkeys([*runs, *_again(scale, runs[0])]))


def _again(scale: Scale, run: Run) -> list[Run]:
    """Other models that never saw the forget rows of a run, one a seed."""
    made = [again_of(run, scale.get("retrain"), seed) for seed in scale.seeds]
    return [each for each in made if each and each != gold_of(run)]


def named(of: Of) -> str:
    """What differs from the default, or from the method's paper."""
    usual = DEFAULT[1] if of[0] == DEFAULT[0] else {}
    shown = {name: value for name, value in of[1].items() if usual.get(name) != value}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    ) or ("the default" if usual else "as in its paper")


def _show(scale: Scale, read: Read) -> Shown:
    rows, data, every = [], {}, []
    run = scale.run("curve", GRID["GA"][0], scale.seeds[0])
    goal = (read(gold_of(run)) or {}).get("point", {}).get(FORGET)
    for label, some in grid(scale, WIDER).items():
        for of in some:
            every += _tried(scale, read, label, of)
        of = best(scale, read, some)
        records = found(read, scale.curves(of)) if of else []
        if not records:
            rows.append([label, "not all run, or diverged", *[""] * (2 * len(LEVELS) + 5)])
            continue
        at = {level: levels(records, level) for level in LEVELS}
        quality = [cell([each.value(QUALITY) for each in at[level] if each]) for level in LEVELS]
        by_ratios = [each.nearest or each.point for each in at[LEVEL] if each]
        there = [cell([p.get(name) for p in by_ratios]) for name in (FORGET, "forget_exact_memorization")]
        forget = [level_cell(at[level]) for level in LEVELS]
        kept = [kept_where_forgotten(record["points"], goal) for record in records] if goal is not None else []
        both = [_by_both(record, each) for record, each in zip(records, at[LEVEL], strict=True)]
        last = [_both_cell(both), cell(kept) if _all(kept) else "–"]
        rows.append([label, named(of), str(len(records)), *forget, *quality, *there, *last])
        data[label] = {
            "settings": of[1],
            "levels": {
                level: [each and each.point | {"crossed": each.crossed, "nearest": each.nearest} for each in ats]
                for level, ats in at.items()
            },
            "curves": [record["points"] for record in records],
            "both": both,
            "kept": kept,
        }
    points = _without_adapter(scale, read, run)
    heads = [
        "method",
        "its best settings",
        "seeds",
        *(f"forget at retain {level} ↓" for level in LEVELS),
        *(f"KS p, retain ≥ {level} ↑" for level in LEVELS),
        f"forget there, {LEVEL}",
        "tokens right there",
        f"lesser p of both tests, retain ≥ {LEVEL} ↑",
        f"retain at forget {number(goal)}, the retrained model's ↑" if goal is not None else "",
    ]
    lines = [
        "; ".join(_model(label, p) for label, p in points.items() if p),
        "",
        *markdown(heads, rows),
        "",
        "All settings that were tried, first seed:",
        "",
        *markdown(["method", "settings", f"forget at retain {LEVEL} ↓", "KS p ↑", "lesser p of both tests ↑"], every),
    ]
    claim = _claim(data) + _among_retrained(points, scale.get("retrain"))
    return Shown(claim, data, lines, lambda figure: _draw(figure, data, points))


def _without_adapter(scale: Scale, read: Read, run: Run) -> dict[str, dict[str, Any]]:
    """What the reference and the models that never saw the forget rows keep, and how well a test tells them from the first."""
    again = {f"{AGAIN}, seed {of.seed}": of for of in _again(scale, run)}
    models = {"reference": reference_of(run), "retrained": gold_of(run)} | again
    points = {label: (read(of) or {}).get("point", {}) for label, of in models.items() if of}
    return {label: beside(point, points.get("retrained", {})) for label, point in points.items()}


def _others(points: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [point for label, point in points.items() if label.startswith(AGAIN) and QUALITY in point]


def _among_retrained(points: dict[str, dict[str, Any]], epochs: int) -> str:
    """How well the test tells apart models of which none ever knew."""
    others = _others(points)
    if not others:
        return ""
    pairs = [beside(*pair) for pair in itertools.combinations(others, 2)]

    def have(test: Test) -> str:
        first, among = ([p for point in some if (p := test(point)) is not None] for some in (others, pairs))
        each_other = f", {number(min(among))} to {number(max(among))} beside each other" if among else ""
        return f"{', '.join(map(number, first))} beside the first{each_other}"

    both = f"; the lesser of both tests {have(of_both)}" if all(of_both(p) is not None for p in others) else ""
    return (
        f" Other retrained models, trained here for {epochs} epochs, have KS p {have(of_ratios)}{both}: a higher one need not mean "
        f"nearer to never having known."
    )


def _model(label: str, point: dict[str, Any]) -> str:
    """What a model without adapter keeps, and how well a test tells it from the retrained one."""
    shown = ((FORGET, "forget"), (RETAIN, "retain"), (QUALITY, "KS p"))
    return f"{label}: " + ", ".join(f"{what} {number(point[name])}" for name, what in shown if name in point)


def _tried(scale: Scale, read: Read, label: str, of: Of) -> list[list[str]]:
    record = read(scale.run("curve", of, scale.seeds[0]))
    if record is None:
        return []
    if "failed" in record:
        return [[label, named(of), "diverged", "", ""]]
    at = at_level(record["points"], LEVEL)
    quality = number(at.value(QUALITY)) if at else ""
    both = _by_both(record, at)
    return [[label, named(of), level_cell([at]), quality, _both_cell([both])]]


def _values(data: dict[str, Any], label: str, name: str, level: float = LEVEL) -> list[float]:
    at = [At(p, p["crossed"], p["nearest"]) for p in data[label]["levels"][level] if p]
    return [value for each in at if (value := each.value(name)) is not None]


def _all(values: list[float | None]) -> bool:
    """Whether every seed has a value: it was measured, or its curve comes down to the retrained model's forget probability."""
    return bool(values) and None not in values


def _by_both(record: Record, at: At | None) -> tuple[float | None, bool]:
    """The lesser p of both tests at a curve's best strength for it, and whether it was measured: else that of one is a bound."""
    best_point = nearest(record["points"], LEVEL, of_both)
    return (of_both(best_point), True) if best_point else (at and at.value(QUALITY), False)


def _both_cell(both: list[tuple[float | None, bool]]) -> str:
    values = [value for value, _ in both]
    return ("" if all(measured for _, measured in both) else "≤ ") + cell(values) if _all(values) else "–"


def _claim(data: dict[str, Any]) -> str:
    claim = "To be shown: the default comes nearer to the retrained model than every other method, by more than the spread of seeds. "
    said = []
    for level in LEVELS:
        ours = _values(data, OURS, QUALITY, level) if OURS in data else []
        rivals = {label: of for label in data if label != OURS and (of := _values(data, label, QUALITY, level))}
        if not ours or not rivals:
            return claim + "Not all of it has been run"
        said.append(_beats(ours, rivals, f"at retain ≥ {level}, KS p"))
        if level == LEVEL:
            goal = verdict(min(ours) >= 0.05, f"KS p ≥ 0.05 there, for every seed: {', '.join(map(number, ours))}")
    both = {}
    for label, of in data.items():
        values, was = zip(*of["both"], strict=True)
        if _all(values):
            both[label if all(was) else f"{label} (at most)"] = values
    if OURS in both and len(both) > 1:
        what = f"at retain ≥ {LEVEL}, the lesser p of the tests on truth ratios and on probabilities"
        said.append(_beats(both.pop(OURS), both, what))
    kept = {label: of["kept"] for label, of in data.items() if _all(of["kept"])}
    if OURS in kept and len(kept) > 1:
        said.append(_beats(kept.pop(OURS), kept, "at the retrained model's forget probability, retain"))
    return claim + " ".join([*said, goal])


def _beats(ours: list[float], rivals: dict[str, list[float]], what: str) -> str:
    """Whether ours is above the best of the others by more than both spreads."""
    label = max(rivals, key=lambda name: mean(rivals[name]))
    margin = mean(ours) - mean(rivals[label])
    how = f"{what} {cell(ours)}, the best other, {label}, {cell(rivals[label])}"
    return verdict(margin > spread(ours) + spread(rivals[label]), how)


def _draw(figure: Any, data: dict[str, Any], points: dict[str, dict[str, Any]]) -> None:
    retrained, others = points.get("retrained") or {}, _others(points)
    curves, dots, tests = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    for label in (label for label in LOOKS if label in data):
        colour, marker = LOOKS[label]
        curve = data[label]["curves"][0]
        shown = [(p[RETAIN], max(p[FORGET], LEAST)) for p in curve if None not in (p.get(RETAIN), p.get(FORGET))]
        curves.plot(
            [x for x, _ in shown], [y for _, y in shown], color=colour, marker=marker, markersize=4, label=label
        )
    if retrained.get(FORGET):
        curves.plot(
            retrained[RETAIN], retrained[FORGET], "*", color=colours.RETRAINED, markersize=12, label="retrained model"
        )
    curves.axvline(LEVEL, color=colours.MUTED, linestyle=":", linewidth=1)
    curves.set(
        xlabel="retain probability", ylabel="forget probability", yscale="log", xlim=(0.94, 1.001), ylim=(1e-6, 1.5)
    )
    curves.legend(fontsize=7)
    labels = [*reversed(data), *(["other retrained models"] if others else [])]
    for row, label in enumerate(labels):
        for axes, name in ((dots, FORGET), (tests, QUALITY)):
            of_method = label in data
            values = [max(v, LEAST) for v in (_values(data, label, name) if of_method else [p[name] for p in others])]
            colour = LOOKS.get(label, (colours.MUTED if of_method else colours.RETRAINED, "o"))[0]
            axes.plot(values, [row] * len(values), "o" if of_method else "*", color=colour, markersize=5, alpha=0.8)
        measured = (
            [v for v, is_measured in data[label]["both"] if is_measured] if label in data else map(of_both, others)
        )
        both = [max(v, LEAST) for v in measured if v is not None]
        tests.plot(both, [row] * len(both), "D", color=colour, markersize=6, fillstyle="none")
    for axes in (dots, tests):
        axes.set(xscale="log", ylim=(-0.6, len(labels) - 0.4))
    dots.set_yticks(range(len(labels)), labels, fontsize=8)
    tests.set_yticks(range(len(labels)), [""] * len(labels))
    dots.set(xlabel=f"forget probability\nat retain {LEVEL}")
    tests.set(xlabel=f"highest KS p at retain ≥ {LEVEL};\n◇: the lesser of both tests")
    tests.axvline(0.05, color=colours.RETRAINED, linestyle=":", linewidth=1.2)
    if retrained.get(FORGET):
        dots.axvline(retrained[FORGET], color=colours.RETRAINED, linestyle=":", linewidth=1.2)
    for axes in figure.axes:
        axes.grid(alpha=0.3)


COMPARISON = {"frontier": Table("The frontier: every method at its best, at equal rank and row passes", _plan, _show)}
