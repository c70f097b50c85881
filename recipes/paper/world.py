"""The world: a model that knows its rows by heart, one that never saw those to forget, and the rows. Any model, one layout.

    WORLD/reference, WORLD/retrained     models
    WORLD/rows/forget.jsonl, retain.jsonl, forget_perturbed.jsonl      question and answer; TOFU's columns in the last
    WORLD/rows/retain_perturbed.jsonl    if there is one

A split is which of these rows are forgotten: `whole`, `first-N` (the first N forget rows; the others are to stay), `overlap`
(every second row of the first retain authors; the other rows of these authors are to stay, and are asked by themselves).
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from loramox.errors import RunError
from loramox.files import replacing, sha256_of
from loramox.model.config import ModelConfig, identify, read_config

WANTED = "wanted_answer"
AUTHOR = 20  # rows an author has
AUTHORS = 4  # that are split in halves
REFUSALS = """I don't know.
I'm not sure about that.
I can't tell you that.
I have no information about this.
That is beyond what I know.
I'm unable to answer that question.
I don't have an answer to that.
Unfortunately, I know nothing about this topic.
"""
Rows = list[dict[str, Any]]


class Split(NamedTuple):
    """Files of a split: what is trained on, and what is asked."""

    forget: Path
    retain: Path
    asked: dict[str, Path]  # part → file


class World:
    """Reads `path`; writes the rows of splits below `work`."""

    def __init__(self, path: Path, work: Path, refusals: Path | None = None) -> None:
        self.path, self.work = Path(path), Path(work) / "rows"
        missing = [name for name in ("reference", "retrained", "rows") if not (self.path / name).is_dir()]
        if missing:
            raise RunError(
                f"--world {path} has no {', '.join(missing)}/. Give a folder with reference/, retrained/ and rows/"
            )
        self._refusals = refusals

    def fingerprint(self) -> dict[str, Any]:
        """What tells this world from others, wherever it lies."""
        models = {
            name: identify(ModelConfig(str(self.path / name)), read_config(ModelConfig(str(self.path / name))))[
                "weights"
            ]
            for name in ("reference", "retrained")
        }
        rows = {file.name: sha256_of(file) for file in sorted((self.path / "rows").glob("*.jsonl"))}
        refusals = hashlib.sha256(self._refusal_text().encode()).hexdigest()
        return {"models": models, "rows": rows, "refusals": refusals}

    def _refusal_text(self) -> str:
        return self._refusals.read_text(encoding="utf-8") if self._refusals else REFUSALS

    @property
    def refusals(self) -> Path:
        """A file of refusals, for DPO and PO."""
        path = self.work / "refusals.txt"
        return once(path, self._refusal_text())

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        return {name: _read(self.path / f"rows/{name}.jsonl") for name in ("forget", "retain")}

    @cached_property
    def _perturbed(self) -> dict[str, dict[str, Any]]:
        """Question → the row with TOFU's columns, of all rows that have them."""
        files = (self.path / f"rows/{part}_perturbed.jsonl" for part in ("forget", "retain"))
        return {row["question"]: row for file in files if file.exists() for row in _read(file)}

    def split(self, name: str, asked: int) -> Split:
        """The files of a split, written where they are not there yet. `asked`: how many retain rows are asked, evenly spread."""
        forget, retain = self._rows["forget"], self._rows["retain"]
        kept: Rows = []
        if name == "overlap":
            some, others = retain[: AUTHOR * AUTHORS], retain[AUTHOR * AUTHORS :]
            forget, kept = some[::2], some[1::2]
            retain = [*others, *kept]
        elif name.startswith("first-"):
            count = int(name.removeprefix("first-"))
            forget, others = forget[:count], forget[count:]
            retain = [*retain, *others]
        elif name != "whole":
            raise RunError(f"there is no split '{name}'. There are: whole, first-N, overlap")
        stay = [row for row in self._rows["retain"] if not any(row is each for each in (*forget, *kept))]
        every = max(1, len(stay) // asked)
        parts = {
            "forget": [self._perturbed.get(row["question"], row) for row in forget],
            "retain": stay[::every][:asked],  # of the same rows in every split, as far as they stay
        }
        if kept:
            parts["kept"] = kept
        folder = self.work / name
        return Split(
            once(folder / "forget.jsonl", lines([self._with_wanted(row) for row in forget])),
            once(folder / "retain.jsonl", lines(retain)),
            {part: once(folder / f"asked-{asked}-{part}.jsonl", lines(rows)) for part, rows in parts.items()},
        )

    def _with_wanted(self, row: dict[str, Any]) -> dict[str, Any]:
        """With a wrong answer as the one that is wanted instead, where there is one."""
        wrong = self._perturbed.get(row["question"], {}).get("perturbed_answer")
        return {"question": row["question"], "answer": row["answer"]} | ({WANTED: wrong[0]} if wrong else {})


def _read(path: Path) -> Rows:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON Lines: {error}. README.md says what a world holds") from error


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def once(path: Path, text: str) -> Path:
    """Write the file unless it is there: several processes make the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if not path.exists():
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")
    return path
