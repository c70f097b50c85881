"""The folder of an evaluation: records.jsonl, one line a row, and summary.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramox.errors import RunError
from loramox.evaluate.measure import Record
from loramox.evaluate.summary import Summary
from loramox.files import as_json, read_json, replacing, sha256_of, write_json

RECORDS = "records.jsonl"
SUMMARY = "summary.json"
CHECKSUM = "records_sha256"  # in the summary


def write_records(folder: Path, records: Sequence[Record], summary: Summary, about: dict[str, Any]) -> None:
    """Write both files, each whole or not at all; `about` says what was measured, and how."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RECORDS, private=True) as partial:  # it holds the rows
        partial.write_text("".join(as_json(r) + "\n" for r in records), encoding="utf-8")
    # Written last: an evaluation that has it is whole.
    write_json(folder / SUMMARY, {**about, **summary.as_json(), CHECKSUM: sha256_of(folder / RECORDS)})


def read_records(folder: Path, like: Sequence[Record] = ()) -> list[Record]:
    """The records in `folder`, in the order of `like` and of the same rows, where that is given.

    Raises `RunError` when there are none, when they are damaged or were changed, when rows of `like` are not among them, and when
    such a row had other wrong answers.
    """
    path = folder / RECORDS if folder.is_dir() else folder
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        by_row = {(r["part"], r["id"]): r for r in records}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} has no records of an evaluation that can be read ({error!r}). Make them: loramox evaluate --model "
            f"RETRAINED_MODEL … --out {folder}, with the same rows"
        ) from error
    summary = path.with_name(SUMMARY)
    checksum = read_json(summary, dict).get(CHECKSUM) if summary.exists() else None
    if checksum not in (None, sha256_of(path)):
        raise RunError(
            f"{path} was changed after it was written: its checksum is not that in {SUMMARY}. Delete {path.parent}, and run the command that "
            "wrote it again"
        )
    parts = {r["part"] for r in records}
    missing = [r for r in like if r["part"] in parts and (r["part"], r["id"]) not in by_row]
    if missing or (like and "forget" not in parts):
        what = f"{len(missing)} rows are not in it (first: {missing[0]['row']})" if missing else "it has no forget rows"
        raise RunError(
            f"{path} is of other rows: {what}. Records are compared row by row: evaluate the retrained model on the same "
            "files, and with the same --max_length"
        )
    found = [by_row[r["part"], r["id"]] for r in like if r["part"] in parts]
    for record, row in zip(found, [r for r in like if r["part"] in parts], strict=True):
        if None not in (row.get("variants"), record.get("variants")) and row["variants"] != record["variants"]:
            raise RunError(
                f"{path} has other paraphrases or wrong answers of {row['row']}, so that its truth ratios are of something else. Evaluate the "
                "retrained model again on the same files"
            )
    return found if like else records


def check_template(folder: Path, theirs: dict[str, Any], template: str | None, own: str | None) -> None:
    """Raises `RunError` when the evaluation in `folder` put its questions in another form.

    Args:
        folder: for the message.
        theirs: its summary.
        template: the prompt template to compare with; None for the tokenizer's own.
        own: the tokenizer's own: None for a chat template.
    """
    if "prompt_template" not in (theirs.get("settings") or {}):
        return
    asked, here = theirs["settings"]["prompt_template"] or own, template or own
    if asked != here:
        raise RunError(
            f"{folder} was scored with {_shown(asked)}, and this is with {_shown(here)}: the two would answer different prompts. "
            "Evaluate the retrained model again with the same --prompt_template"
        )


def _shown(template: str | None) -> str:
    return "the chat template" if template is None else f"the prompt template {template!r}"
