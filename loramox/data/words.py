"""The words of a text in any script: characters where words have no spaces between them."""

import itertools
from collections.abc import Callable, Collection

import regex

# Letters of scripts that are written without spaces between words.
UNSPACED = r"[[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&\p{L}]"
WORD = regex.compile(rf"(?V1){UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{Nd}}]--{UNSPACED}]+")

STRETCH = regex.compile(rf"(?V1)((?:{UNSPACED}\p{{M}}*)+)")  # with nothing between the characters

# As one counts words to give the first ones away: what white space separates, and characters where it does not.
_COUNTED = regex.compile(rf"(?V1)[^\s\p{{L}}\p{{Nd}}]*{UNSPACED}\p{{M}}*[^\s\p{{L}}\p{{Nd}}]*|[\S--{UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words in order, case folded; of Chinese, Japanese, Thai, Lao, Khmer and Burmese the characters."""
    return WORD.findall(text.casefold())


def first_words(text: str, count: int) -> str:
    """The text up to the end of its first words, each what white space separates or a character where it does not."""
    ends = [match.end() for match in itertools.islice(_COUNTED.finditer(text), count)]
    return text[: max(ends, default=0)]


def terms(text: str, split: Callable[[str], list[str]] = words) -> set[str]:
    """What key words are looked for in: the words and, where they are characters, the pairs that stand together.

    `split` makes the words of a text.
    """
    pairs = (pair for stretch in STRETCH.findall(text) for pair in _pairs(split(stretch)))
    return {*split(text), *pairs}


def key_terms(text: str, known: Collection[str], split: Callable[[str], list[str]] = words) -> list[str]:
    """The words of a text that are not among known terms, in order, each once.

    Characters alone tell nothing: those in a known pair are known, and the others are taken in pairs where they stand together.
    """
    found: list[str] = []
    for i, part in enumerate(STRETCH.split(text)):
        each = split(part)
        if i % 2:  # characters
            each = [term for rest in _without(each, known) for term in _pairs(rest) or rest]
        found += [term for term in each if term not in known]
    return list(dict.fromkeys(found))


def _pairs(characters: list[str]) -> list[str]:
    return [a + b for a, b in itertools.pairwise(characters)]


def _without(characters: list[str], known: Collection[str]) -> list[list[str]]:
    """What is left of the characters without their known pairs."""
    in_known = {j for i, pair in enumerate(_pairs(characters)) if pair in known for j in (i, i + 1)}
    found: list[list[str]] = [[]]
    for i, character in enumerate(characters):
        if i in in_known:
            found.append([])
        else:
            found[-1].append(character)
    return found
