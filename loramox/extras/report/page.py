"""The page and its summary: read the run, draw the pictures, write both."""

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from loramox.extras.report import facts
from loramox.extras.report.answers import fit, no_answers, quoted_rows
from loramox.extras.report.glossary import GLOSSARY, linked
from loramox.extras.report.pictures import attack_picture, frontier_pictures, spread_picture, training_pictures
from loramox.extras.report.read import FORGET, REFERENCE, RETRAINED, Inputs, Missing, number, read_inputs
from loramox.extras.report.verdict import ATTACKED, THRESHOLDS, Verdict, asked_rows, verdict
from loramox.files import replacing

PAGE, SUMMARY = "report.html", "summary.md"

# What no figure can show. On every page, whatever the figures are.
NOT_PROVEN = (
    "An adapter that can be switched off is suppression, not erasure: the base model under it still knows every row, and "
    "whoever has the base model's weights has that knowledge.",
    "Merging the adapter changes the weights, and that is still no proof that the knowledge is gone: it may come back by training "
    "on related text, or by prompts that were not tried.",
    "Probabilities and answers are of these rows, in these words. Other wordings, other languages, and what follows from a row "
    "were not tested unless they are listed under attacks; attacks that are not listed were not tried.",
    "Forget quality is a p-value: above 0.05 the test saw no difference on this number of rows. With few rows it sees little.",
    "A membership AUC near 0.5 holds for this test alone, and only as far as the holdout rows are like the forget rows.",
    "Retain rows that were kept say nothing about abilities that they do not touch.",
    "How far the adapter goes was chosen on the same rows that the figures are of, so they flatter it a little.",
    "A mean hides single rows: the distributions and the best remembered rows show what it hides.",
)


def report(folder: str | Path) -> dict[str, Any]:
    """Write report.html and summary.md into a run's folder; return the paths, the verdict, and what is missing.

    Raises `RunError` when the folder is no run, and when a file in it is damaged or not finished.
    """
    folder = Path(folder)
    inputs = read_inputs(folder)
    found = verdict(inputs)
    texts = {PAGE: render(inputs, found), SUMMARY: summary(inputs, found)}
    for name, text in texts.items():
        with replacing(folder / name, private=True) as partial:  # the page quotes rows
            partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return {
        "page": folder / PAGE,
        "summary": folder / SUMMARY,
        "verdict": found.line,
        "attacked": found.parts.get(ATTACKED),
        "missing": [m.what for m in inputs.missing.values()],
    }


def render(inputs: Inputs, found: Verdict) -> str:
    """The page. Everything that comes from files is escaped; only our own pictures are not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            value if isinstance(value, Markup) else fit(value, 100_000_000)["text"] if isinstance(value, str) else value
        ),
    )
    environment.filters |= {
        "svg": lambda p: Markup(p.svg),
        "shown": facts.shown,
        "fit": fit,
        "whole": _whole,
        "flags": _flags,
        "terms": linked,
    }
    most, rest = facts.settings(inputs)
    page = environment.get_template("page.html.j2").render(
        i=inputs,
        name=inputs.folder.resolve().name,
        verdict=found,
        thresholds=THRESHOLDS,
        asked_rows=asked_rows(inputs),
        glossary=GLOSSARY,
        models=(REFERENCE, FORGET, RETRAINED),
        metrics=facts.metric_rows(inputs),
        frontier=frontier_pictures(inputs) if inputs.frontier else [],
        points=facts.points(inputs),
        choices=facts.choices(inputs) if inputs.frontier else [],
        spreads=[p for part in facts.PARTS if (p := spread_picture(inputs, part))],
        spread_rows=facts.spread_rows(inputs),
        watched=bool(facts.trajectory(inputs)),
        training=training_pictures(inputs),
        answers={part: quoted_rows(inputs, part) for part in facts.PARTS},
        no_answers=no_answers(inputs),
        attacks=facts.attack_rows(inputs),
        attacked=((inputs.attacks or {}).get("adapter") or {}).get("folder", ""),
        attack_picture=attack_picture(inputs),
        main=most,
        rest=rest,
        sources=_sources(inputs),
        facts=_provenance(inputs),
        commands=_commands(inputs),
        not_proven=NOT_PROVEN,
        not_watched=Missing(
            "No rows were scored while training, so there is no curve of probabilities. To have one, train with "
            "--eval_strategy epoch (the default) and without --logging_strategy no."
        ),
    )
    return page.rstrip() + "\n"


def _whole(text: str) -> str:
    """With "alpha = 8" and "98.7 %" on one line each."""
    return text.replace(" = ", "\u00a0=\u00a0").replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def _flags(text: str) -> Markup:
    """Escaped, and with the flags of commands kept on one line each."""
    return Markup(re.sub(r"(?<![\w-])(--\w+)", r"<code>\1</code>", str(escape(fit(text, 100_000)["text"]))))


def _sources(inputs: Inputs) -> list[tuple[str, str, str, str, str]]:
    """Who read it, part, source, rows, fingerprint."""
    held = [("training", inputs.run["data"]), ("sweep", (inputs.frontier or {}).get("data", {}))]
    held.append(("attacks", (inputs.attacks or {}).get("data") or {}))
    return [
        (
            who,
            part,
            str(d.get("source", "–")),
            f"{number(d.get('rows')):,.0f}".replace("nan", "–"),
            str(d.get("sha256", "–"))[:16],
        )
        for who, data in held
        for part, d in data.items()
    ]


def _provenance(inputs: Inputs) -> list[tuple[str, str]]:
    run, base = inputs.run, inputs.run["base"]
    timings, memory = run.get("timings") or {}, run.get("memory") or {}
    found = [(f"base {key}", str(value)) for key, value in base.items() if value is not None]
    if (seconds := number(timings.get("train_seconds"))) > 0:
        found.append(("training", f"{seconds:,.0f} s"))
    if (peak := number(memory.get("peak_bytes"))) > 0:
        found.append(("peak memory", f"{peak / 1e9:,.2f} GB"))
    if inputs.shipped is not None:
        found.append(("shipped adapter", f"{inputs.unit} = {inputs.shipped:g}"))
    if retrained := (inputs.frontier or {}).get("retrained"):
        found.append(("retrained model's records", str(retrained)))
    versions = run.get("versions") or {}
    return [*found, ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]


def _commands(inputs: Inputs) -> list[str]:
    records = (inputs.run, inputs.frontier or {}, inputs.attacks or {})
    return [str(record["command"]) for record in records if record.get("command")]


def summary(inputs: Inputs, found: Verdict) -> str:
    """The same in short, as Markdown for a pull request. No row is quoted in it."""
    lines = [f"## What {_md(inputs.folder.resolve().name)} forgot", "", f"**{_md(found.headline)}**", ""]
    lines += [*(f"- **{name}** {_md(says)}" for name, says in found.parts.items()), ""]
    lines += [f"> **Warning:** {_md(warning)}\n" for warning in found.warnings]
    if metrics := facts.metric_rows(inputs):
        lines += _table(["metric", REFERENCE, f"{FORGET}, {inputs.unit} = {inputs.at:g}", RETRAINED, "better"], metrics)
    if inputs.frontier:
        rows = [
            [c["rule"] + (" (used)" if c["used"] else ""), c["at"], c["interval"], c["reason"]]
            for c in facts.choices(inputs)
        ]
        lines += _table(["rule", inputs.unit, "5 % to 95 % over rows", "why"], rows)
    if attacked := facts.attack_rows(inputs):
        parts = ("forget", "retain", "reference")
        rows = [[r["attack"], r["label"], *(facts.shown(r[part]) for part in parts)] for r in attacked]
        lines += [f"Attacks on the forget model; forget rows here are {asked_rows(inputs)}:", ""]
        head = ["probability, forget", "probability, retain", "reference in the same state: forget"]
        lines += _table(["attack", "state", *head], rows)
    lines += [f"- Missing: {_md(m.what)}" for m in inputs.missing.values()]
    lines += [
        "",
        f"What this does not prove: {_md(NOT_PROVEN[0])} {_md(NOT_PROVEN[1])}",
        "",
        f"Pictures and answers: {PAGE}.",
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(_md(cell) for cell in cells)} |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows), ""]


def _md(text: str) -> str:
    """One line that Markdown takes for text."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(fit(text)["text"].split()))
