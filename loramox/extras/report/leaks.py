"""Single rows that a mean hides: the forget rows that leak most, the retain rows that lost most."""

from collections.abc import Sequence

from loramox.evaluate.measure import Record
from loramox.extras.report.read import number

LEAKS = ("rouge_l", "probability")  # of the answer, and of the true answer


def worst(records: Sequence[Record], by: str, part: str = "forget") -> list[Record]:
    """The rows of a part at which `by` is highest, all that are tied, the most probable first; none when no row has it."""
    found = [r for r in records if r["part"] == part and number(r.get(by)) >= 0]
    most = max((r[by] for r in found), default=0)
    return sorted((r for r in found if r[by] == most), key=lambda r: (-probability(r), str(r["row"])))


def lost(after: Sequence[Record], before: Sequence[Record]) -> tuple[Record, Record] | None:
    """The retain row that lost the largest share of its probability, after and before; None when none lost any."""
    known = {r["id"]: r for r in before if r["part"] == "retain" and probability(r) > 0}
    pairs = [(r, known[r["id"]]) for r in after if r["part"] == "retain" and r["id"] in known and probability(r) >= 0]
    pairs.sort(key=lambda pair: (probability(pair[0]) / probability(pair[1]), str(pair[0]["row"])))
    return pairs[0] if pairs and probability(pairs[0][0]) < probability(pairs[0][1]) else None


def probability(record: Record) -> float:
    """Of the true answer; −1 where there is none, so that such a row comes last."""
    found = number(record.get("probability"))
    return found if found >= 0 else -1.0
