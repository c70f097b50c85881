"""Table 1, the ablation, sizes of the forget set, weights of the retain term: forgetting at what is kept."""

import itertools
from typing import Any

from .frontier import FORGET, RETAIN, At, beside
from .methods import ABLATION, LEVEL, RIVALS, STANDARD, TABLE1, WEIGHED, WITHOUT, Scale, Settings, gold_of, reference_of
from .runs import Read, Run
from .show import (
    HEADS,
    Shown,
    Table,
    at_own,
    cell,
    found,
    level_cell,
    levels,
    markdown,
    mean,
    number,
    spread,
    verdict,
)

Methods = dict[str, tuple[str, Settings]]
BASELINES = ("GA", "GA + KL", "NPO", "task vector")  # those whose numbers for the paper's Table 1 are known here
LITTLE = 1e-3  # of a probability or a KS p: no gain, be the seeds ever so near to each other
NEAR_REFERENCE = 0.98  # share of the reference's retain probability that counts as kept


def plain_rows(scale: Scale, read: Read, heads: list[str], **more: Any) -> list[list[str]]:
    """Lines of the reference and of the retrained model."""
    run = scale.run("curve", TABLE1["GA"], 0, **more)
    gold = gold_of(run)
    knows, never = (((of and read(of)) or {}).get("point", {}) for of in (reference_of(run), gold))
    points = (("reference", beside(knows, never)), ("retrained", beside(never, never)))
    return [[label, "", *(number(point.get(name)) for name in heads)] for label, point in points if point]


def _table1_plan(scale: Scale, read: Read) -> list[Run]:
    runs = [run for of in TABLE1.values() for run in scale.curves(of)]
    return [reference_of(runs[0]), gold_of(runs[0]), *runs]


def _table1(scale: Scale, read: Read) -> Shown:
    heads = [FORGET, RETAIN, "forget_quality", "forget_exact_memorization"]
    if scale.get("new_tokens"):
        heads += ["forget_rouge_l", "retain_rouge_l"]
    rows, data = plain_rows(scale, read, heads), {}
    for label, of in TABLE1.items():
        records = found(read, scale.curves(of))
        points = [at_own(record) for record in records]
        if not points:
            rows.append([label, "", "diverged" if read(scale.curves(of)[0]) else "not run", *[""] * (len(heads) - 1)])
            continue
        data[label] = {name: mean([p.get(name) for p in points]) for name in heads} | {"seeds": len(points)}
        data[label]["at 0.98"] = mean([at and at.point[FORGET] for at in levels(records, LEVEL)])
        strength = f"{records[0]['strength']:g}" if of[0] in ("mox", "task_vector") else ""
        rows.append([label, strength, *(cell([p.get(name) for p in points]) for name in heads)])
    knows = read(reference_of(scale.curves(TABLE1["GA"])[0]))
    lines = markdown(["method", "α", *(HEADS[name] for name in heads)], rows)
    return Shown(_table1_claim(data, knows["point"][RETAIN] if knows else 1.0), data, lines)


def _table1_claim(data: dict[str, Any], known: float) -> str:
    paper = "The paper: MOX has a higher forget quality (0.068) than GA, GA + KL, NPO and the task vector (0.017 at most), and keeps utility."
    rivals = {label: data[label] for label in BASELINES if label in data}
    parts = []
    for label in ("MOX, paper's setting", "loramox"):
        if label not in data or not rivals or data[label]["forget_quality"] is None:
            continue
        own, best = data[label], max(rivals, key=lambda name: rivals[name]["forget_quality"])
        kept = own[RETAIN] >= NEAR_REFERENCE * known
        how = (
            f"{label} has KS p {number(own['forget_quality'])} at retain {number(own[RETAIN])} (reference {number(known)}), the best of "
            f"these rivals, {best}, {number(rivals[best]['forget_quality'])} at retain {number(rivals[best][RETAIN])}"
        )
        parts.append(verdict(kept and own["forget_quality"] > rivals[best]["forget_quality"], how))
    return " ".join([paper, *(parts or ["Not all of it has been run"])])


def _at_level(scale: Scale, read: Read, methods: Methods, **more: Any) -> dict[str, list[At | None]]:
    """Of each method, what every seed's curve reads at LEVEL."""
    return {label: levels(found(read, scale.curves(of, **more)), LEVEL) for label, of in methods.items()}


def rows_at_level(at: dict[str, list[At | None]], *names: str) -> list[list[str]]:
    return [
        [
            label,
            level_cell(ats) if ats else "not run, or diverged",
            *(cell([each.value(name) for each in ats if each]) for name in names),
        ]
        for label, ats in at.items()
    ]


def numbers(at: dict[str, list[At | None]], *names: str) -> dict[str, Any]:
    return {
        label: {name: [each and each.value(name) for each in ats] for name in (FORGET, RETAIN, "strength", *names)}
        for label, ats in at.items()
    }


def _ablation_plan(scale: Scale, read: Read) -> list[Run]:
    return [run for of in (ABLATION | WITHOUT).values() for run in scale.curves(of)]


def _ablation(scale: Scale, read: Read) -> Shown:
    at = _at_level(scale, read, ABLATION | WITHOUT)
    names = ("forget_quality", "strength")
    heads = ["", f"forget probability at retain {LEVEL} ↓", "KS p ↑", "α there"]
    claim = "The paper: momentum adds to forget quality and utility (0.0625 → 0.0680, 0.6504 → 0.6528); each part is to earn its place. "
    steps = []
    run = [label for label, ats in at.items() if ats and None not in ats]
    pairs = list(itertools.pairwise(label for label in ABLATION if label in run))
    default = list(ABLATION)[-1]
    pairs += [(label, default) for label in WITHOUT if {label, default} <= set(run)]
    for before, after in pairs:
        gains, how = [], []
        for name, what, better in ((FORGET, "forget probability", -1), ("forget_quality", "KS p", 1)):
            old, new = ([each.value(name) for each in at[label]] for label in (before, after))
            if None not in (*old, *new):
                gains.append(better * (mean(new) - mean(old)) > max(spread(old) + spread(new), LITTLE))
                how.append(f"the {what} from {number(mean(old))} to {number(mean(new))}")
        steps.append(verdict(any(gains), f"from '{before}' to '{after}', {' and '.join(how)}"))
    return Shown(claim + " ".join(steps), numbers(at, "forget_quality"), markdown(heads, rows_at_level(at, *names)))


def _sized(scale: Scale, size: int) -> dict[str, Any]:
    """The split of so many forget rows, 0 being all, and the epochs that give it as many passes, up to 60 of them."""
    if not size:
        return {}
    epochs, passes = scale.get("epochs"), 100 * STANDARD["epochs"]
    return {
        "split": f"first-{size}",
        "epochs": min(60, max(epochs, passes // size)) if epochs == STANDARD["epochs"] else epochs,
    }


def _sizes_plan(scale: Scale, read: Read) -> list[Run]:
    runs = [run for size in scale.sizes for of in RIVALS.values() for run in scale.curves(of, **_sized(scale, size))]
    return [*(gold for gold in dict.fromkeys(map(gold_of, runs)) if gold), *runs]


def _sizes(scale: Scale, read: Read) -> Shown:
    rows, data, ours = [], {}, []
    for size in scale.sizes:
        more = _sized(scale, size)
        label = f"{size} rows" if size else "all rows"
        rows += [[label, row[0], *row[2:]] for row in plain_rows(scale, read, [FORGET, "forget_quality"], **more)]
        at = _at_level(scale, read, RIVALS, **more)
        rows += [[label, *row] for row in rows_at_level(at, "forget_quality")]
        data[label] = numbers(at, "forget_quality")
        ours.append(mean([each.point[FORGET] for each in at["loramox"] if each]))
    known = [value for value in ours if value is not None]
    how = f"loramox's forget probability at retain {LEVEL} is {', '.join(map(number, ours))} for these sizes, smallest first"
    claim = "Expected (the paper's figures for sizes are not at hand): the more rows, the more forgetting costs. "
    lines = markdown(["forget rows", "", f"forget probability at retain {LEVEL} ↓", "KS p ↑"], rows)
    return Shown(claim + verdict(known == sorted(known) and len(known) == len(ours), how), data, lines)


def _weights_plan(scale: Scale, read: Read) -> list[Run]:
    return [scale.run("curve", of(w), scale.seeds[0]) for of in WEIGHED.values() for w in scale.weights]


def _weights(scale: Scale, read: Read) -> Shown:
    rows, data = [], {}
    for label, of in WEIGHED.items():
        for weight in scale.weights:
            for record in found(read, [scale.run("curve", of(weight), scale.seeds[0])]):
                point = data.setdefault(label, {})[f"{weight:g}"] = at_own(record)
                rows.append([label, f"{weight:g}", *(number(point.get(n)) for n in (FORGET, RETAIN, "forget_quality"))])
    widths = {
        label: max(p[RETAIN] or 0.0 for p in points.values()) - min(p[RETAIN] or 0.0 for p in points.values())
        for label, points in data.items()
        if len(points) == len(scale.weights)
    }
    claim = "Expected (the paper's figures for it are not at hand): as the retain term's weight changes, what MOX ships keeps its retain rows more steadily than the others. "
    lines = markdown(
        ["as shipped", "weight of the retain term", *(HEADS[n] for n in (FORGET, RETAIN, "forget_quality"))], rows
    )
    if len(widths) < len(WEIGHED):
        return Shown(claim + "Not all of it has been run", data, lines)
    how = "retain probability varies by " + ", ".join(f"{number(width)} ({label})" for label, width in widths.items())
    return Shown(claim + verdict(min(widths, key=widths.get) == "loramox", how), data, lines)


TABLES = {
    "table1": Table("Table 1: all methods, each as its paper has it", _table1_plan, _table1),
    "ablation": Table("Ablation: each line adds to the one above", _ablation_plan, _ablation),
    "sizes": Table("Forget sets of 1, 5 and 10 %", _sizes_plan, _sizes),
    "weights": Table("Stability under the weight of the retain term", _weights_plan, _weights),
}
