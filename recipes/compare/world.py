"""The world: a model that knows all rows by heart, one that never saw the forget rows, and the rows.

    WORLD/reference, WORLD/retrained                          models
    WORLD/rows/forget.jsonl, retain.jsonl                     question and answer, 20 rows an author
    WORLD/rows/forget_perturbed.jsonl                         the forget rows with TOFU's paraphrased and wrong answers

Retain rows of every second author (0, 2, 4, …) are GIVEN to the retain term; those of the others are NEVER given. Two splits:

    whole      all forget rows are forgotten
    overlap    every second row of the first four retain authors is forgotten; their other rows, `kept`, are among the given rows
               and are scored separately
"""

from pathlib import Path
from typing import Any, NamedTuple

from loramox.data.row import Row
from loramox.data.rows import read_rows
from loramox.errors import RunError
from loramox.files import sha256_of
from loramox.model.config import ModelConfig, identify, read_config

AUTHOR = 20  # rows of an author
AUTHORS = 4  # whose rows are split in halves


class Split(NamedTuple):
    """Rows to train on, as lines of JSON, and rows to score by part: forget, given, never and, with overlap, kept."""

    forget: list[str]
    given: list[str]
    scored: dict[str, list[Row]]


class World:
    """Reads the folder `path`.

    Args:
        forget: forget rows to use, the first ones; None: all.
        scored: given and never-given rows to score, of each, spread evenly.
    """

    def __init__(self, path: Path, forget: int | None = None, scored: int = 150) -> None:
        self.path, self.forget, self.scored = Path(path), forget, scored
        missing = [name for name in ("reference", "retrained", "rows") if not (self.path / name).is_dir()]
        if missing:
            raise RunError(
                f"--world {path} has no {', '.join(missing)}/. Give a folder with reference/, retrained/ and rows/"
            )
        self.lines, self.rows = {}, {}
        for name in ("forget", "retain", "forget_perturbed"):
            file = self.path / f"rows/{name}.jsonl"
            self.rows[name] = read_rows(str(file))
            self.lines[name] = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if [row.key() for row in self.rows["forget"]] != [row.key() for row in self.rows["forget_perturbed"]]:
            raise RunError(
                f"{self.path}/rows: forget_perturbed.jsonl must have the rows of forget.jsonl in the same order"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What distinguishes this world and the rows used of it from others, wherever it is."""
        models = {}
        for name in ("reference", "retrained"):
            config = ModelConfig(str(self.path / name))
            models[name] = identify(config, read_config(config))["weights"]
        rows = {name: sha256_of(self.path / f"rows/{name}.jsonl") for name in self.rows}
        return {"models": models, "rows": rows, "forget": self.forget, "scored": self.scored}

    def split(self, name: str) -> Split:
        """The rows of a split."""
        retain = range(len(self.rows["retain"]))
        kept: list[int] = []
        forget = self.lines["forget"][: self.forget]
        scored = {"forget": self.rows["forget_perturbed"][: self.forget]}
        if name == "overlap":
            halves, retain = retain[: AUTHOR * AUTHORS], retain[AUTHOR * AUTHORS :]
            kept = list(halves[1::2])
            forget = [self.lines["retain"][i] for i in halves[::2]]
            scored = {part: self._retain(rows) for part, rows in (("forget", halves[::2]), ("kept", kept))}
        given, never = ([i for i in retain if i // AUTHOR % 2 == odd] for odd in (0, 1))
        scored |= {part: self._retain(spread(rows, self.scored)) for part, rows in (("given", given), ("never", never))}
        return Split(forget, [self.lines["retain"][i] for i in [*kept, *given]], scored)

    def _retain(self, rows: Any) -> list[Row]:
        return [self.rows["retain"][i] for i in rows]


def spread(rows: list[int], count: int) -> list[int]:
    """`count` of the rows at even distances, the first one included; all of them where there are fewer."""
    return rows[:: max(1, len(rows) // count)][:count]
