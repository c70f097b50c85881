"""General ability: the adapter's cost on rows, texts and tasks that it was not trained on, as ratios to the reference.

A ratio of 1 means that nothing was lost. The reference is the same model with the adapter off, in the same load.

    rows    mean probability, on / off
    text    perplexity, off / on
    task    mean score of lm-evaluation-harness, on / off (off / on where lower is better)

`general_ability` is the mean of these ratios. Retain rows are not in it, nor are their neighbours: training may have seen them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loramox.evaluate.bootstrap import interval, interval_of_mean, resampled
from loramox.evaluate.metric import REFERENCE, Metric, Record, Summary, values

RETAIN_TEST, TEXT, NEIGHBOURS = "retain_test", "text", "_neighbours"  # the last is the end of a name
UNTRAINED = (RETAIN_TEST, f"{RETAIN_TEST}{NEIGHBOURS}", "real_authors", "world_facts", TEXT)
NOT_RETAINED = ("forget", "verbmem", "knowmem_forget", "holdout")  # parts whose ratio is no ability
UNDEFINED = "the reference's mean is 0, or scores are not finite"

Statistic = Callable[[np.ndarray], float]  # of row numbers


class _Ratio(NamedTuple):
    """A ratio to the reference, as a function of the numbers of those rows that the bootstrap draws from."""

    name: str
    n: int  # rows that count
    source: str
    of: Statistic
    drawn: int  # rows to draw from
    seed: int = 0  # ratios of the same rows have the same seed, so that they are resampled together
    is_general: bool = True


class TaskScores(NamedTuple):
    """A task of lm-evaluation-harness: the score of each document with the adapter on and off."""

    metric: str
    on: np.ndarray
    off: np.ndarray
    higher_is_better: bool = True


def add_ability(parts: Mapping[str, Sequence[Record]], tasks: Mapping[str, TaskScores], into: Summary) -> None:
    """Enter the ratio of each part and task, and `general_ability`, or what they lack."""
    general: dict[_Ratio, np.ndarray] = {}  # its value in each bootstrap sample
    ratios = _of_parts(parts)
    for seed, (task, scores) in enumerate(tasks.items(), len(parts)):
        _add_task(task, scores, into)
        on, off = (scores.on, scores.off) if scores.higher_is_better else (scores.off, scores.on)
        n, source = len(scores.on), f"mean {scores.metric}"
        ratios.append(_Ratio(f"lm_eval_{task}_ratio", n, source, _ratio_of_means(on, off), n, seed))
    for ratio in ratios:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(ratio.of(np.arange(ratio.drawn)))
        if not np.isfinite(value):
            into.absent[ratio.name] = UNDEFINED
            continue
        found = resampled(ratio.of, ratio.drawn, seed=ratio.seed)
        into.metrics[ratio.name] = Metric(value, "higher", ratio.n, REFERENCE, ratio.source, interval(found))
        general |= {ratio: found} if ratio.is_general else {}
    if not general:
        into.absent["general_ability"] = (
            "needs an adapter (--adapter), and rows that training did not get (--retain_test), a text (--text) or tasks (--lm_eval)"
        )
        return
    value = float(np.mean([into.metrics[ratio.name].value for ratio in general]))
    n = sum({ratio.seed: ratio.drawn for ratio in general}.values())  # neighbours are rows of another part
    source = f"mean of {', '.join(ratio.name for ratio in general)}"
    between = interval(np.mean(list(general.values()), axis=0))
    into.metrics["general_ability"] = Metric(value, "higher", n, REFERENCE, source, between)


def _of_parts(parts: Mapping[str, Sequence[Record]]) -> list[_Ratio]:
    """The ratio of each part whose rows have the reference's scores. Neighbours are drawn with the part that they are rows of."""
    found, places = [], {part: place for place, part in enumerate(parts)}
    for part, rows in parts.items():
        whole = part.removesuffix(NEIGHBOURS) if part.removesuffix(NEIGHBOURS) in parts else part
        drawn = [r for r in parts[whole] if "reference_log_p" in r]
        if part in NOT_RETAINED or not drawn:
            continue
        picked = np.isin([r["row"] for r in drawn], [r["row"] for r in rows])
        kind, source, of_drawn = _of_rows(drawn)

        def ratio(i: np.ndarray, of_drawn: Statistic = of_drawn, picked: np.ndarray = picked) -> float:
            return of_drawn(i[picked[i]])

        about = (int(picked.sum()), source, ratio, len(drawn), places[whole], part in UNTRAINED)
        found.append(_Ratio(f"{part}_{kind}", *about))
    return found


def _of_rows(rows: Sequence[Record]) -> tuple[str, str, Statistic]:
    """Name, source and statistic of the ratio of one part's rows."""
    on, off = values(rows, "log_p"), values(rows, "reference_log_p")
    if all(r["plain_text"] for r in rows):
        tokens = values(rows, "tokens")
        gain = (on - off) * tokens
        return "perplexity_ratio", "adapter off / on", lambda i: np.exp(gain[i].sum() / tokens[i].sum())
    return "probability_ratio", "mean probability, adapter on / off", _ratio_of_means(np.exp(on), np.exp(off))


def _ratio_of_means(above: np.ndarray, below: np.ndarray) -> Statistic:
    return lambda i: above[i].sum() / below[i].sum()


def _add_task(task: str, scores: TaskScores, into: Summary) -> None:
    n, change = len(scores.on), scores.on - scores.off
    better = "higher" if scores.higher_is_better else "lower"
    source = "lm-evaluation-harness"
    into.metrics[f"lm_eval_{task}_{scores.metric}"] = Metric(float(scores.on.mean()), better, n, None, source)
    between = interval_of_mean(change)
    into.metrics[f"lm_eval_{task}_change"] = Metric(float(change.mean()), better, n, REFERENCE, source, between)
