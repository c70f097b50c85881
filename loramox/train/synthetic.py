"""Rows that the reference model generates: retain rows (`--auto_retain`), and answers in place of forgotten ones.

Users rarely have rows for all that has to stay. The reference can write some (`loramox.train.writer`). They are written once, to
a file of the run.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from loramox.adapter.card import RETAIN_FILE
from loramox.data.row import Row, answering
from loramox.data.row_files import load
from loramox.data.rows import Columns, Data, rows_of, write_rows
from loramox.errors import RowsError, SettingsError
from loramox.model.lora import ReferenceConfig
from loramox.train.inputs import taught_refusals
from loramox.train.writer import Writer

if TYPE_CHECKING:
    from loramox.train.config import UnlearnConfig

log = logging.getLogger(__name__)

AUTO = "auto"  # as the value of --retain
GUESSES_FILE = "guesses.jsonl"
ROWS, BESIDE = 240, 120  # for --retain auto, and beside the rows of a user


def rows_to_write(args: "UnlearnConfig", writes: bool, reference: ReferenceConfig) -> int:
    """How many retain rows the reference writes: `--auto_retain`, or where that is not given, `BESIDE` if it `writes` and can.

    Forgetting spreads to whatever no retain row is like, and the rows of a user seldom cover everything (docs/results.md).
    """
    if args.auto_retain is not None:
        return args.auto_retain
    if not (writes and args.holds_retain):
        return 0
    if why := _cannot_write(reference):
        warnings.warn(
            f"no retain rows are generated: {why}. Give retain rows of every kind that must stay", stacklevel=2
        )
        return 0
    return BESIDE


def check_auto(args: "UnlearnConfig", data: Data, reference: ReferenceConfig) -> None:
    """With `--retain auto`, settle how many rows the reference writes. Raises `SettingsError` where it cannot write any."""
    if data.retain == AUTO:
        if args.auto_retain == 0:
            raise SettingsError(
                "--retain auto with --auto_retain 0 leaves no retain rows. Leave out --auto_retain, or give --retain FILE"
            )
        args.auto_retain = args.auto_retain or ROWS
    writes = "--instead guess" if args.instead == "guess" else "--retain auto" if args.auto_retain else None
    if writes and (why := _cannot_write(reference)):
        raise SettingsError(f"{writes}: {why}. Give rows of your own")


def _cannot_write(reference: ReferenceConfig) -> str | None:
    """Why the model in memory cannot write rows; None if it can."""
    if reference.shard:
        return "--shard cuts the model up, and no process has all of it (--shard false)"
    if reference.memorize_at is not None:
        return "with --memorize_at, the model in memory is not the reference"
    return None


def generated_rows(
    out: Path, writer: Writer, args: "UnlearnConfig", most: int, show: bool, columns: Columns
) -> tuple[list[Row], list[Row]]:
    """(retain rows, other answers to the forget questions) that the reference has to write; empty where none are asked for.

    The first process writes them to files in `out`, from which all read them, now and after an interruption. Retain rows are
    written in the run's own `columns`, since later commands read all rows with the same.
    """
    path = out / RETAIN_FILE
    decided = args.process_index > 0 or not most or path.exists()  # the first process decides for all
    (can_ask,) = broadcast_object_list([decided or writer.can_ask()])
    if not can_ask and args.auto_retain is None:
        log.info("No retain rows are generated: the reference finds your forget questions as unlikely as random tokens")
        most = 0
    elif not can_ask:
        warnings.warn(
            "the reference finds your forget questions as unlikely as random tokens, so the rows that it writes may be noise. Look through "
            f"{path}, or leave out --auto_retain",
            stacklevel=2,
        )
    with args.main_process_first():
        written = _retain_rows(path, writer, args, most, show, replace(columns, wanted_column=None)) if most else []
        guesses: list[Row] = []
        if args.instead == "guess":
            kept = _kept(out / GUESSES_FILE, lambda: writer.guesses([*writer.given, *written]), Columns())
            guesses = [answering(row, guess.answer) for row, guess in zip(writer.forget, kept, strict=True)]
    return written, guesses


def _retain_rows(
    path: Path, writer: Writer, args: "UnlearnConfig", most: int, show: bool, columns: Columns
) -> list[Row]:
    """The rows of the file, `most` of them or as many as the model can write; none that the user has given."""

    def write() -> list[Row]:
        log.info("Generating %d retain rows (--auto_retain)", most)
        return writer.retain_rows(most, args.seed, show, taught_refusals(args))

    rows = _kept(path, write, columns)
    thinks = ", or ends within the model's thoughts" if writer.only_thoughts else ""
    if not (rows or writer.given):
        raise RowsError(
            f"--retain auto: every row that the model writes is about the forget rows, empty, or cut off in its first sentence{thinks}. Give --retain FILE"
        )
    if len(rows) < most:
        warnings.warn(
            f"--auto_retain: the model wrote {len(rows)} of {most} rows, and then only repeated itself, touched the forget rows or wrote no whole sentence{thinks}. "
            "If much must stay that no retain row is like, add rows of your own to --retain",
            stacklevel=3,
        )
    given = {row.key() for row in (*writer.forget, *writer.protected, *writer.given)}
    return [row for row in rows if row.key() not in given]


def _kept(path: Path, write: Callable[[], list[Row]], columns: Columns) -> list[Row]:
    """The rows of a file, which is written first if it is not there."""
    if not path.exists():
        write_rows(path, write(), columns)
    if not path.stat().st_size:
        return []
    records = load(str(path))
    # An interrupted run may have a file from when all were written as question and answer.
    names = {name for name in asdict(columns).values() if name}
    as_written = columns if all(names <= each.keys() for each in records[:1]) else Columns()
    return rows_of(records, str(path), as_written)
