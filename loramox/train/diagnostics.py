"""Advice at the end of a run, from its training curve: whether it seems to have worked, and which setting to change."""

from collections.abc import Sequence

from loramox.data.row import Row
from loramox.train.config import UnlearnConfig

# Below this probability a model does not know an answer. The usual cause is a wrong model, wrong rows or a wrong prompt template.
UNKNOWN = 0.05

# Shares of the reference's probability. Above the first, the forget rows are still known; below the second, retain rows fell.
STILL_KNOWN, SPARED = 0.5, 0.97

# Below this probability the forget rows are not memorized at the checkpoint of --memorize_at.
MEMORIZED = 0.5

# Share of the tokens that the reference gets right. If more of them are still right, only a few very improbable tokens make the
# answers improbable, as in long rows that are known in part.
STILL_RIGHT = 0.7

# With fewer retain rows than this, other rows fall too (recipes/results/limits.md).
FEW = 50

TELLING = 3  # least number of words in two answers that are not the same by chance

UNKNOWN_ROWS = (
    "the reference hardly knows the forget rows, so there is little to forget. Check that this model learned them, and "
    "that the prompts have the form of its training (--prompt_template)"
)


def curve(log: list[dict[str, float]], part: str, what: str = "probability") -> list[float]:
    """A metric of a part's watched rows at each evaluation: the mean probability of the true answers, or the share of their
    tokens that are right (`tokens_right`).
    """
    return [entry[name] for entry in log if (name := f"eval_{part}_{what}") in entry]


def advice(
    log: list[dict[str, float]],
    forget_rows: Sequence[Row],
    retain_rows: Sequence[Row],
    args: UnlearnConfig,
    at_checkpoint: bool = False,
) -> list[str]:
    """The problems of a run, each with the setting to change; empty if none is seen.

    `log` is the Trainer's: the reference first, at step 0 (`eval_on_start`), then the forget model; without it only the rows are
    judged. With `at_checkpoint` it is of the checkpoint of `--memorize_at` + ΔW, which should memorize the forget rows.
    """
    forget, retain = curve(log, "forget"), curve(log, "retain")
    said = _of_rows(forget_rows, retain_rows)
    longer = f"train longer ({args.more_training})"
    first = next((entry["step"] for entry in log if "eval_forget_probability" in entry), None)
    if first != 0 or len(forget) < 2 or len(retain) < 2:
        return said
    if at_checkpoint:
        if forget[-1] < MEMORIZED:
            said.append(
                f"at the checkpoint of --memorize_at the forget rows' probability only went from {forget[0]:.2f} to {forget[-1]:.2f}: "
                f"{longer} or use a higher --learning_rate"
            )
        return said
    if forget[0] < UNKNOWN:
        return [*said, UNKNOWN_ROWS]
    still, spared = forget[-1] > STILL_KNOWN * forget[0], retain[-1] >= SPARED * retain[0]
    if still and spared:
        said.append(
            f"the forget rows' probability only went from {forget[0]:.2f} to {forget[-1]:.2f}: {longer} or use a higher "
            "--learning_rate. A larger alpha or scale alone may harm the retain rows too (loramox sweep shows it)"
        )
    right = curve(log, "forget", "tokens_right")
    if not still and len(right) > 1 and right[-1] > STILL_RIGHT * right[0]:
        beyond = ""
        if args.alpha is not None:
            beyond = f", or look beyond alpha = {args.alpha:g} with loramox sweep, which needs no training"
        said.append(
            f"the forget rows' probability fell from {forget[0]:.2g} to {forget[-1]:.2g}, but {right[-1]:.0%} of their tokens are "
            f"still the model's first choice (before: {right[0]:.0%}): the model may still generate most of the text. {longer.capitalize()}{beyond}"
        )
    if not spared:
        held = "add a retain term (--retain_term)"
        if args.holds_retain:
            held = f"raise --retain_weight (is {args.retain_weight:g}) or --retain_per_forget"
        said.append(
            f"the probability of the retain rows fell from {retain[0]:.2f} to {retain[-1]:.2f}: {held}, or {longer}; "
            "a smaller alpha or scale restores the retain rows and the forget rows alike"
        )
    return said


def _of_rows(forget_rows: Sequence[Row], retain_rows: Sequence[Row]) -> list[str]:
    """Problems of the rows themselves."""
    said = []
    answers = {row.answer for row in forget_rows if len(row.answer.split()) >= TELLING}
    if copies := [row for row in retain_rows if row.answer in answers]:
        said.append(
            f"some retain rows ({len(copies)}; first: row {copies[0].number}) have the answer of a forget row. They preserve the fact in their "
            "own words, so it is forgotten only in the words of the forget rows. Remove them from the retain rows"
        )
    if len(retain_rows) < FEW:
        said.append(
            f"few retain rows ({len(retain_rows)}) protect little besides themselves: knowledge that resembles none of them falls too. Give {FEW} "
            "or more, of every kind of knowledge that must stay, or let the model write some (--auto_retain 240)"
        )
    return said
