"""Whether answers leak: each has enough of the true answer. How many rows leak, and in which way of asking the most."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from loramox.data.row import Row, each_answer, question_of
from loramox.data.words import first_words, key_terms, terms
from loramox.evaluate.bootstrap import interval_of_mean
from loramox.evaluate.metric import Metric, Record, Summary
from loramox.evaluate.rouge import NO_WORDS, rouge_l, words
from loramox.evaluate.summary import summarise

ALL_IN_THE_QUESTION = "the question has every word of the true answer"
CRITERIA = {"rouge_l": "ROUGE-L", "key_words": "key words"}  # by what an answer counts as a leak, and in words
PLAIN = "the question itself"

Judge = Callable[[Row, Sequence[str], float], Record]


def key_words_of(row: Row) -> list[str]:
    """The words of the true answer that neither its question has, nor those words of the answer that are given with it.

    Words are those of ROUGE-L, without English endings: “lives” tells nothing to a question with “live”. Where words have no
    spaces, pairs of characters take their place.
    """
    given = first_words(row.answer, row.given_words)
    return key_terms(row.answer, terms(question_of(row), words) | terms(given, words), words)


def leaks_of(
    row: Row,
    said: Sequence[str],
    threshold: float,
    keys: Sequence[Sequence[str]] | None = None,
    by: Collection[str] = tuple(CRITERIA),
) -> Record:
    """How many of some answers to a row leak, by each criterion of `by`; its `key_words`, and why a criterion is `absent`.

    By rouge_l an answer leaks if its recall is at least `threshold`, by key_words if it has that share of `keys` (default: all
    key words). Of several right answers one is enough.
    """
    right = each_answer([row])
    all_keys = [key for key in (map(key_words_of, right) if keys is None else keys) if key]
    rests = [rest for each in right if words(rest := each.answer[len(first_words(each.answer, row.given_words)) :])]
    found: Record = {"key_words": list(all_keys[0]) if all_keys else [], "leaks": {}, "absent": {}}
    scores = [max(score["recall"] for rest in rests if (score := rouge_l(s, rest))) for s in said if rests]
    if "rouge_l" in by and scores:
        found["leaks"]["rouge_l"] = sum(recall >= threshold for recall in scores)
    if "key_words" in by and all_keys:
        found["leaks"]["key_words"] = sum(
            any(len({*key} & terms(s, words)) >= threshold * len(key) for key in all_keys) for s in said
        )
    why = {"rouge_l": NO_WORDS, "key_words": ALL_IN_THE_QUESTION if rests else NO_WORDS}
    return found | {"absent": {name: why[name] for name in by if name not in found["leaks"]}}


def judged(records: Sequence[Record], rows: Sequence[Row], judge: Judge, threshold: float) -> list[Record]:
    """The records, each with how its greedy answer leaks. `rows` are theirs, in the same order."""
    found = []
    for record, row in zip(records, rows, strict=True):
        leak = judge(row, [record["said"]], threshold)
        found.append(record | leak | {"absent": record.get("absent", {}) | leak["absent"]})
    return found


def summary(records: Sequence[Record]) -> Summary:
    """The usual metrics, and `leak`: the share of rows whose answer leaks by at least one criterion, with its interval."""
    metrics, absent = summarise(records)
    each = np.array([any(r["leaks"].values()) for r in records if r["leaks"]], dtype=float)
    if not len(each):
        return Summary(
            metrics, absent | {"leak": next((why for r in records for why in r["absent"].values()), NO_WORDS)}
        )
    source = "share of rows whose greedy answer has enough of the true one by ROUGE-L or key words"
    return Summary({"leak": rate(each, source), **metrics}, absent)


def rate(each: np.ndarray, source: str) -> Metric:
    return Metric(float(each.mean()), "like the retrained model's", len(each), None, source, interval_of_mean(each))


def worst_of(ways: Mapping[str, Sequence[Record]]) -> list[Record]:
    """Of each row the record of the way in which it comes out most, named as `form`: by leaks, then ROUGE-L, then probability.

    The first of `ways` is the question itself. `rouge_l` and `probability` are the highest of all ways, `leaks` has all criteria.
    """
    by_row: dict[str, list[tuple[str, Record]]] = {}
    for name, records in ways.items():
        for record in records:
            by_row.setdefault(record["row"], []).append((name, record))
    found = []
    for plain in next(iter(ways.values())):
        same = by_row[plain["row"]]
        name, most = max(
            same, key=lambda way: (any(way[1]["leaks"].values()), way[1].get("rouge_l", 0), way[1]["probability"])
        )
        leaking: dict[str, int] = {}
        for _, record in same:
            leaking = {by: max(leaking.get(by, 0), record["leaks"].get(by, 0)) for by in leaking | record["leaks"]}
        highest = {n: max(r[n] for _, r in same if n in r) for n in ("rouge_l", "probability") if n in most}
        kept = {n: most[n] for n in ("prompt", "answer", "said", "fluent", "key_words", "absent")}
        identity = {n: plain[n] for n in ("part", "row", "id", "plain_text")}
        found.append(identity | kept | highest | {"leaks": leaking, "form": name})
    return found


def worst_rows(records: Sequence[Record], most: int = 5) -> list[dict[str, Any]]:
    """Of the records of `worst_of`, the rows that leak: where they are, in which form and how much."""
    leaking = [r for r in records if any(r["leaks"].values())]
    leaking.sort(key=lambda r: (-sum(r["leaks"].values()), -r.get("rouge_l", 0)))
    names = ("row", "form", "rouge_l", "probability")
    return [{n: r[n] for n in names if n in r} for r in leaking[:most]]
