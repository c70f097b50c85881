"""Whether a text reads like an answer: neither empty nor repeating itself. Pure functions of text."""

import re
from collections import Counter

REPEATED = 3  # times that a run of three words comes back in a text that goes round in circles
SHARED = 0.5  # overlap from which two answers count as the same


def is_fluent(text: str) -> bool:
    """False for a text without a word, and for one in which three words in a row come three times or more."""
    words = _words(text)
    runs = Counter(zip(words, words[1:], words[2:], strict=False))
    return bool(words) and max(runs.values(), default=0) < REPEATED


def overlap(text: str, other: str) -> float:
    """Jaccard index of the two texts' sets of words, in [0, 1]; 1 for two texts without words."""
    a, b = set(_words(text)), set(_words(other))
    return len(a & b) / len(a | b) if a | b else 1.0


def told(answer: str, true: str, question: str) -> float:
    """Share of the words of the true answer that an answer has, in [0, 1], words of the question aside.

    Where the true answer has no words but the question's, all its words count.
    """
    known = set(_words(true))
    telling = known - set(_words(question)) or known
    return len(telling & set(_words(answer))) / len(telling) if telling else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
