"""The rows of an attack: those that the attacker has and those that are scored, tokenised, as they are and in every form."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from loramox.data.row import Row, spread
from loramox.errors import SettingsError
from loramox.evaluate.attacks.config import QUICK_ROWS, AttackConfig
from loramox.evaluate.attacks.forms import Form
from loramox.evaluate.measure import Questions

NEVER_KNOWN = "rows never known"  # names the states in which holdout rows stand in the place of the forget rows

Tokenise = Callable[[dict[str, Sequence[Row]]], Questions]


@dataclass
class AttackedRows:
    """The forget rows, or holdout rows in their place.

    Holdout rows are a control that needs no retrained model: rows of the same kind that the reference never knew. The forget
    model is attacked with them as with the forget rows, so what comes back of them is guessing. It is the forget model and not
    the reference, because relearning has to start from the same weights, and the pair needs the adapter.
    """

    known: list[Row]  # that the attacker trains on
    asked: list[Row]
    every: Questions  # all rows that are not the attacker's
    questions: Questions  # those that are asked: fewer with --quick
    true_answers: Questions  # those without wrong answers, for relearning: its many states would take most of the time
    open_questions: Questions | None  # of rows that have a question, where answers are generated
    training: dict[str, Questions]  # what relearning trains on
    label: str = ""  # `NEVER_KNOWN`, or nothing
    ways: dict[str, list[tuple[Form, Questions]]] = field(default_factory=dict)  # by attack

    def named(self, name: str) -> str:
        """The name of an attack or form that these rows do not have."""
        return f"{name} ({self.label})" if self.label else name


def attacked_rows(
    rows: Sequence[Row],
    retain: Sequence[Row],
    training: dict[str, Questions],
    config: AttackConfig,
    tokenise: Tokenise,
    label: str = "",
) -> AttackedRows:
    """Split the rows into the attacker's and those that are asked, beside the retain rows; of holdout rows there are none."""
    known, asked = _split(rows, config, "holdout" if label else "forget")
    every = questions = tokenise({"forget": asked, "retain": retain})
    if config.quick:
        asked, retain = spread(asked, QUICK_ROWS), spread(retain, QUICK_ROWS)
        questions = tokenise({"forget": asked, "retain": retain})
    without_variants = [replace(row, paraphrase=None, wrong_answers=()) for row in asked]
    true_answers = tokenise({"forget": without_variants, "retain": retain})
    open_rows = [row for row in asked if row.prompt is not None and questions.scoring.max_new_tokens]
    open_questions = tokenise({"forget": open_rows}) if open_rows else None
    training = {"forget rows": tokenise({"known": known}), **training}
    return AttackedRows(known, asked, every, questions, true_answers, open_questions, training, label)


def _split(rows: Sequence[Row], config: AttackConfig, part: str) -> tuple[list[Row], list[Row]]:
    count = round(len(rows) * config.relearn_share)
    if not 0 < count < len(rows):
        raise SettingsError(
            f"--relearn_share {config.relearn_share} of {len(rows)} {part} rows is {count}: the attacker needs some, and some must be "
            "left to ask"
        )
    chosen = set(random.Random(config.seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i in chosen], [r for i, r in enumerate(rows) if i not in chosen]
