"""The sampling attack: many answers to each question at a temperature, and how often k of them have the true one among them."""

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
from torch import nn

from loramox.data.rows import Row, question_of
from loramox.evaluate.answers import Answering, sampled_answers
from loramox.evaluate.measure import Questions, Record
from loramox.evaluate.rouge import NO_WORDS, rouge_l, words
from loramox.evaluate.summary import Metric, Summary

RESAMPLES = 2000
SOURCE = "leak@k, arXiv 2511.04934: 1 − C(n − c, k) / C(n, k) for c leaks among n samples, mean over rows"
ALL_IN_THE_QUESTION = "the question has every word of the true answer"
LEAKS = ("rouge_l", "key_words")  # by what a sampled answer counts as a leak


def leak_at(k: int, samples: int, leaks: int) -> float:
    """The probability that at least one of k samples leaks, estimated without bias from `leaks` of `samples` ≥ k that do."""
    return 1 - comb(samples - leaks, k) / comb(samples, k)


def key_words(row: Row) -> list[str]:
    """The words of the true answer that its question does not have."""
    known = set(words(question_of(row)))
    return [word for word in dict.fromkeys(words(row.answer)) if word not in known]


def sample(
    model: nn.Module,
    questions: Questions,
    count: int,
    temperature: float,
    threshold: float,
    seed: int,
    describe: str | None = None,
) -> list[Record]:
    """A record for each row with a question: `count` answers that the model gives, sampled, and how many of them leak.

    An answer leaks by rouge_l when its ROUGE-L recall is at least `threshold`, and by key_words when it has at least that share
    of the row's key words.
    """
    asked = questions.asked()
    how = Answering(questions.scoring.max_new_tokens)
    examples = [example for _, example, _ in asked]
    answers = questions.batch.ask(
        lambda size: sampled_answers(
            model, questions.tokenizer, examples, how, count, temperature, seed, size, describe
        )
    )
    return [
        record | {"samples": said} | _leaks(row, said, threshold)
        for (record, _, row), said in zip(asked, answers, strict=True)
    ]


def _leaks(row: Row, said: Sequence[str], threshold: float) -> Record:
    keys = key_words(row)
    found: Record = {"key_words": keys, "leaks": {}, "absent": {}}
    if words(row.answer):
        found["leaks"]["rouge_l"] = sum((rouge_l(s, row.answer) or {})["recall"] >= threshold for s in said)
    else:
        found["absent"]["rouge_l"] = NO_WORDS
    if keys:
        found["leaks"]["key_words"] = sum(len({*keys} & {*words(s)}) >= threshold * len(keys) for s in said)
    else:
        found["absent"]["key_words"] = ALL_IN_THE_QUESTION if words(row.answer) else NO_WORDS
    return found


def leakage(records: Sequence[Record]) -> Summary:
    """leak@k for k = 1, 2, 4 … and the number of samples, by each criterion, with the interval of the mean over rows."""
    metrics: dict[str, Metric] = {}
    absent: dict[str, str] = {}
    for by in LEAKS:
        rows = [(len(r["samples"]), r["leaks"][by]) for r in records if by in r["leaks"]]
        if not rows:
            absent[f"leak_by_{by}"] = next((r["absent"][by] for r in records), "no rows with questions")
            continue
        most = rows[0][0]
        for k in sorted({*(2**i for i in range(most.bit_length())), most}):
            each = np.array([leak_at(k, samples, leaks) for samples, leaks in rows])
            metrics[f"leak_at_{k}_by_{by}"] = Metric(
                float(each.mean()), "like the retrained model's", len(each), None, SOURCE, _interval(each)
            )
    return Summary(metrics, absent)


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % by the percentile bootstrap over rows; None for one row or rows that are all alike, from which it cannot tell."""
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    random = np.random.default_rng(0)
    means = values[random.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def worst(records: Sequence[Record], most: int = 5) -> list[dict[str, Any]]:
    """The rows that leak in most samples, where they are and in how many; none that does not leak."""
    leaking = [r for r in records if any(r["leaks"].values())]
    leaking.sort(key=lambda r: (-max(r["leaks"].values()), -sum(r["leaks"].values())))
    return [{"row": r["row"], "samples": len(r["samples"]), **r["leaks"]} for r in leaking[:most]]
