"""Whether a text reads like an answer: neither empty nor repeating itself. Pure functions of text."""

from collections import Counter
from collections.abc import Iterator

from loramox.data.words import STRETCH, key_terms, terms, words

REPEATED = 3  # times that a run of words comes back in a text that goes round in circles
RUN = 9  # characters in a run where words have no spaces: three often are a usual ending. A word counts as three
SHARED = 0.5  # overlap from which two answers count as the same


def is_fluent(text: str) -> bool:
    """False for a text without a word, and for one in which three words in a row come three times or more.

    Where words have no spaces, that is nine characters in a row, or three or more that come three times one after the other.
    """
    found = words(text)
    return bool(found) and max(Counter(_runs(found)).values(), default=0) < REPEATED and not _in_circles(found)


def _runs(found: list[str]) -> Iterator[tuple[str, ...]]:
    """From each word on the first words that make a run."""
    lengths = [1 if STRETCH.fullmatch(word) else RUN // 3 for word in found]
    for start in range(len(found)):
        length = 0
        for end in range(start, min(start + RUN, len(found))):
            length += lengths[end]
            if length >= RUN:
                yield tuple(found[start : end + 1])
                break


def _in_circles(found: list[str]) -> bool:
    """Whether a part that is too short for a run of characters comes three times, one after the other."""
    return any(
        found[i : i + size] == found[i + size : i + 2 * size] == found[i + 2 * size : i + 3 * size]
        for size in range(3, RUN)
        for i in range(len(found) - 3 * size + 1)
    )


def overlap(text: str, other: str) -> float:
    """Jaccard index of the two texts' sets of words, in [0, 1]; 1 for two texts without words."""
    a, b = set(words(text)), set(words(other))
    return len(a & b) / len(a | b) if a | b else 1.0


def leaked(answer: str, true: str, question: str) -> float:
    """Share of the key words of the true answer that an answer contains, in [0, 1].

    Key words are those that the question does not have; if it has all of them, every word is one. Where words have no spaces,
    pairs of characters are.
    """
    key_words = set(key_terms(true, terms(question)) or key_terms(true, ()))
    return len(key_words & terms(answer)) / len(key_words) if key_words else 0.0
