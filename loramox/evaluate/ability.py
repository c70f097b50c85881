"""General ability: the adapter's cost on rows, texts and tasks that it was not trained on, as ratios to the reference.

A ratio of 1 means that nothing was lost. The reference is the same model with the adapter off, in the same load.

    rows    mean probability, on / off
    text    perplexity, off / on
    task    mean score of lm-evaluation-harness, on / off (off / on where lower is better)

`general_ability` is the mean of these ratios. Retain rows are not in it, nor are their neighbours: training may have seen them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loramox.evaluate.bootstrap import interval, interval_of_mean, resampled
from loramox.evaluate.metric import REFERENCE, Metric, Record, Summary, values

RETAIN_TEST, TEXT, NEIGHBOURS = "retain_test", "text", "_neighbours"  # the last is the end of a name
UNTRAINED = (RETAIN_TEST, f"{RETAIN_TEST}{NEIGHBOURS}", "real_authors", "world_facts", TEXT)
NOT_RETAINED = ("forget", "verbmem", "knowmem_forget", "holdout")  # parts whose ratio is no ability
UNDEFINED = "the reference's mean is 0, or scores are not finite"


class _Ratio(NamedTuple):
    """A ratio to the reference: Σ above / Σ below over rows, or its exponential."""

    name: str
    source: str
    above: np.ndarray  # of each row that the bootstrap draws from
    below: np.ndarray
    counts: np.ndarray  # whether a row counts: neighbours are drawn with the part that they are rows of
    seed: int  # ratios of the same rows have the same one, so that they are resampled together
    is_general: bool = True
    is_log: bool = False

    def of(self, rows: np.ndarray) -> float:
        rows = rows[self.counts[rows]]
        ratio = self.above[rows].sum() / self.below[rows].sum()
        return float(np.exp(ratio) if self.is_log else ratio)


class TaskScores(NamedTuple):
    """A task of lm-evaluation-harness: the score of each document with the adapter on and off."""

    metric: str
    on: np.ndarray
    off: np.ndarray
    higher_is_better: bool = True


def add_ability(parts: Mapping[str, Sequence[Record]], tasks: Mapping[str, TaskScores], into: Summary) -> None:
    """Enter the ratio of each part and task, and `general_ability`, or what they lack."""
    general: list[tuple[_Ratio, np.ndarray]] = []  # with its value in each bootstrap sample
    ratios = _of_parts(parts)
    for seed, (task, scores) in enumerate(tasks.items(), len(parts)):
        _add_task(task, scores, into)
        on_and_off = (scores.on, scores.off) if scores.higher_is_better else (scores.off, scores.on)
        every = np.ones(len(scores.on), dtype=bool)
        ratios.append(_Ratio(f"lm_eval_{task}_ratio", f"mean {scores.metric}", *on_and_off, every, seed))
    for ratio in ratios:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = ratio.of(np.arange(len(ratio.counts)))
        if not np.isfinite(value):
            into.absent[ratio.name] = UNDEFINED
            continue
        found = resampled(ratio.of, len(ratio.counts), seed=ratio.seed)
        n = int(ratio.counts.sum())
        into.metrics[ratio.name] = Metric(value, "higher", n, REFERENCE, ratio.source, interval(found))
        if ratio.is_general:
            general.append((ratio, found))
    if not general:
        into.absent["general_ability"] = (
            "needs an adapter (--adapter), and rows that training did not get (--retain_test), a text (--text) or tasks (--lm_eval)"
        )
        return
    value = float(np.mean([into.metrics[ratio.name].value for ratio, _ in general]))
    n = sum({ratio.seed: len(ratio.counts) for ratio, _ in general}.values())  # neighbours are rows of another part
    source = f"mean of {', '.join(ratio.name for ratio, _ in general)}"
    between = interval(np.mean([found for _, found in general], axis=0))
    into.metrics["general_ability"] = Metric(value, "higher", n, REFERENCE, source, between)


def _of_parts(parts: Mapping[str, Sequence[Record]]) -> list[_Ratio]:
    """The ratio of each part whose rows have the reference's scores."""
    found, places = [], {part: place for place, part in enumerate(parts)}
    for part, rows in parts.items():
        whole = part.removesuffix(NEIGHBOURS) if part.removesuffix(NEIGHBOURS) in parts else part
        drawn = [r for r in parts[whole] if "reference_log_p" in r]
        if part in NOT_RETAINED or not drawn:
            continue
        on, off = values(drawn, "log_p"), values(drawn, "reference_log_p")
        counts = np.isin([r["row"] for r in drawn], [r["row"] for r in rows])
        about = (counts, places[whole], part in UNTRAINED)
        if all(r["plain_text"] for r in drawn):
            tokens = values(drawn, "tokens")
            gain = (on - off) * tokens
            found.append(_Ratio(f"{part}_perplexity_ratio", "adapter off / on", gain, tokens, *about, is_log=True))
        else:
            source = "mean probability, adapter on / off"
            found.append(_Ratio(f"{part}_probability_ratio", source, np.exp(on), np.exp(off), *about))
    return found


def _add_task(task: str, scores: TaskScores, into: Summary) -> None:
    n, change = len(scores.on), scores.on - scores.off
    better = "higher" if scores.higher_is_better else "lower"
    source = "lm-evaluation-harness"
    into.metrics[f"lm_eval_{task}_{scores.metric}"] = Metric(float(scores.on.mean()), better, n, None, source)
    between = interval_of_mean(change)
    into.metrics[f"lm_eval_{task}_change"] = Metric(float(change.mean()), better, n, REFERENCE, source, between)
