"""The records of a file or hub data set, as they are: which of their columns mean what is `loramox.data.rows`' business."""

import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loramox.errors import RowsError

FORMATS = (".json", ".jsonl", ".csv", ".parquet")


def check(source: str) -> None:
    """Raises `RowsError` for a file that is not there or of no known format; what may be a hub data set is not looked for."""
    path = Path(source)
    if path.is_dir() or (path.suffix in FORMATS and not path.exists()):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RowsError(
            f"{source} {what}. Expected a .json, .jsonl, .csv or .parquet file, or a hub data set owner/name:config"
        )
    if path.exists() and path.suffix not in FORMATS:
        raise RowsError(f"{source} ends in '{path.suffix}'. Expected one of {', '.join(FORMATS)}")


def load(source: str) -> list[dict[str, Any]]:
    """The records of a file or hub data set, each with every column that any of them has."""
    check(source)
    path = Path(source)
    if not path.exists():
        return _from_hub(source)
    # Not with `datasets`: it makes numbers and dates of answers that look like some, and leaves a copy of the rows, which
    # are to be forgotten, in its cache.
    try:
        records = list(_read_parquet(path) if path.suffix == ".parquet" else _read_text(source, path))
    except RowsError:
        raise
    except (OSError, ValueError) as error:
        raise RowsError(f"{source} cannot be read as {path.suffix[1:]}: {error}") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or None in record:
            raise RowsError(
                f"{source}, row {number} does not fit the columns. Expected a value for each column, and no more: "
                'in JSON {"question": "…", "answer": "…"}, in CSV quotes around text with a comma or line break in it'
            )
    columns = dict.fromkeys(name for record in records for name in record)
    return [columns | record for record in records]


def _from_hub(source: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        return load_dataset(name, config or None, split=split or "train").to_list()
    except (OSError, ValueError) as error:
        raise RowsError(
            f"{source} is no file, and as a hub data set (owner/name:config:split) it failed: {error}"
        ) from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, partitioning=None).to_pylist()


def _read_text(source: str, path: Path) -> Iterable[Any]:
    """The records of a CSV file, of a JSON array, or of JSON Lines."""
    text = path.read_bytes().decode("utf-8-sig")  # read_text would change line ends, which may be part of an answer
    if path.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)  # its default is less than a book
        reader, number = csv.DictReader(io.StringIO(text, newline=""), strict=True), 0
        try:
            for number, record in enumerate(reader, 1):  # noqa: B007 (used when the next row fails)
                yield record
        except csv.Error as error:
            raise RowsError(
                f"{source}, row {number + 1}, cannot be read as CSV: {error}. Expected text in double quotes, and each "
                "double quote within it twice"
            ) from error
    elif text.lstrip().startswith("["):
        yield from json.loads(text)
    else:
        # Not splitlines, which also splits at line ends that JSON allows inside a string.
        for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RowsError(
                    f"{source}, row {number}, cannot be read as JSON: {error}. Expected one object a line"
                ) from error
