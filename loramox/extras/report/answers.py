"""Single rows that a mean hides: the worst ones are quoted, with their text made safe to show."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from loramox.evaluate.measure import Record
from loramox.extras.report.read import FORGET, REFERENCE, RETRAINED, Inputs, Missing, again_command, number

LONGEST, MOST_LINES = 600, 12  # of a text that is shown

# Control characters but for tab and line feed; what turns the order of letters round, so that "live" reads "evil"; and
# halves of surrogate pairs, which no file in UTF-8 can hold.
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff\ufffe\uffff]")


def fit(text: Any, longest: int = LONGEST) -> dict[str, str]:
    """`text` as it can be shown, shortened to `longest` characters, and a note that says so."""
    text = UNFIT.sub("�", str(text).replace("\r\n", "\n"))
    cut = "\n".join(text[:longest].split("\n")[:MOST_LINES])
    note = f"shortened: {len(cut):,} of {len(text):,} characters" if len(cut) < len(text) else ""
    return {"text": cut + ("…" if note else ""), "note": note}


def question(prompt: Any) -> str:
    """A question as text; of a chat, who says what."""
    if isinstance(prompt, str) and prompt.startswith("["):
        try:
            return "\n".join(f"{m['role']}: {m['content']}" for m in json.loads(prompt))
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
    return str(prompt)


def named(record: Record) -> str:
    """A row by the name of its file and its number, without the folders."""
    return fit(str(record["row"]).rpartition("/")[2], 80)["text"]


def quoted_rows(inputs: Inputs, part: str) -> list[dict[str, Any]]:
    """A few rows of a part, each with why it is among them: the worst first, then typical ones; none chosen by hand."""
    by_model = {
        model: {r["id"]: r for r in records if r["part"] == part and "prompt" in r}
        for model, records in inputs.records.items()
    }
    shown = []
    for record, why in _picked(inputs, part, list(by_model.get(FORGET, {}).values())):
        same = {model: by_model.get(model, {}).get(record["id"], {}) for model in (REFERENCE, FORGET, RETRAINED)}
        shown.append(
            {
                "name": named(record),
                "why": why,
                "question": fit(question(record["prompt"])),
                "answer": fit(record.get("answer", "")),
                "says": [
                    {"model": model, "probability": number(r.get("probability")), "rouge": number(r.get("rouge_l"))}
                    | {"said": fit(r["said"]) if "said" in r else None}
                    for model, r in same.items()
                    if r
                ],
            }
        )
    return shown


def _picked(inputs: Inputs, part: str, rows: list[Record]) -> list[tuple[Record, list[str]]]:
    """Rows and why each was picked; a row that is picked for two reasons stands once."""
    if not rows:
        return []
    reasons: dict[str, list[str]] = {}

    def pick(record: Record, why: str) -> None:
        reasons.setdefault(record["id"], []).append(why)

    if part == "forget":
        for by, words in (
            ("rouge_l", "Worst leak by the answer: the highest ROUGE-L"),
            ("probability", "Worst leak by probability: the highest"),
        ):
            if tied := worst(rows, by):
                equal = f" (as high in {len(tied):,} rows)" if len(tied) > 1 else ""
                pick(tied[0], f"{words} of the {len(rows):,} rows{equal}")
    elif harmed := lost(rows, inputs.records.get(REFERENCE, ())):
        pick(harmed[0], f"Lost the largest share of its probability of the {len(rows):,} rows")
    ranked = sorted(rows, key=lambda r: (-probability(r), str(r["row"])))
    last = len(ranked) - 1
    for rank in sorted({math.ceil(last / 3), math.ceil(2 * last / 3), last}):
        what = "The least probable" if rank == last else "Typical"
        pick(ranked[rank], f"{what}: number {rank + 1:,} of {len(ranked):,} by probability")
    by_id = {r["id"]: r for r in rows}
    return [(by_id[key], why) for key, why in reasons.items()]


def worst(records: Sequence[Record], by: str) -> list[Record]:
    """The forget rows at which `by` is highest, all that are tied, the most probable first; none when no row has it."""
    found = [r for r in records if r["part"] == "forget" and number(r.get(by)) >= 0]
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


def no_answers(inputs: Inputs) -> Missing | None:
    """Why no answers are shown, where there are none."""
    records = inputs.records.get(FORGET, [])
    if any("said" in r for r in records):
        return None
    if records and all(r.get("plain_text") for r in records):
        return Missing("The rows are plain text: there are no questions to answer.")
    if records:
        return Missing(
            "The sweep generated no answers (--max_new_tokens 0). Move its folder away and sweep again without that:",
            again_command(inputs),
        )
    return inputs.missing.get("records") or inputs.missing.get("frontier") or Missing("No forget model was measured.")
