"""Reads the records of a file or hub data set as they are. What their columns mean is decided in `loramox.data.rows`."""

import codecs
import csv
import io
import json
import re
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loramox.errors import RowsError, escaped

FORMATS = (".json", ".jsonl", ".csv", ".parquet")
EXPECTED = "a .json, .jsonl, .csv or .parquet file, or a hub data set owner/name:config"
# The most that is read: Python needs several times as much memory. A Parquet file holds any number of equal rows in a few bytes.
MAX_ROWS = 5_000_000
MAX_BYTES = 2 << 30

# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_VALUE = re.compile(r"[^ \t\r\n,]")  # where one begins in JSON, behind white space and commas


class Number(str):
    """A number in a JSON file, as it is written there: 1.50 stays 1.50, and 5,000 digits are no problem."""


def check(source: str) -> None:
    """Raises `RowsError` for a source that is no file of rows and no name of a hub data set, before anything is loaded.

    Whether a hub data set exists is not looked up.
    """
    path = Path(source)
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.suffix in FORMATS:
            raise RowsError(f"{source} does not exist. Expected {EXPECTED}") from None
        return
    except OSError as error:
        raise RowsError(f"{source} cannot be opened: {error.strerror}. Expected {EXPECTED}") from error
    if not stat.S_ISREG(kind):
        what = "a folder" if stat.S_ISDIR(kind) else "a pipe or a device, not a regular file"
        raise RowsError(f"{source} is {what}. Expected {EXPECTED}")
    if path.suffix not in FORMATS:
        raise RowsError(f"{source} ends in '{path.suffix}'. Expected one of {', '.join(FORMATS)}")
    _refuse_large(source, 0, path.stat().st_size)


def _refuse_large(source: str, rows: int, size: int) -> None:
    """Raises `RowsError` for more rows, or more bytes of them, than are read."""
    if rows > MAX_ROWS or size > MAX_BYTES:
        most = f"{MAX_ROWS:,} rows" if rows > MAX_ROWS else f"{MAX_BYTES:,} bytes"
        raise RowsError(
            f"{source} has more than {most}, the most that are read. Write the rows and columns that you need to a file of their own, "
            "such as a random sample of the retain rows"
        )


def load(source: str) -> list[dict[str, Any]]:
    """The records of a file or hub data set, each with every column that any of them has. Raises `RowsError`."""
    check(source)
    path = Path(source)
    if not path.exists():
        return _from_hub(source)
    # Not with `datasets`: it makes numbers and dates of answers that look like some, and leaves a copy of the rows, which
    # are to be forgotten, in its cache.
    try:
        if path.suffix == ".parquet":
            return _read_parquet(source, path)
        text = _decoded(source, path)
    except OSError as error:
        raise RowsError(f"{source} cannot be read: {error.strerror or error}") from error
    records = _read_csv(source, text) if path.suffix == ".csv" else list(_read_json(source, text))
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
        found = load_dataset(name, config or None, split=split or "train")
        _refuse_large(source, len(found), found.data.nbytes)
        return found.to_list()
    except RowsError:
        raise
    except Exception as error:  # of the hub, the network, pyarrow or a damaged file
        raise RowsError(
            f"{source} is no file, and as a hub data set (owner/name:config:split) it failed: {error}"
        ) from error


def _read_parquet(source: str, path: Path) -> list[dict[str, Any]]:
    from pyarrow import DictionaryArray
    from pyarrow.parquet import ParquetFile

    records: list[dict[str, Any]] = []
    size = 0
    try:
        with ParquetFile(path) as file:
            _refuse_large(source, file.metadata.num_rows, 0)
            _refuse_repeated(source, file.schema_arrow.names)
            for group in range(file.metadata.num_row_groups):
                for batch in file.iter_batches(_rows_at_a_time(file.metadata.row_group(group)), row_groups=[group]):
                    for column in batch.columns:
                        each = column.dictionary_decode() if isinstance(column, DictionaryArray) else column
                        size += each.nbytes
                        _refuse_large(source, 0, size)
                    records += batch.to_pylist()
    except RowsError:
        raise
    except Exception as error:  # such as a time in the year 30,000; pyarrow may raise anything of a damaged file
        raise RowsError(
            f"{source} cannot be read as parquet: {str(error) or type(error).__name__}. Write it again, or as .jsonl, with only the columns "
            "that are needed"
        ) from error
    return records


def _rows_at_a_time(group: Any) -> int:
    """So few that they fit `MAX_BYTES` even if each has the longest value that a row group of this size can hold."""
    longest = max((group.column(i).total_uncompressed_size for i in range(group.num_columns)), default=1)
    return max(1, min(1 << 16, MAX_BYTES // max(1, longest)))


def _decoded(source: str, path: Path) -> str:
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)  # read_text would change line ends, which may be part of an answer
    except UnicodeDecodeError as error:
        raise RowsError(f"{source} cannot be read as {path.suffix[1:]}: {error}. Save it as UTF-8") from error
    if "\0" in text:
        raise RowsError(
            f"{source} cannot be read as {path.suffix[1:]}: it has NUL characters in it, as UTF-16 and binary files have. Save it as UTF-8"
        )
    return text


def _read_csv(source: str, text: str) -> list[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # its default is less than a book
    lines = io.StringIO(text, newline="")
    records: list[dict[str, Any]] = []
    try:
        header = next(csv.reader(lines), [])
        # Spreadsheets write semicolons where the comma is the decimal sign.
        separator = next((sign for sign in ";\t" if len(header) == 1 and sign in header[0]), ",")
        lines.seek(0)
        reader = csv.DictReader(lines, strict=True, delimiter=separator)
        _refuse_repeated(source, reader.fieldnames or [])
        for record in reader:
            records.append(record)
    except csv.Error as error:
        raise RowsError(
            f"{source}, row {len(records) + 1}, cannot be read as CSV: {error}. Expected text in double quotes, and each "
            "double quote within it twice"
        ) from error
    _warn_of_lost_rows(source, records, separator)
    return records


def _refuse_repeated(source: str, names: Sequence[str]) -> None:
    """Raises `RowsError` for two columns of one name; of columns without a name, none is read, and there may be many."""
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise RowsError(
            f"{source} has {names.count(twice)} columns '{twice}', and only one can be read. Rename or remove the others"
        )


def _warn_of_lost_rows(source: str, records: Sequence[dict[str, Any]], separator: str) -> None:
    """Warn of the first value that has swallowed rows, as it does when a double quote is missing."""

    def is_row(line: str, columns: int) -> bool:
        # Prose has a space after its commas.
        return columns > 1 and line.count(separator) == columns - 1 and f"{separator} " not in line

    for number, record in enumerate(records, 1):
        for value in record.values():
            lines = value.splitlines()[1:] if isinstance(value, str) and "\n" in value else []
            if lines and all(is_row(line, len(record)) for line in lines):
                warnings.warn(
                    escaped(
                        f"{source}, row {number}: one value has line breaks, and what follows them looks like rows (first: {lines[0][:80]!r}). "
                        "If a double quote is missing or one too many there, these rows are lost: correct the file"
                    ),
                    stacklevel=2,
                )
                return


def _read_json(source: str, text: str) -> Iterator[Any]:
    """The elements of a JSON array; or the values that follow each other, as in JSON Lines. Commas are optional."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=Number, parse_float=Number)
    text = text.strip(" \t\r\n")
    array = text.startswith("[")
    ends = array and text.endswith("]")
    expected = "an array of objects" if array else "one object a line"
    at, end, number = int(array), len(text) - int(ends), 0
    while begin := _VALUE.search(text, at, end):
        number += 1
        try:
            value, at = decoder.raw_decode(text, begin.start())
        except RecursionError as error:
            raise RowsError(
                f"{source}, row {number}, cannot be read as JSON: a value in it is nested too deeply. Remove the column that it is in"
            ) from error
        except ValueError as error:
            raise RowsError(
                f"{source}, row {number}, cannot be read as JSON: {error}. Expected {expected}, with each key once in an object"
            ) from error
        yield value
    if array and not ends:
        raise RowsError(f"{source} is cut off after row {number}: its array has no end. Expected one array of objects")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that is there twice, Python's own would keep the last value and drop the others in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(n for n in names if names.count(n) > 1)}' is in one object twice")
    return made
