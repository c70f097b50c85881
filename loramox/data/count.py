"""How many rows of a source were read, how many are used, and why the others are not."""

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
    """

    source: str
    read: int
    left_out: Mapping[str, int]

    @property
    def used(self) -> int:
        return self.read - sum(self.left_out.values())

    def record(self) -> dict[str, Any]:
        return {"read": self.read, "used": self.used, "left_out": dict(self.left_out)}

    def line(self, part: str) -> str:
        """One line for the terminal."""
        left_out = ", ".join(f"{rows} {reason}" for reason, rows in self.left_out.items())
        used = f"{self.used} used, left out: {left_out}" if left_out else "all used"
        return escaped(f"{part}: {self.read} rows read from {self.source}, {used}")


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
    return RowCount(read[0].source, len(read), {reason: rows for reason, rows in left_out.items() if rows})
