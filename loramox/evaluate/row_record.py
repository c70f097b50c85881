"""The record of one row: its identity, scores, truth ratio and answer."""

import hashlib
import json
from collections.abc import Set

import numpy as np
from transformers import PreTrainedTokenizerBase

from loramox.data.encode import IGNORED, Example
from loramox.data.fluency import is_fluent
from loramox.data.row import Row
from loramox.data.words import first_words
from loramox.evaluate import membership
from loramox.evaluate.metric import Record
from loramox.evaluate.rouge import NO_WORDS, rouge_l
from loramox.evaluate.row_metrics import row_metrics
from loramox.evaluate.scores import AnswerScores
from loramox.evaluate.truth_ratio import chosen_probability, truth_ratio


def identity(row: Row, block: int) -> str:
    """Tells rows apart, and finds the same one in another model's records, wherever its file lies."""
    return hashlib.sha256(f"{row.identity()}\x1f{block}".encode()).hexdigest()[:16]


def tokens_of(row: Row, answer: Example) -> Record:
    """How many tokens of the answer are scored; not known of several right answers, of which the most probable one is scored."""
    return {} if row.other_answers else {"tokens": sum(label != IGNORED for label in answer["labels"][1:])}


def variants_of(row: Row) -> Record:
    """Tells the paraphrase and wrong answers of a row from others, where it has some."""
    texts = "\x1f".join([row.paraphrase or "", *row.wrong_answers])
    return {"variants": hashlib.sha256(texts.encode()).hexdigest()[:16]} if row.wrong_answers else {}


def scored(row: Row, scores: AnswerScores, tokenizer: PreTrainedTokenizerBase, ends: Set[int]) -> Record:
    """Scores of an answer: probability, row metrics, scores of membership inference, and KL if there is one."""
    # OpenUnlearning's token-wise scores leave the last token out: the end of the answer, or in a text without one its last.
    n = len(scores.targets)
    n -= bool(scores.targets[-1] in ends or not row.ends)
    body = {name: getattr(scores, name)[:n] for name in ("targets", "log_p", "first_choice", "mean", "spread")}
    record = {
        "tokens": len(scores.targets),
        "log_p": float(scores.log_p.mean()),
        "probability": float(np.exp(scores.log_p.mean())),
        "plain_text": row.prompt is None,
    }
    if n:
        per_token = membership.loss(scores.log_p)
        record |= {
            **row_metrics(**body),
            "mia_loss": per_token,
            "mia_zlib": membership.zlib(per_token, tokenizer.decode(scores.targets, skip_special_tokens=True)),
            "mia_min_k": membership.min_k(body["log_p"]),
            "mia_min_k_plus_plus": membership.min_k_plus_plus(body["log_p"], body["mean"], body["spread"]),
        }
    return record | ({"kl": float(scores.kl.mean())} if scores.kl is not None else {})


def truth(row: Row, answer: AnswerScores, variants: list[AnswerScores]) -> Record:
    """The truth ratio and what it is made of; nothing for a row without wrong answers, or with some left out as too long."""
    # A truth ratio over some of a row's answers is another number: --long_rows drop may have left some out.
    spelled = bool(row.paraphrase)
    if not row.wrong_answers or len(variants) < spelled + len(row.wrong_answers):
        return {}
    means = np.array([s.log_p.mean() for s in variants])
    answer_log_p = answer.log_p.mean()
    # TOFU's real authors and world facts have no paraphrase.
    true, wrong = (means[0], means[1:]) if spelled else (answer_log_p, means)
    return (
        variants_of(row)
        | {
            "truth_ratio": float(truth_ratio(np.array([true]), wrong[None])[0]),
            "chosen_probability": float(chosen_probability(np.array([answer_log_p]), wrong[None])[0]),
            "wrong_log_p": wrong.tolist(),
        }
        | ({"paraphrase_log_p": float(true)} if spelled else {})
    )


def answered(row: Row, answer: str | None) -> Record:
    """Question and true answers, and of a generated `answer` its text, fluency and ROUGE-L; nothing for plain text."""
    if row.prompt is None:
        return {}
    prompt = row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt, ensure_ascii=False)
    asked: Record = {"prompt": prompt, "answer": row.answer}
    asked |= {"other_answers": [*row.other_answers]} if row.other_answers else {}
    if answer is None:
        return asked
    right = [each[len(first_words(each, row.given_words)) :] for each in row.right_answers]
    return asked | {"said": answer, "fluent": float(is_fluent(answer))} | rouge_of(answer, *right)


def rouge_of(said: str, *right: str) -> Record:
    """ROUGE-L of an answer as a record has it, the best over the right ones; or why it is absent."""
    scores = [score for each in right if (score := rouge_l(said, each))]
    if not scores:
        return {"absent": dict.fromkeys(("rouge_l", "rouge_l_f1"), NO_WORDS)}
    return {"rouge_l": max(s["recall"] for s in scores), "rouge_l_f1": max(s["f1"] for s in scores)}
