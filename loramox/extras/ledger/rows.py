"""The ledger's copy of a request's forget rows, to keep them forgotten later and to train on them again."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramox.data.row import Row, fingerprint
from loramox.data.rows import PROMPT_COMPLETION, QUESTION_ANSWER, Columns, read_rows
from loramox.errors import RowsError

ROWS = "rows.jsonl"


def write_rows(path: Path, rows: Sequence[Row], columns: Columns) -> None:
    """Write `rows` so that `read_rows(path, columns)` returns them again; no one but the owner may read the file.

    Paraphrases and wrong answers, which only evaluation uses, are left out. Raises `RowsError` should they not come back the
    same.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", newline="") as file:
        for row in rows:
            file.write(json.dumps(_record(row, columns), ensure_ascii=False) + "\n")
    if fingerprint(read_rows(str(path), columns)) != fingerprint(rows):
        raise RowsError(
            f"the copy of {rows[0].source} does not read back as the same rows. Give them as JSON Lines of question and answer"
        )


def _record(row: Row, columns: Columns) -> dict[str, Any]:
    wanted = {columns.wanted_column: row.wanted} if columns.wanted_column else {}
    if row.prompt is None:
        return {columns.text_column or "text": row.answer} | wanted
    said = {"role": "assistant", "content": row.answer, **dict(row.reasoning)}
    if columns.messages_column and not columns.prompt_column:
        return {columns.messages_column: [*row.prompt, said]} | wanted
    named = (columns.prompt_column, columns.answer_column) if columns.prompt_column else None
    prompt, answer = named or (PROMPT_COMPLETION if row.verbatim else QUESTION_ANSWER)
    right = [said] if row.reasoning else [*row.right_answers] if row.other_answers else row.answer
    return {prompt: row.prompt, answer: right} | wanted
