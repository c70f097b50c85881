"""One command per verb: argument parsing and nothing else.

Nothing heavy is imported before a verb is known, so that `loramox --help` answers at once.
"""

import argparse
import importlib
import io
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from loramox.cli.arguments import VERBS, refuse_replaced_flags, speaks
from loramox.data.row_files import check
from loramox.errors import LoramoxError, escaped
from loramox.files import disk_may_fill
from loramox.settings import at_home

HOMES = {
    "demo": "training",
    "unlearn": "training",
    "train": "training",
    "extrapolate": "training",
    "evaluate": "evaluation",
    "attack": "evaluation",
    "sweep": "evaluation",
    "report": "evaluation",
    "plan": "training",
    "requests": "requests",
    "ship": "shipping",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line. Wrong input exits with 2 and one message that says what to do."""
    _write_what_the_terminal_can()
    parser = argparse.ArgumentParser(
        prog="loramox",
        description="Make a language model forget rows, with a small LoRA adapter that you can scale and switch off.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:12} {does}" for verb, does in VERBS.items())
        + "\n\n'loramox VERB --help' lists its flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="Show the version of loramox.")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    words = [at_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    if words[:1] == ["memorize"]:  # until 0.3
        words[0] = "train"
        if speaks():
            print("loramox memorize is deprecated: it is now loramox train", file=sys.stderr)
    verb = parser.parse_args(words[:1]).verb
    _quieten_libraries()
    _report_progress()
    resumes = verb in ("unlearn", "train") or words[:2] in (["requests", "add"], ["requests", "refresh"])
    try:
        refuse_replaced_flags(words)
        _check_files(words)
        with disk_may_fill(f"Free some space, and run the same command again{' with --resume' if resumes else ''}"):
            getattr(importlib.import_module(f"loramox.cli.{HOMES[verb]}"), verb)(words[1:])
            sys.stdout.flush()
    except KeyboardInterrupt:
        again = ". The same command with --resume continues the run" if resumes else ""
        print(f"loramox {verb}: interrupted. All files on disk are complete{again}", file=sys.stderr)
        sys.exit(130)
    except LoramoxError as error:
        # A message may quote a library's, which may have many lines.
        print(f"loramox {verb}:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        from loramox.model.fitting import ran_out_of_memory  # torch, which raised it, is loaded

        if not ran_out_of_memory(error):
            raise
        why = str(error) or type(error).__name__
        print(f"loramox {verb}: the device's memory ran out:", *why.split(), file=sys.stderr)
        less = "--quantization nf4, shorter rows (--max_length), or main memory (--use_cpu true)"
        remedy = f"Use less memory: a smaller --batch_size, {less}"
        if resumes:  # with the settings that may differ then
            anew = "without --resume" if verb == "requests" else "with --overwrite"
            remedy = (
                "Continue with --resume and --activation_checkpointing true or a smaller --per_device_eval_batch_size, or on a device with more "
                f"memory. Or start from the beginning {anew}, and give {less}"
            )
        print(f"All files on disk are complete. {remedy}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        named = escaped(str(error.filename))
        print(f"loramox {verb}: {named}: {error.strerror}. All other files are complete", file=sys.stderr)
        sys.exit(2)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from loramox import __version__

        print(f"loramox {__version__}")
        parser.exit()


def _write_what_the_terminal_can() -> None:
    """Replace characters that a terminal or pipe without UTF-8 has none for, and drop what a pipe's reader leaves unread, instead
    of failing in the middle of a job."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream is getattr(sys, f"__{name}__") and isinstance(stream.buffer, io.BufferedWriter | io.FileIO):
            stream.flush()
            pipe = _Pipe(stream.fileno(), "w", closefd=False)
            written = pipe if stream.write_through else io.BufferedWriter(pipe)
            lines, through = stream.line_buffering, stream.write_through
            own = io.TextIOWrapper(written, stream.encoding, "replace", line_buffering=lines, write_through=through)
            setattr(sys, name, own)
        else:
            stream.reconfigure(errors="replace")


class _Pipe(io.FileIO):
    """A pipe, terminal or file that text is written to. Its reader may leave, as `| head` does: the job goes on unread."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:  # raised once: what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, BrokenPipeError):
                raise
            return len(data)


def _report_progress() -> None:
    """Print what a job reports as it goes, one line a step, and warnings as sentences without Python's file and line."""
    steps = logging.getLogger("loramox")
    if not any(isinstance(handler, _Steps) for handler in steps.handlers):
        steps.addHandler(_Steps())
    steps.setLevel(logging.INFO if speaks() else logging.ERROR)
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {escaped(str(message))}\n"


class _Steps(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(escaped(record.getMessage()), file=sys.stderr, flush=True)


def _check_files(words: Sequence[str]) -> None:
    """Refuse a file of rows that does not exist before the libraries are loaded, which takes seconds."""
    for flag, word in itertools.pairwise(words):
        if flag in ("--forget", "--retain", "--holdout"):
            check(word)


def _quieten_libraries() -> None:
    """Silence the libraries' messages to developers, so that users see the ones meant for them."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # reading a file of rows takes no time
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional CPU kernel that is not installed
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
