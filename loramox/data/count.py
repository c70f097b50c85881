"""Count the rows of a source: those read, those used, and those left out, with the reason."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from loramox.data.row import Row
from loramox.errors import escaped

log = logging.getLogger(__name__)

OVERLAP = "also in the forget set"
LONG = "too long"
SHORT = "without a token to predict"  # plain text of one token, in which nothing comes after anything


def count_rows(
    part: str, read: Sequence[Row], kept: Sequence[Row], examples: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """Count what became of the rows of one source, and log it in a line.

    `kept` are those in no other part, `examples` what `encode` made of them. Returns the numbers `read`, `used` and `left_out`
    (by reason), of `answers` where rows have several, and of `repeated_questions`, which another row answers differently.
    """
    encoded = {example["row"] for example in examples}
    lost = [row for row in kept if row.where not in encoded]
    short = sum(row.prompt is None for row in lost)
    reasons = {OVERLAP: len(read) - len(kept), LONG: len(lost) - short, SHORT: short}
    left_out = {reason: rows for reason, rows in reasons.items() if rows}
    counted: dict[str, Any] = {"read": len(read), "used": len(read) - sum(left_out.values()), "left_out": left_out}
    answers = sum(len(row.right_answers) for row in read)
    if answers > len(read):
        counted["answers"] = answers
    if repeated := _repeated(read):
        counted["repeated_questions"] = repeated
    log.info("%s", _line(part, read[0].source, counted))
    return counted


def _line(part: str, source: str, counted: dict[str, Any]) -> str:
    left_out = ", ".join(f"{rows} {reason}" for reason, rows in counted["left_out"].items())
    used = f"{counted['used']} used, left out: {left_out}" if left_out else "all used"
    several = f" with {counted['answers']} answers" if "answers" in counted else ""
    repeated = ""
    if "repeated_questions" in counted:
        repeated = f". {counted['repeated_questions']} of them ask a question that another row answers differently, and each is used as it is"
    return escaped(f"{part}: {counted['read']} rows{several} read from {source}, {used}{repeated}")


def _repeated(rows: Sequence[Row]) -> int:
    """How many rows ask a question that another of them answers differently."""
    keys = [row.key() for row in rows if row.prompt]
    answers = Counter(key.rpartition("\x1f")[0] for key in set(keys))
    return sum(answers[key.rpartition("\x1f")[0]] > 1 for key in keys)
