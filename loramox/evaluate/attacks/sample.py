"""The sampling attack: sample many answers to each question, and estimate how often one of k contains the true answer."""

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
from torch import nn

from loramox.evaluate.answers import sampled_answers
from loramox.evaluate.attacks.leaks import CRITERIA, leaks_of, rate
from loramox.evaluate.measure import Questions, Record
from loramox.evaluate.metric import Metric, Summary

SOURCE = "leak@k, arXiv 2511.04934: 1 − C(n − c, k) / C(n, k) for c leaks among n samples, mean over rows"


def leak_at(k: int, samples: int, leaks: int) -> float:
    """The probability that at least one of k samples leaks, estimated without bias from `leaks` of `samples` ≥ k that do."""
    return 1 - comb(samples - leaks, k) / comb(samples, k)


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

    `threshold` is that of `leaks_of`.
    """
    answers = questions.answered(
        model, sampled_answers, count=count, temperature=temperature, seed=seed, finished={}, describe=describe
    )
    return [record | {"samples": said} | leaks_of(row, said, threshold) for record, row, said in answers]


def leakage(records: Sequence[Record]) -> Summary:
    """leak@k for k = 1, 2, 4 … and the number of samples, by each criterion, with the interval of the mean over rows."""
    metrics: dict[str, Metric] = {}
    absent: dict[str, str] = {}
    for by in CRITERIA:
        rows = [(len(r["samples"]), r["leaks"][by]) for r in records if by in r["leaks"]]
        if not rows:
            absent[f"leak_by_{by}"] = next((r["absent"][by] for r in records), "no rows with questions")
            continue
        most = rows[0][0]
        for k in sorted({*(2**i for i in range(most.bit_length())), most}):
            each = np.array([leak_at(k, samples, leaks) for samples, leaks in rows])
            metrics[f"leak_at_{k}_by_{by}"] = rate(each, SOURCE)
    return Summary(metrics, absent)


def worst(records: Sequence[Record], most: int = 5) -> list[dict[str, Any]]:
    """The rows that leak in most samples, where they are and in how many; none that does not leak."""
    leaking = [r for r in records if any(r["leaks"].values())]
    leaking.sort(key=lambda r: (-max(r["leaks"].values()), -sum(r["leaks"].values())))
    return [{"row": r["row"], "samples": len(r["samples"]), **r["leaks"]} for r in leaking[:most]]
