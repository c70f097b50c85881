"""The page, its summary and its facts as JSON: read the run, draw the pictures, write all three."""

import math
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from loramox.errors import RunError
from loramox.extras.report import facts
from loramox.extras.report.answers import fit, no_answers, quoted_rows
from loramox.extras.report.glossary import GLOSSARY, linked
from loramox.extras.report.pictures import (
    frontier_picture,
    recovery_picture,
    relearning_picture,
    sampling_picture,
    spread_picture,
    training_picture,
)
from loramox.extras.report.read import FORGET, REFERENCE, RETRAINED, Inputs, Missing, number, read_inputs
from loramox.extras.report.recovery import asked_rows, families, in_words
from loramox.extras.report.verdict import ATTACKED, DETAILS, THRESHOLDS, Verdict, request, verdict
from loramox.files import as_json, disk_may_fill, locked, replacing
from loramox.run import is_of_report

PAGE, SUMMARY, FACTS = "report.html", "summary.md", "report.json"

# What no figure can show. On every page, whatever the figures are.
NOT_PROVEN = (
    "An adapter that can be switched off is suppression, not erasure: the base model under it still knows every row, and "
    "whoever has the base model's weights has that knowledge.",
    "Merging the adapter changes the weights, and that is still no proof that the knowledge is gone: it may come back by training "
    "on related text, or by prompts that were not tried.",
    "Probabilities and answers are of these rows, in these words. Other wordings, other languages and what follows from a row "
    "were tested only as far as they are listed under attacks.",
    "Forget quality is a p-value: above 0.05 the test saw no difference on this number of rows. With few rows it sees little.",
    "A membership AUC near 0.5 holds for this test alone, and only as far as the holdout rows are like the forget rows.",
    "How far the adapter goes was chosen on these same rows, so the figures flatter it a little.",
    "A mean hides single rows: the distributions and the best remembered rows show what it hides.",
)


def report(folder: str | Path) -> dict[str, Any]:
    """Write report.html, summary.md and report.json into a run's folder; return the paths, the verdict, and what is missing.

    Raises `RunError` for a folder that is no run, a file of these names that is no report's, and a damaged or unfinished one.
    """
    folder = Path(folder)
    for path in (folder / PAGE, folder / SUMMARY, folder / FACTS):
        # A link is no loss: what it leads to stays.
        if path.exists() and not path.is_symlink() and not is_of_report(path):
            raise RunError(
                f"{path} is not of loramox, and the report would replace it. Move it, and make the report again"
            )
    inputs = read_inputs(folder)
    found = verdict(inputs)
    texts = {
        PAGE: render(inputs, found),
        SUMMARY: summary(inputs, found),
        FACTS: as_json(record(inputs, found), indent=2) + "\n",
    }
    with locked(folder), disk_may_fill(f"Free some space on the disk of {folder}, and make the report again"):
        for name, text in texts.items():
            with replacing(folder / name, private=True) as partial:  # the page quotes rows
                partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return {
        "page": folder / PAGE,
        "summary": folder / SUMMARY,
        "facts": folder / FACTS,
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
    page = environment.get_template("page.html.j2").render(
        i=inputs,
        name=inputs.folder.resolve().name,
        verdict=found,
        details=DETAILS,
        recovery=recovery_picture(inputs),
        curves=[p for draw in (sampling_picture, relearning_picture) if (p := draw(inputs))],
        thresholds=THRESHOLDS,
        asked_rows=asked_rows(inputs),
        glossary=GLOSSARY,
        models=(REFERENCE, FORGET, RETRAINED),
        metrics=facts.metric_rows(inputs),
        frontier=frontier_picture(inputs) if inputs.frontier else None,
        choices=facts.choices(inputs),
        spreads=[p for part in facts.PARTS if (p := spread_picture(inputs, part))],
        training=training_picture(inputs),
        answers={part: quoted_rows(inputs, part) for part in facts.PARTS},
        no_answers=no_answers(inputs),
        families=families(inputs),
        recovered=_recovered(inputs),
        attacked=(inputs.attacks.get("adapter") or {}).get("folder", ""),
        settings=facts.settings(inputs),
        sources=_sources(inputs),
        facts=_provenance(inputs),
        not_proven=NOT_PROVEN,
        not_watched=Missing(
            "No rows were scored while training: it needs --eval_strategy and --logging_strategy other than no."
        ),
    )
    return page.rstrip() + "\n"


def _recovered(inputs: Inputs) -> tuple[list[str], list[list[str]]] | None:
    """A line for each family of attacks; a value in brackets is one before any attack."""

    def cell(value: float, attacked: bool) -> str:
        return facts.shown(value) if attacked or math.isnan(value) else f"({facts.shown(value)})"

    models = (REFERENCE, FORGET, inputs.control)
    head = ["attacks", "worst state", "measure", REFERENCE, FORGET, f"control: {inputs.control or 'none'}"]
    rows = [
        [f.title, f.where or "–", in_words(f.measure), *(cell(*f.value(m)) for m in models)] for f in families(inputs)
    ]
    return (head, rows) if rows else None


def record(inputs: Inputs, found: Verdict) -> dict[str, Any]:
    """The same facts for programs. No row is quoted."""
    models = (REFERENCE, FORGET, inputs.control or RETRAINED)
    return {
        "request": request(inputs),
        "headline": found.headline,
        "answers": found.parts,
        "warnings": found.warnings,
        "shown": {inputs.unit: inputs.at},
        "metrics": facts.metrics(inputs),
        "attacks": [
            {"family": f.name, "attack": f.worst[0], "state": f.worst[1], "measure": f.measure}
            | {"values": {m: f.value(m)[0] for m in models}, "not_attacked": [m for m in models if not f.value(m)[1]]}
            for f in families(inputs)
        ],
        "control": inputs.control or None,
        "leak_at_k": facts.leak_curves(inputs),
        "steps_saved": inputs.attacks.get("steps_saved") or {},
        "not_tested": found.not_tested,
        "missing": {part: missing.command for part, missing in inputs.missing.items()},
    }


def _whole(text: str) -> str:
    """With "alpha = 8" and "98.7 %" on one line each."""
    return text.replace(" = ", "\u00a0=\u00a0").replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def _flags(text: str) -> Markup:
    """Escaped, and with the flags of commands kept on one line each."""
    return Markup(re.sub(r"(?<![\w-])(--\w+)", r"<code>\1</code>", str(escape(fit(text, 100_000)["text"]))))


def _sources(inputs: Inputs) -> list[tuple[str, ...]]:
    held = {
        "training": inputs.run["data"],
        "sweep": inputs.frontier.get("data", {}),
        "attacks": inputs.attacks.get("data") or {},
    }
    columns = {"source": None, "rows": 16, "sha256": 16}
    return [
        (who, part, *(str(d.get(name, "–"))[:most] for name, most in columns.items()))
        for who, data in held.items()
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
    if retrained := inputs.frontier.get("retrained"):
        found.append(("retrained model's records", str(retrained)))
    versions = run.get("versions") or {}
    return [*found, ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]


def summary(inputs: Inputs, found: Verdict) -> str:
    """The same in short, as Markdown for a pull request. No row is quoted in it."""
    lines = [f"## What {_md(inputs.folder.resolve().name)} forgot", "", f"**{_md(found.headline)}**", ""]
    lines += [*(f"- **{name}** {_md(says)}" for name, says in found.parts.items()), ""]
    lines += [f"> **Warning:** {_md(warning)}\n" for warning in found.warnings]
    if metrics := facts.metric_rows(inputs):
        lines += _table(["metric", REFERENCE, f"{FORGET}, {inputs.unit} = {inputs.at:g}", RETRAINED, "better"], metrics)
    if recovered := _recovered(inputs):
        lines += [f"Attacks, the worst state of each family; forget rows here are {asked_rows(inputs)}:", ""]
        lines += _table(*recovered)
    lines += [f"- Not tested: {_md(each)}" for each in found.not_tested]
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
