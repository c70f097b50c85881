"""How many rows of a source were read, how many are used, and why the others are not."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramox.data.rows import Row
from loramox.errors import escaped

OVERLAP = "also in the forget set"
LONG = "too long"
SHORT = "without a token to predict"  # plain text of one token, in which nothing comes after anything


@dataclass(frozen=True)
class RowCount:
    """The rows of one source: those read are those used and those left out.

    Attributes:
        source: file or hub data set.
        read: rows in it.
        left_out: reason → rows that are not used because of it.
        answers: right answers of its rows; as many as rows, unless some have several.
        repeated: rows whose question another row answers differently.
    """

    source: str
    read: int
    left_out: Mapping[str, int]
    answers: int
    repeated: int

    @property
    def used(self) -> int:
        return self.read - sum(self.left_out.values())

    def record(self) -> dict[str, Any]:
        counted: dict[str, Any] = {"read": self.read, "used": self.used, "left_out": dict(self.left_out)}
        if self.answers > self.read:
            counted["answers"] = self.answers
        return counted | ({"repeated_questions": self.repeated} if self.repeated else {})

    def line(self, part: str) -> str:
        """One line for the terminal."""
        left_out = ", ".join(f"{rows} {reason}" for reason, rows in self.left_out.items())
        used = f"{self.used} used, left out: {left_out}" if left_out else "all used"
        several = f" with {self.answers} answers" if self.answers > self.read else ""
        repeated = (
            f". {self.repeated} of them ask a question that another row answers differently, and each is used as it is"
            if self.repeated
            else ""
        )
        return escaped(f"{part}: {self.read} rows{several} read from {self.source}, {used}{repeated}")


def count_rows(read: Sequence[Row], kept: Sequence[Row], examples: Iterable[dict[str, Any]]) -> RowCount:
    """Count what became of the rows of one source.

    Args:
        read: all its rows (at least one).
        kept: those that are in no other part (`keep_disjoint`).
        examples: what `encode` made of `kept`.
    """
    encoded = {example["row"] for example in examples}
    lost = [row for row in kept if f"{row.source}, row {row.number}" not in encoded]
    short = sum(row.prompt is None for row in lost)
    left_out = {OVERLAP: len(read) - len(kept), LONG: len(lost) - short, SHORT: short}
    return RowCount(
        read[0].source,
        len(read),
        {reason: rows for reason, rows in left_out.items() if rows},
        sum(len(row.right_answers) for row in read),
        _repeated(read),
    )


def _repeated(rows: Sequence[Row]) -> int:
    """How many rows ask a question that another of them answers differently."""
    keys = [row.key() for row in rows if row.prompt]
    answers = Counter(key.rpartition("\x1f")[0] for key in set(keys))
    return sum(answers[key.rpartition("\x1f")[0]] > 1 for key in keys)
