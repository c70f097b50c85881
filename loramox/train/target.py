"""Just enough forgetting: a target for the forget rows, when it is met, and the smallest alpha or scale that meets it.

The target is a probability, p. It is met when the true answers have a mean probability of at most p, their second halves too
(given the first), and greedy decoding gives at most a share p of them. The mean over a whole answer can be low by its first
tokens alone, where a refusal begins, with all the rest still known.

Where another answer was taught, a model may then still repeat itself, until it has gone over to that answer: so what ships also
has to answer fluently.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from loramox.errors import SettingsError
from loramox.model.lora import ReferenceConfig
from loramox.train.earlier import is_at_checkpoint

if TYPE_CHECKING:
    from loramox.train.config import UnlearnConfig
    from loramox.train.trainer import UnlearnTrainer

log = logging.getLogger(__name__)

JUST_ENOUGH = 0.05  # the target where another answer is taught
FLUENT = 0.95  # share of the answers to forget questions that have to be fluent
SCORES = ("probability", "late_probability", "rows_right")  # of which none may be above the target
# Of the value trained for, beyond which forget rows fall further than intended.
SHARES = tuple(eighths / 8 for eighths in range(2, 9))


def is_met(target: float, scores: dict[str, float], prefix: str = "eval_forget") -> bool:
    """Whether an evaluation of the forget rows meets the target."""
    return all(scores.get(f"{prefix}_{name}", 1.0) <= target for name in SCORES)


def met_at_last(state: TrainerState, target: float | None) -> bool:
    """Whether the last evaluation after a step, which is that of the state's own step, meets the target."""
    scores = [entry for entry in state.log_history if "eval_forget_probability" in entry]
    here = bool(scores) and scores[-1]["step"] == state.global_step > 0
    return target is not None and here and is_met(target, scores[-1])


def check_stop(args: "UnlearnConfig") -> None:
    """Raises `SettingsError` where `--stop_when_forgotten` has no target, or no scores that could meet it."""
    if args.stop_when_forgotten and not args.forget_to:
        raise SettingsError("--stop_when_forgotten needs a target: give --forget_to, for example --forget_to 0.05")
    if args.stop_when_forgotten and args.eval_strategy == "no":
        raise SettingsError("--stop_when_forgotten needs scores while training: leave out --eval_strategy no")


def check_target(args: "UnlearnConfig", reference: ReferenceConfig) -> None:
    """Raises `SettingsError` where the model that ships cannot be scored while training, or there is no target to stop at."""
    check_stop(args)
    if args.forget_to is not None and is_at_checkpoint(reference):
        raise SettingsError(
            "--forget_to: with --memorize_at, the model in memory is not the one that ships. Choose after training: loramox sweep "
            f"--rule forget_to --forget_to {args.forget_to:g}"
        )


def choose_target(args: "UnlearnConfig", targeted: bool) -> None:
    """Settle `--forget_to`: a target in targeted unlearning, none elsewhere and where it is 0.

    A model that was taught another answer gives it long before training ends, and what it unlearns beyond that costs other
    answers (docs/results.md).
    """
    if args.forget_to is None and targeted:
        args.forget_to = JUST_ENOUGH
    args.forget_to = args.forget_to or None


def choose_share(trainer: "UnlearnTrainer", fluent: Callable[[], float] | None = None) -> dict[str, Any]:
    """Score the watched forget rows at a few shares of the value trained for, and set the trainer's model to the smallest that
    meets `forget_to`, or to the whole where none does.

    Args:
        fluent: the share of fluent answers to forget questions. If given, the smallest that meets the target with at least
            `FLUENT` is taken; if none has so many, of those that meet the target the most fluent one.

    Returns:
        What the record says: `target`, `unit` (alpha or scale), `at`, `met`, `rows`, and `measured`, the scores of each value.
    """
    args, rows = trainer.args, trainer.eval_dataset["forget"]
    trained, measured = args.alpha or 1.0, []
    enough: dict[float, float] = {}  # the shares that meet the target, and how fluent they are
    for share in SHARES:
        trainer.share = share
        scores = trainer.predict(rows, metric_key_prefix="at").metrics
        measured.append({"at": share * trained} | {name: scores[f"at_{name}"] for name in SCORES})
        if not is_met(args.forget_to, scores, "at"):
            continue
        measured[-1] |= {"fluent": fluent()} if fluent else {}
        enough[share] = measured[-1].get("fluent", 1.0)
        if enough[share] >= FLUENT:
            break
    else:
        trainer.share = max(enough, key=lambda share: enough[share], default=1.0)  # of equals the smallest
    unit, at = "scale" if args.alpha is None else "alpha", trainer.share * trained
    chosen = {"target": args.forget_to, "unit": unit, "at": at, "met": bool(enough), "rows": len(rows)}
    chosen["measured"] = measured
    log.info("%s", said(chosen))
    return chosen


def said(chosen: dict[str, Any]) -> str:
    """The choice in a sentence."""
    here = _here(chosen)
    # A record of before second halves were scored has none.
    late = f", of second halves {here['late_probability']:.2g}" if "late_probability" in here else ""
    scores = f"probability {here['probability']:.2g}{late}, {here['rows_right']:.0%} answered right by greedy decoding"
    values = ", ".join(f"{each['at']:g}" for each in chosen["measured"])
    how = (
        f"the smallest of {values} that meets the target" if chosen["met"] else f"as trained: none of {values} meets it"
    )
    if "fluent" in here:
        scores += f", {here['fluent']:.0%} answered fluently"
        how += " with fluent answers"
        if here["fluent"] < FLUENT:
            how = f"the most fluent of {values} that meets the target; none has {FLUENT:.0%} of its answers fluent"
    return f"--forget_to {chosen['target']:g} chose {chosen['unit']} = {chosen['at']:g}, {how} ({scores}, {chosen['rows']} forget rows)"


def _here(chosen: dict[str, Any]) -> dict[str, float]:
    """The scores of the value that was chosen."""
    return next(each for each in chosen["measured"] if each["at"] == chosen["at"])


def advice_on_target(chosen: dict[str, Any], args: "UnlearnConfig") -> list[str]:
    """What to change where the target is missed."""
    if not chosen:
        return []
    if _here(chosen).get("fluent", 1.0) < FLUENT:
        whole = ", without --stop_when_forgotten" if args.stop_when_forgotten else ""
        return [f"{said(chosen)}. Train longer ({args.more_training}){whole}"]
    if chosen["met"]:
        return []
    return [
        f"the target is missed: {said(chosen)}. Train longer ({args.more_training}), or try "
        "larger values with loramox sweep --rule forget_to"
    ]
