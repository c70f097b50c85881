"""Answers side by side: which rows are quoted, and how text of any kind is made fit to be shown."""

import json
import math
import re
from typing import Any

from loramox.evaluate.report.read import FORGET, REFERENCE, RETRAINED, Inputs, Missing, again_command, number

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


def quoted_rows(inputs: Inputs, part: str) -> list[dict[str, Any]]:
    """A few rows of a part: not chosen by hand, but from the best remembered to the least by the forget model."""
    by_model = {
        model: {r.get("id"): r for r in records if r["part"] == part} for model, records in inputs.records.items()
    }
    told = [r for r in by_model.get(FORGET, {}).values() if "said" in r and "prompt" in r]
    told.sort(key=lambda r: (-number(r.get("probability")), str(r["row"])))
    last = len(told) - 1
    ranks = sorted({0, math.ceil(last / 3), math.ceil(2 * last / 3), last}) if told else []
    rows = []
    for rank in ranks:
        record = told[rank]
        same = {model: by_model.get(model, {}).get(record["id"], {}) for model in (REFERENCE, FORGET, RETRAINED)}
        rows.append(
            {
                "rank": f"{rank + 1} of {len(told)}",
                "question": fit(question(record["prompt"])),
                "answer": fit(record.get("answer", "")),
                "says": [
                    {"model": model, "probability": number(r.get("probability")), "rouge": number(r.get("rouge_l"))}
                    | {"said": fit(r["said"])}
                    for model, r in same.items()
                    if "said" in r
                ],
            }
        )
    return rows


def no_answers(inputs: Inputs) -> Missing:
    """Why no answers are shown."""
    records = inputs.records.get(FORGET, [])
    if records and all(r.get("plain_text") for r in records):
        return Missing("The rows are plain text: there are no questions to answer.")
    if records:
        return Missing(
            "The sweep generated no answers (--max_new_tokens 0). Move its folder away and sweep again without that:",
            again_command(inputs),
        )
    return inputs.missing.get("records") or inputs.missing.get("frontier") or Missing("No forget model was measured.")
