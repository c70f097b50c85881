"""The folder of an evaluation: records.jsonl, one line per row, and summary.json."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramox.data.encode import IGNORED, Tokenisation, encode
from loramox.data.row import Row
from loramox.errors import RunError
from loramox.evaluate.ability import NEIGHBOURS
from loramox.evaluate.measure import Questions, Record
from loramox.evaluate.subject import weights_of
from loramox.evaluate.summary import Summary
from loramox.files import LOCK, as_json, read_json, replacing, sha256_of, write_json

RECORDS = "records.jsonl"
SUMMARY = "summary.json"
CHECKSUM = "records_sha256"  # in the summary
PROMPTS = "prompts"  # in the summary: QUESTION as this model was asked it
QUESTION = "Who wrote it?"


def write_records(folder: Path, records: Sequence[Record], summary: Summary, about: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RECORDS, private=True) as partial:  # it holds the rows
        partial.write_text("".join(as_json(r) + "\n" for r in records), encoding="utf-8")
    # Written last: an evaluation that has it is whole.
    write_json(folder / SUMMARY, {**about, **summary.as_json(), CHECKSUM: sha256_of(folder / RECORDS)})


def read_records(folder: Path, like: Sequence[Record] = ()) -> list[Record]:
    """The records in `folder`; of the same rows as `like` and in its order, if given. Raises `RunError` for damaged or other
    ones.
    """
    path = _records_of(folder)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        # (part, id) → number of tokens → record: rows that differ in white space or reasoning have one id.
        by_row: dict[tuple[str, str], dict[Any, Record]] = {}
        for r in records:
            by_row.setdefault((r["part"], r["id"]), {})[r.get("tokens")] = r
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} has no records of an evaluation that can be read ({error!r}). Make them: loramox evaluate --model "
            f"RETRAINED_MODEL … --out {shlex.quote(str(folder))}, with the same rows"
        ) from error
    if _summary_of(path).get(CHECKSUM) not in (None, sha256_of(path)):
        raise RunError(
            f"{path} was changed after it was written: its checksum is not that in {SUMMARY}. Delete {path.parent}, and run the command that "
            "wrote it again"
        )
    if not like:
        return records
    parts = {r["part"] for r in records}
    like = [r for r in like if r["part"] in parts]
    missing = [r["row"] for r in like if (r["part"], r["id"]) not in by_row]
    if missing or "forget" not in parts:
        what = f"{len(missing)} rows are not in it (first: {missing[0]})" if missing else "it has no forget rows"
        raise RunError(
            f"{path} is of other rows: {what}. Records are compared row by row: evaluate the retrained model on the same "
            "files, and with the same --max_length"
        )
    found = []
    for row in like:
        same = by_row[row["part"], row["id"]]
        record = same.get(row.get("tokens"), next(reversed(same.values())))
        found.append(record)
        # Of several right answers each model has its most probable one, of another number of tokens.
        several = row.get("other_answers") or record.get("other_answers")
        for name in ("variants",) if several else ("variants", "tokens"):
            if None not in (row.get(name), record.get(name)) and row[name] != record[name]:
                raise RunError(
                    f"{path} has other texts of {row['row']}: evaluate the retrained model again on the same files, with the same --max_length, "
                    "--long_rows and --prompt_template"
                )
    return found


def _records_of(folder: Path) -> Path:
    """The records in a folder; their file itself may be given too."""
    return folder / RECORDS if folder.is_dir() else folder


def _summary_of(records: Path) -> dict[str, Any]:
    """The summary beside the records; empty where there is none."""
    path = records.with_name(SUMMARY)
    return read_json(path, dict) if path.exists() else {}


def read_retrained(
    folders: Sequence[str] | None,
    questions: Questions,
    reference: dict[str, Any] | None,
    template: str | None,
) -> list[list[Record]]:
    """Each retrained model's records of the same rows: tests compare with the first one's, and the others show what is chance.
    Raises `RunError` for an evaluation that was not finished, for other rows or prompts, for those of `reference`, which knows
    the rows, and for one model given twice.
    """
    # Neighbours are picked anew for each evaluation's retain rows, and nothing is compared by them.
    like = [identity for identity in questions.identities() if not identity["part"].endswith(NEIGHBOURS)]
    found: list[list[Record]] = []
    models: dict[Any, str] = {}  # what identifies its weights, and its adapter → folder
    for folder in folders or ():
        found.append(read_records(Path(folder), like=like))
        records = _records_of(Path(folder))
        about = _summary_of(records)
        if not {PROMPTS, "base"} <= about.keys():
            raise RunError(
                f"--retrained {folder}: this evaluation was not finished, since {SUMMARY} is missing or lacks what is compared. Run it again: "
                f"loramox evaluate --model RETRAINED_MODEL … --out {shlex.quote(str(records.parent))}, with the same rows"
            )
        _check_prompts(folder, about[PROMPTS], prompts_of(questions, template))
        theirs = about["base"]
        # An adapter makes another model of the same weights, which may be one that never knew the rows.
        adapter = (about.get("adapter") or {}).get("folder")
        weights = weights_of(theirs)
        if reference and not adapter and weights == weights_of(reference):
            raise RunError(
                f"--retrained {folder} is an evaluation of {theirs.get('model')}, the model that knows the forget rows. Expected one of a "
                "model that was trained without the forget rows: loramox evaluate --model RETRAINED_MODEL, with the same rows"
            )
        if (weights, adapter) in models:
            raise RunError(
                f"--retrained {models[weights, adapter]} and {folder} are evaluations of the same model. Give one model per seed of retraining"
            )
        models[weights, adapter] = folder
    return found


def prompts_of(questions: Questions, template: str | None) -> dict[str, str]:
    """`QUESTION` as the prompt of this tokenizer: as a question, as a chat, or as both, whichever the rows are.

    The flag alone does not tell it: without one, a tokenizer that has lost its chat template asks in another form.
    """
    kinds: dict[str, Any] = {"question": QUESTION, "chat": ({"role": "user", "content": QUESTION},)}
    rows = [row for _, _, row in questions.asked() if row.prompt is not None and not row.verbatim]
    asked = {"question" if isinstance(row.prompt, str) else "chat" for row in rows}
    found = {}
    for kind in sorted(asked):
        row = Row("form", 1, "A", kinds[kind])
        (example,) = encode([row], questions.tokenizer, Tokenisation(template), context=1 << 20)
        prompt = [t for t, label in zip(example["input_ids"], example["labels"], strict=True) if label == IGNORED]
        found[kind] = str(questions.tokenizer.decode(prompt, clean_up_tokenization_spaces=False))
    return found


def _check_prompts(folder: str, theirs: dict[str, str], ours: dict[str, str]) -> None:
    """Raises `RunError` when the evaluation in `folder` put its questions in another form."""
    for kind in sorted(theirs.keys() & ours.keys()):
        if theirs[kind] != ours[kind]:
            raise RunError(
                f"{folder} was scored with prompts of another form: {theirs[kind]!r}, and here {ours[kind]!r}. Either --prompt_template was "
                "not the same, or one of the two tokenizers has a chat template and the other none, or another one. Evaluate the retrained "
                "model again with the same --prompt_template, or with the chat template of --model in its folder"
            )


def check_out(out: Path, overwrite: bool) -> None:
    if (out / SUMMARY).exists() and not overwrite:
        raise RunError(
            f"--out {out} holds an evaluation already. Replace it with --overwrite, or choose another folder"
        )
    ours = {LOCK, RECORDS, SUMMARY, f".{RECORDS}.partial", f".{SUMMARY}.partial"}  # the last two are left by a kill
    if out.exists() and any(p.name not in ours for p in out.iterdir()):
        raise RunError(f"--out {out} has other files in it; they are left alone. Choose another folder")
