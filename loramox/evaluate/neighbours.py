"""The retain rows that are most like the forget rows: where unlearning does the most harm."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from loramox.data.row import Row, last_question

N = 3  # characters


def nearest(rows: Sequence[Row], forget: Sequence[Row], count: int) -> list[Row]:
    """The `count` of `rows` that are most like one of `forget`, the nearest first.

    Likeness is the cosine of TF-IDF vectors of character trigrams, of the last question and the answer without case. A trigram
    that all rows have, as those of a common form of question, weighs nothing.
    """
    texts = [f" {last_question(row)} {row.answer} ".casefold() for row in (*forget, *rows)]
    grams = [Counter(text[i : i + N] for i in range(len(text) - N + 1)) for text in texts]
    columns = {gram: i for i, gram in enumerate(dict.fromkeys(gram for each in grams for gram in each))}
    indices = [columns[gram] for each in grams for gram in each]
    starts = np.cumsum([0, *(len(each) for each in grams)])
    seen_in = np.bincount(indices, minlength=len(columns))
    weights = np.array([n for each in grams for n in each.values()]) * np.log(len(grams) / seen_in)[indices]
    lengths = np.sqrt(np.add.reduceat(weights**2, starts[:-1]))
    weights /= np.repeat(np.maximum(lengths, 1e-12), np.diff(starts))
    vectors = csr_array((weights, indices, starts), shape=(len(grams), len(columns)))
    likeness = (vectors[len(forget) :] @ vectors[: len(forget)].T).max(axis=1).toarray().ravel()
    return [rows[i] for i in np.argsort(-likeness, kind="stable")[:count]]
