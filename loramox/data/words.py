"""The words of a text in any script: characters where words have no spaces between them."""

import regex

# Letters of scripts that are written without spaces between words.
UNSPACED = r"[[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&\p{L}]"
WORD = regex.compile(rf"(?V1){UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{Nd}}]--{UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words in order, case folded; of Chinese, Japanese, Thai, Lao, Khmer and Burmese the characters."""
    return WORD.findall(text.casefold())
