"""Row metrics, their registry first: each is one decorated function of an answer's tokens, and the mean over rows is a metric."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Function = Callable[..., float]


class RowMetric(NamedTuple):
    """A function of an answer's tokens, the names of the arrays that it takes, and its source."""

    function: Function
    takes: tuple[str, ...]
    source: str


ROW_METRICS: dict[str, RowMetric] = {}


def row_metric(source: str) -> Callable[[Function], Function]:
    """Register the decorated function as a metric under its own name; a higher value is of a model that knows the answer better.

    Its parameters are any of the arrays of `AnswerScores`, [n]: targets, log_p, first_choice, mean and spread, of the n tokens of
    one answer except the token that ends it. n is at least 1.

    Args:
        source: where the metric is from, as `summary.json` has it.
    """

    def register(function: Function) -> Function:
        ROW_METRICS[function.__name__] = RowMetric(function, tuple(inspect.signature(function).parameters), source)
        return function

    return register


def row_metrics(**arrays: np.ndarray) -> dict[str, Any]:
    return {name: m.function(*(arrays[each] for each in m.takes)) for name, m in ROW_METRICS.items()}


# How much of an answer a model knows by heart.


@row_metric(source="arXiv 2202.07646")
def exact_memorization(first_choice: np.ndarray, targets: np.ndarray) -> float:
    """Share of tokens that are the model's first choice, given the true ones before (arXiv 2202.07646)."""
    return float((first_choice == targets).mean())


@row_metric(source="loramox")
def late_probability(log_p: np.ndarray) -> float:
    """exp(mean log p) of the second half of the tokens, given the true ones before: what is left behind a refused beginning."""
    return float(np.exp(log_p[len(log_p) // 2 :].mean()))


@row_metric(source="arXiv 2104.07705")
def extraction_strength(first_choice: np.ndarray, targets: np.ndarray) -> float:
    """1 − k/n, with k the shortest prefix of n tokens after which greedy decoding yields all the rest (arXiv 2104.07705).

    1 when the answer comes unprompted, 0 when not even its last token does.
    """
    wrong = np.flatnonzero(first_choice != targets)
    k = wrong[-1] + 1 if len(wrong) else 0
    return float(1 - k / len(targets))
