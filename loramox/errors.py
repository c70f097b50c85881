"""One small tree of exceptions. Every message says what failed, where, and what to do about it."""


class LoramoxError(Exception):
    """Base of everything loramox raises on purpose; the command line prints it without a traceback."""


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
