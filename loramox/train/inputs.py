"""Inputs of single methods besides rows and a model: other answers to teach, a layer, a reinforced adapter."""

import hashlib
import logging
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from loramox.adapter.factors import read_factors
from loramox.adapter.provenance import check_base, read_provenance
from loramox.data.fluency import SHARED, overlap
from loramox.data.row import Row, answering, last_question, wanted_rows
from loramox.errors import AdapterError, RowsError, SettingsError
from loramox.model.algebra import Factors
from loramox.model.lora import lora_layers
from loramox.train.registry import METHODS

if TYPE_CHECKING:
    from loramox.train.config import UnlearnConfig


log = logging.getLogger(__name__)

LARGE = 0.95e9  # parameters: models that are called 1B have a few less, or more
RATE, RATE_OF_LARGE = 1e-3, 2e-4
BUILT_IN = "built-in"  # stands for the refusals that come with loramox
REFUSALS = Path(__file__).with_name("refusals.txt")


def choose_learning_rate(args: "UnlearnConfig", model: PreTrainedModel) -> None:
    """Settle the learning rate where none is given, by the number of the model's parameters.

    1e-3 held at 4M and at 135M parameters (docs/results.md). Nothing larger has been measured: 2e-4 is what LoRA adapters of 7B
    models are usually trained with.
    """
    if args.learning_rate is None:
        parameters = model.num_parameters()
        args.learning_rate = RATE_OF_LARGE if parameters >= LARGE else RATE
        log.info("Learning rate: %g, for a model of %.3gM parameters", args.learning_rate, parameters / 1e6)


def choose_instead(args: "UnlearnConfig", forget: Sequence[Row], chat: bool, memorize_at: bool) -> None:
    """Settle `--instead auto`: refuse where questions are put to a chat model that is not an earlier checkpoint, none elsewhere.

    Without another answer to give, a chat model that has forgotten does not speak fluently (docs/results.md).
    """
    if args.instead == "auto":
        questions = chat and not memorize_at and not any(row.prompt is None or row.verbatim for row in forget)
        given = any(row.wanted for row in forget)
        args.instead = "refuse" if questions and not given else "none"


def taught_rows(args: "UnlearnConfig", forget: Sequence[Row], retain: Sequence[Row]) -> list[Row]:
    """The forget rows with the answers that the method teaches in the place of theirs; none where it teaches none.

    Refusals and random answers are drawn once a run, by its seed. Raises `RowsError` or `SettingsError` for answers that are
    missing, and for wanted answers that the method would not use.
    """
    source, given = args.spec.answers, wanted_rows(forget)
    by_flag = source == "wanted if given"  # --instead says what is taught where no answers are given
    if given and source not in ("wanted", "wanted if given"):
        users = ", ".join(name for name, each in METHODS.items() if (each.answers or "").startswith("wanted"))
        raise SettingsError(f"--wanted_column is of no use to --method {args.method}; it is for {users}. Leave it out")
    if given and args.instead in ("refuse", "guess"):
        raise SettingsError(f"--instead {args.instead} and --wanted_column both say what is answered instead: give one")
    if by_flag and args.instead != "refuse" and args.refusals not in (None, BUILT_IN):
        raise SettingsError(
            f"--refusals {args.refusals} is for --instead refuse, and here it is {args.instead}. Give --instead refuse, or leave out --refusals"
        )
    if source is None or given or (by_flag and args.instead not in ("refuse", "guess")):
        return given
    if any(row.prompt is None for row in forget):
        flag, instead = f"--instead {args.instead}", "--instead none"
        if not by_flag:
            others = ", ".join(name for name, each in METHODS.items() if each.answers in (None, "wanted if given"))
            flag, instead = f"--method {args.method}", f"choose a method without: {others}"
        raise RowsError(
            f"{forget[0].source} is plain text, and {flag} teaches another answer to a question. Give rows of questions and answers, or {instead}"
        )
    if args.instead == "guess":
        return []  # the reference writes them, when it is loaded
    if source == "wanted":
        raise SettingsError(f"--method {args.method} needs --wanted_column: the column of the other answers")
    if source == "random" and not retain:
        raise SettingsError(f"--method {args.method} answers with retain answers: give --retain FILE, not auto alone")
    answers = [row.answer for row in retain] if source == "random" else read_refusals(args.refusals)
    if args.refusals == BUILT_IN:
        _check_english(forget)
    draw = random.Random(args.seed)
    return [answering(row, draw.choice(answers)) for row in forget]


def _check_english(forget: Sequence[Row]) -> None:
    """Raises `SettingsError` when most letters of a question are of another script: a refusal is in the question's language."""
    for row in forget:
        letters = [letter for letter in last_question(row) if letter.isalpha()]
        if sum("LATIN" in unicodedata.name(letter, "") for letter in letters) < len(letters) / 2:
            raise SettingsError(
                f"{row.source}, row {row.number} is not in English, and the built-in refusals are. Give --refusals FILE, one sentence a line in "
                "the language of the questions, or --instead guess or none"
            )


def read_refusals(path: str) -> list[str]:
    """The lines of a text file that are not empty, or the `BUILT_IN` refusals.

    Raises `RowsError` when there are none, or they are no plain text.
    """
    file = REFUSALS if path == BUILT_IN else Path(path)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(
            f"--refusals {path} cannot be read: {error}. Expected a text file, one refusal a line"
        ) from error
    if not lines or lines[0].startswith(("{", "[")):
        what = "holds JSON" if lines else "is empty"
        raise RowsError(f"--refusals {path} {what}. Expected plain text, one refusal a line, like: I don't know.")
    return lines


def refusals_digest(path: str) -> str:
    """SHA-256 of the lines that `read_refusals` reads."""
    return hashlib.sha256("\n".join(read_refusals(path)).encode()).hexdigest()


def taught_refusals(args: "UnlearnConfig") -> list[str]:
    """The refusals that a run teaches; none of one that teaches something else, or nothing."""
    if args.refusals is None or args.instead not in (None, "refuse"):
        return []
    return read_refusals(args.refusals)


def is_refusal(text: str, refusals: Sequence[str]) -> bool:
    """Whether a text begins like one of the sentences that were taught: its first sentence shares half of the words."""
    first = text.split(". ")[0]
    return any(overlap(first, each) >= SHARED for each in refusals)


def read_reinforced(folder: str, base: dict[str, Any], model: nn.Module) -> dict[str, Factors]:
    """ΔW of the reinforced model: trained by mox_static or task_vector for the same base, on the same layers as `model`'s.

    Raises `AdapterError` for anything else.
    """
    source = read_provenance(Path(folder), "trained")
    if not METHODS[source["settings"]["method"]].static:
        raise AdapterError(
            f"--reinforced {folder} was trained by {source['method']}, and is no model that knows the rows better. Give one that memorizes: "
            "loramox train … --method mox_static"
        )
    check_base(source, base, Path(folder))
    factors, _ = read_factors(Path(folder))
    if factors.keys() != {name for name, _ in lora_layers(model)}:
        raise AdapterError(f"--reinforced {folder} adapts other layers. Give the same --target_modules to both runs")
    return factors
