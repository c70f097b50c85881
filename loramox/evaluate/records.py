"""The folder of an evaluation: records.jsonl, one line a row, and summary.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramox.errors import RunError
from loramox.evaluate.measure import Record
from loramox.evaluate.summary import Summary
from loramox.files import as_json, replacing, write_json

RECORDS = "records.jsonl"
SUMMARY = "summary.json"


def write_records(folder: Path, records: Sequence[Record], summary: Summary, about: dict[str, Any]) -> None:
    """Write both files, each whole or not at all; `about` says what was measured, and how."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RECORDS) as partial:
        partial.write_text("".join(as_json(r) + "\n" for r in records), encoding="utf-8")
    # Written last: an evaluation that has it is whole.
    write_json(folder / SUMMARY, {**about, **summary.as_json()})


def read_records(folder: Path, like: Sequence[Record] = ()) -> list[Record]:
    """The records in `folder`, in the order of `like` and of the same rows, where that is given.

    Raises `RunError` when there are none, when they are damaged, and when rows of `like` are not among them.
    """
    path = folder / RECORDS if folder.is_dir() else folder
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        by_row = {(r["part"], r["id"]): r for r in records}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} has no records of an evaluation that can be read ({error!r}). Make them: loramox evaluate --model "
            f"RETRAINED_MODEL … --out {folder}, with the same rows"
        ) from error
    parts = {r["part"] for r in records}
    missing = [r for r in like if r["part"] in parts and (r["part"], r["id"]) not in by_row]
    if missing or (like and "forget" not in parts):
        what = f"{len(missing)} rows are not in it (first: {missing[0]['row']})" if missing else "it has no forget rows"
        raise RunError(
            f"{path} is of other rows: {what}. Records are compared row by row: evaluate the retrained model on the same "
            "files, and with the same --max_length"
        )
    return [by_row[r["part"], r["id"]] for r in like if r["part"] in parts] if like else records
