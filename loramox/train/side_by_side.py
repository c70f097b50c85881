"""Answers of the reference and the forget model to a few questions, side by side, worst first: shown after every run."""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list

from loramox.data.chat import end_tokens
from loramox.data.fluency import SHARED, is_fluent, leaked, overlap
from loramox.data.row import Row, last_question, question_of, spread
from loramox.model.generation import continuations
from loramox.train.config import UnlearnConfig
from loramox.train.inputs import is_refusal, taught_refusals
from loramox.train.prepare import Prepared
from loramox.train.synthetic import ROWS
from loramox.train.target import FLUENT
from loramox.train.trainer import UnlearnTrainer
from loramox.train.writer import prompts_of

ASKED = 16  # questions of each part
TOKENS = 48  # of an answer
SHOWN = {"forget": 3, "retain": 2}
LEAKED, KEPT = 0.5, 0.9  # shares below, above and below which there is something to change


def side_by_side(trainer: UnlearnTrainer, prepared: Prepared) -> dict[str, Any]:
    """Ask the reference and the forget model the same questions, greedily.

    Returns:
        `forget` and `retain`: `asked`, the number of rows, and `fluent`, how many answers of the forget model are fluent. Of
        forget rows also `leaked`, the mean share of the true answer's key words in the answer, and `reference`, the same of the
        reference's; of retain rows `kept`, how many answers share half of their words with the reference's, and `refused`, how
        many are like one of the refusals that were taught, and the reference's are not. `shown`: the worst of both, each with
        its part, question and the answers of reference and forget_model.
    """
    found: dict[str, Any] = {"shown": []}
    refusals = taught_refusals(trainer.args)
    for part, given in (("forget", prepared.forget), ("retain", prepared.retain)):
        rows = _asked(given)
        if not rows:
            continue
        with trainer.at(0):
            before = _answers(trainer, prepared, rows)
        with trainer.forget_model():
            now = _answers(trainer, prepared, rows)
        found[part] = {"asked": len(rows), "fluent": sum(map(is_fluent, now))}
        if part == "forget":
            badness = [leaked(new, row.answer, question_of(row)) for row, new in zip(rows, now, strict=True)]
            known = [leaked(old, row.answer, question_of(row)) for row, old in zip(rows, before, strict=True)]
            found[part] |= {"leaked": sum(badness) / len(rows), "reference": sum(known) / len(rows)}
        else:
            badness = [1 - overlap(new, old) for old, new in zip(before, now, strict=True)]
            found[part]["kept"] = sum(each <= 1 - SHARED for each in badness)
            found[part]["refused"] = sum(
                is_refusal(new, refusals) and not is_refusal(old, refusals)
                for old, new in zip(before, now, strict=True)
            )
        for i in sorted(range(len(rows)), key=lambda i: -badness[i])[: SHOWN[part]]:
            shown = {"part": part, "question": last_question(rows[i]), "reference": before[i], "forget_model": now[i]}
            found["shown"].append(shown)
    return found


def fluent_share(trainer: UnlearnTrainer, prepared: Prepared) -> float:
    """The share of the forget model's answers to forget questions that are fluent. There has to be a question."""
    with trainer.forget_model():
        now = _answers(trainer, prepared, _asked(prepared.forget))
    (share,) = broadcast_object_list([sum(map(is_fluent, now)) / len(now)])  # the first process decides for all
    return share


def advice_on(found: dict[str, Any], args: UnlearnConfig) -> list[str]:
    """What is wrong with the answers, each with the setting to change; empty when nothing is seen to be wrong."""
    advice, forget, retain = [], found.get("forget"), found.get("retain")
    above, with_instead = f"({args.more_training})", "instead" in args.spec.settings
    more_rows = "" if (args.auto_retain or 0) >= ROWS else f" (--auto_retain {ROWS})"
    if forget and forget["fluent"] < FLUENT * forget["asked"]:
        other = "--instead guess" if args.instead == "refuse" else "--instead refuse (in place of --wanted_column)"
        if not with_instead:
            other = "a smaller --learning_rate, or --method mox with --instead refuse"
        given = " or more retain rows" if args.instead in ("refuse", "guess") else ""
        advice.append(
            f"{forget['asked'] - forget['fluent']} of {forget['asked']} answers to forget questions are empty or repeat themselves: try {other}{given}"
        )
    if forget and forget["leaked"] > LEAKED * forget["reference"]:
        advice.append(
            f"the answers to forget questions still contain {forget['leaked']:.0%} of the key words of the true answers (reference: "
            f"{forget['reference']:.0%}): train longer {above}"
        )
    if not retain:
        return advice
    how = f"--forget_to above {args.forget_to:g}" if args.forget_to else "--forget_to 0.05"
    smaller = f"a smaller {'scale' if args.alpha is None else 'alpha'} ({how})"
    refused = retain.get("refused", 0)
    if retain["asked"] - refused < KEPT * retain["asked"]:
        advice.append(
            f"the refusals spread: {refused} of {retain['asked']} retain questions are refused too. Give retain rows that begin like the forget "
            f"questions{more_rows}, or train longer on them {above}"
            + (", or try --instead guess" if with_instead else "")
        )
    if retain["kept"] + refused < KEPT * retain["asked"]:
        lost = retain["asked"] - retain["kept"] - refused
        advice.append(
            f"{lost} of {retain['asked']} retain questions get a different answer than before: give more retain rows{more_rows}, "
            f"train longer {above}, or ship at {smaller}"
        )
    return advice


def _asked(rows: Sequence[Row]) -> list[Row]:
    return spread([row for row in rows if row.prompt is not None], ASKED)


def _answers(trainer: UnlearnTrainer, prepared: Prepared, rows: Sequence[Row]) -> list[str]:
    prompts = prompts_of(rows, prepared.tokenizer, prepared.tokenisation, prepared.context)
    ends = sorted(end_tokens(prepared.tokenizer))
    return [text.strip() for text in continuations(trainer.model, prepared.tokenizer, prompts, TOKENS, ends)]
