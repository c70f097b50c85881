"""One command per verb: argument parsing and nothing else.

Nothing heavy is imported before a verb is known, so that `loramox --help` answers at once.
"""

import argparse
import importlib
import itertools
import sys
from collections.abc import Sequence

from loramox.cli.arguments import VERBS, refuse_replaced_flags, speaks
from loramox.data.row_files import check
from loramox.errors import LoramoxError

HOMES = {
    "demo": "training",
    "unlearn": "training",
    "train": "training",
    "extrapolate": "training",
    "evaluate": "evaluation",
    "attack": "evaluation",
    "sweep": "evaluation",
    "report": "evaluation",
    "plan": "planning",
    "requests": "requests",
    "ship": "shipping",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line. Wrong input exits with 2 and one message that says what to do."""
    parser = argparse.ArgumentParser(
        prog="loramox",
        description="Make a language model forget rows, with a small LoRA adapter that can be dialled and switched off.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:12} {does}" for verb, does in VERBS.items())
        + "\n\n'loramox VERB --help' lists its flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["memorize"]:  # until 0.3
        words[0] = "train"
        if speaks():
            print("loramox memorize is deprecated: it is now loramox train", file=sys.stderr)
    verb = parser.parse_args(words[:1]).verb
    _quieten_libraries()
    try:
        refuse_replaced_flags(words)
        _check_files(words)
        getattr(importlib.import_module(f"loramox.cli.{HOMES[verb]}"), verb)(words[1:])
    except KeyboardInterrupt:
        resumes = verb in ("unlearn", "train") or words[:2] in (["requests", "add"], ["requests", "refresh"])
        again = ". The same command with --resume goes on" if resumes else ""
        print(f"loramox {verb}: interrupted. All files on disk are complete{again}", file=sys.stderr)
        sys.exit(130)
    except LoramoxError as error:
        # A message may quote a library's, which may have many lines.
        print(f"loramox {verb}:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"loramox {verb}: {error.filename}: {error.strerror}. All other files are complete", file=sys.stderr)
        sys.exit(2)


def _check_files(words: Sequence[str]) -> None:
    """Refuse a file of rows that does not exist before the libraries are loaded, which takes seconds."""
    for flag, word in itertools.pairwise(words):
        if flag in ("--forget", "--retain", "--holdout"):
            check(word)


def _quieten_libraries() -> None:
    """Silence the libraries' messages to developers, so that users see the ones meant for them."""
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # reading a file of rows takes no time
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional CPU kernel that is not installed
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
