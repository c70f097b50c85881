"""One small tree of exceptions. Every message says what failed, where, and what to do about it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Terminals obey these: they clear the screen, rename the window, hide text. Halves of a character cannot be printed at all.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def escaped(text: str) -> str:
    """`text` with its control characters written out, so that a terminal shows them and does not obey them.

    Tabs and line ends stay. For names and texts from files that others wrote.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class LoramoxError(Exception):
    """Base of everything loramox raises on purpose; the command line prints it without a traceback."""

    def __str__(self) -> str:
        return escaped(super().__str__())


class SettingsError(LoramoxError, ValueError):
    """A setting has a value that cannot work; the message names the field and the flag."""


class RowsError(LoramoxError, ValueError):
    """A file of rows cannot be used; the message names the file, the row and the remedy."""


class ModelError(LoramoxError, ValueError):
    """A model cannot serve as the reference; the message names it and says which kinds can."""


class AdapterError(LoramoxError, ValueError):
    """An adapter folder is damaged, is not what was expected, or belongs to another base model."""


class RunError(LoramoxError, RuntimeError):
    """An output folder, a checkpoint or the disk stands in the way of a run."""


class NonFiniteLossError(RunError):
    """The loss became NaN or infinite; the message names the step, the rows and the last good checkpoint."""


class MissingExtraError(LoramoxError, ImportError):
    """A package that only some users need is not installed; the message has the pip command that installs it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import optional packages within it: one that is not installed raises `MissingExtraError`.

    Args:
        extra: the extra of pyproject.toml that installs them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "loramox"):
            raise
        raise MissingExtraError(
            f'{package} is not installed. Install it with: pip install "loramox[{extra}]"'
        ) from error
