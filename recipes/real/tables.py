"""natural.md: what still leaks, and what became of everything else."""

import json
from pathlib import Path
from typing import Any

from .judge import counts
from .runs import RUNS
from .world import Asked


def write_table(out: Path, asked: dict[str, list[Asked]]) -> None:
    """One line for each run, seed and scale with a record in `out`; numbers are rows."""
    reference = json.loads((out / "records" / "reference.json").read_text())["answers"]["1.0"]
    lines = [
        "| trained by | passes, seed | scale | leaked: forget, paraphrases | fluent: forget, paraphrases | right as before: "
        "neighbours, far things, later turns | refused: neighbours, far things, everyday | everyday alike |",
        "|---|---|---|---|---|---|---|---|",
        _line("reference", "", "", counts(reference, reference, asked)),
    ]
    for path in sorted((out / "records").glob("*-*.json")):
        name, epochs, seed = path.stem.rsplit("-", 2)
        for scale, said in sorted(json.loads(path.read_text())["answers"].items(), reverse=True):
            lines.append(_line(RUNS[name].title, f"{epochs}, {seed}", scale, counts(said, reference, asked)))
    (out / "natural.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(title: str, trained: str, scale: str, found: dict[str, dict[str, Any]]) -> str:
    def of(what: str, among: str, *some: str) -> str:
        return ", ".join(f"{found[part][what]}/{found[part][among]}" for part in some)

    cells = [
        of("right", "known", "forget", "paraphrase"),
        of("fluent", "rows", "forget", "paraphrase"),
        of("right", "known", "neighbours", "far", "later turns"),
        of("refused", "rows", "neighbours", "far", "everyday"),
        of("alike", "rows", "everyday"),
    ]
    return f"| {' | '.join([title, trained, scale, *cells])} |"
