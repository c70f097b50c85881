"""Text in a row: strings, and numbers, which are read as they are written."""

import math
import reprlib
from decimal import Decimal
from typing import Any

from loramox.data.row_files import Number
from loramox.errors import RowsError


def number_as_text(value: Any) -> str | None:
    """The text of a number; None for everything else, for true and false, and for NaN, which stands for a missing value."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return None if isinstance(value, float) and not math.isfinite(value) else str(value)
    return None


def check_characters(where: str, text: str) -> None:
    """Raises `RowsError` for text with half a character in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowsError(
            f"{where} has half a character in it (a lone surrogate, like \\ud83d in JSON), which no tokenizer takes. "
            "Correct or remove it"
        ) from error


def shown(value: Any) -> str:
    """The value as a message shows it: in JSON's words, and cut short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(str(value))[1:-1] if isinstance(value, Number) else reprlib.repr(value)
