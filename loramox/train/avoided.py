"""Words that give away the subject of the forget rows: no row that the reference writes may contain one."""

from collections import Counter
from collections.abc import Sequence

from loramox.data.row import Row, question_of
from loramox.data.words import WORD, words

SUBJECT = 0.2  # a word in more than this share of the forget rows is of their subject, unless it is a frequent word
ELSEWHERE = 0.02  # a word in more than this share of the rows that the model wrote freely is a frequent word


def words_to_avoid(rows: Sequence[Row], forget: Sequence[Row], given: Sequence[Row] = ()) -> set[str]:
    """Words of the forget rows' subjects, and words that give a forget answer away.

    A word is avoided if

    - it is in more than a fifth of the forget rows, or is a name in two of them or more: then it is of a subject;
    - it is in a forget answer, in no forget question, and in fewer than two of the user's retain rows `given`: then it gives
      the answer away.

    Words that are frequent in `rows`, which the model wrote freely, are not avoided. A name counts as frequent only if it is as
    frequent there as in the forget rows, since the model may write about the subject unasked.
    """
    kept = Counter(word for row in given for word in words_of(row))
    elsewhere = Counter(word for row in rows for word in words_of(row))
    forgotten = Counter(word for row in forget for word in words_of(row))
    answers = {word for row in forget for word in longer_words(row.answer) if kept[word] < 2}
    questions = {word for row in forget for word in longer_words(question_of(row))}
    names = {name for name, count in Counter(name for row in forget for name in _names(row)).items() if count > 1}
    subject = {word for word, count in forgotten.items() if count > SUBJECT * len(forget)} | names

    def is_frequent(word: str) -> bool:
        least = forgotten[word] / len(forget) if word in names else ELSEWHERE
        return elsewhere[word] > max(least, ELSEWHERE) * len(rows)

    return {word for word in subject | (answers - questions) if not is_frequent(word)}


def words_of(row: Row) -> set[str]:
    """The `longer_words` of a row's question and answer."""
    return longer_words(f"{question_of(row)} {row.answer}")


def _names(row: Row) -> set[str]:
    """Its capitalised words, without those that begin a sentence."""
    text = f"{question_of(row)}\n{row.answer}"
    found = WORD.finditer(text)
    return {
        m[0].casefold() for m in found if m[0][0].isupper() and text[: m.start()].rstrip()[-1:] not in ("", *'.?!:"')
    }


def longer_words(text: str) -> set[str]:
    """The words of a text, without English words of one or two letters."""
    return {word for word in words(text) if len(word) > 2 or not word.isascii()}
