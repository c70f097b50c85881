"""Whether a text reads like an answer: neither empty nor repeating itself. Pure functions of text."""

from collections import Counter

from loramox.data.words import words

REPEATED = 3  # times that a run of three words comes back in a text that goes round in circles
SHARED = 0.5  # overlap from which two answers count as the same


def is_fluent(text: str) -> bool:
    """False for a text without a word, and for one in which three words in a row come three times or more."""
    found = words(text)
    runs = Counter(zip(found, found[1:], found[2:], strict=False))
    return bool(found) and max(runs.values(), default=0) < REPEATED


def overlap(text: str, other: str) -> float:
    """Jaccard index of the two texts' sets of words, in [0, 1]; 1 for two texts without words."""
    a, b = set(words(text)), set(words(other))
    return len(a & b) / len(a | b) if a | b else 1.0


def leaked(answer: str, true: str, question: str) -> float:
    """Share of the key words of the true answer that an answer contains, in [0, 1].

    Key words are those that the question does not have; if it has all of them, every word is one.
    """
    known = set(words(true))
    key_words = known - set(words(question)) or known
    return len(key_words & set(words(answer))) / len(key_words) if key_words else 0.0
