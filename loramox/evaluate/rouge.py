"""ROUGE-L in every script: Latin text as rouge_score has it, words of other scripts, characters where words have no spaces."""

import logging
import unicodedata

import regex
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from loramox.data.words import UNSPACED, WORD

logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score says on every scorer which one it uses

NO_WORDS = "the true answer has no letters or digits, so there are no words to compare"

_NOT_LATIN = regex.compile(r"(?V1)[[\p{L}\p{M}]--[\p{Latin}\p{Common}\p{Inherited}]]|[\p{Nd}--[0-9]]|" + UNSPACED)


class _Words(DefaultTokenizer):
    def tokenize(self, text: str) -> list[str]:
        found: list[str] = []
        for word in WORD.findall(text.lower()):
            if _NOT_LATIN.search(word):
                found.append(unicodedata.normalize("NFKC", word).casefold())
            else:
                found += super().tokenize(word)
        return found


_TOKENIZER = _Words(use_stemmer=True)
_SCORER = RougeScorer(["rougeL"], tokenizer=_TOKENIZER)


def words(text: str) -> list[str]:
    """The words that ROUGE-L compares; of Latin text they are rouge_score's stems: lower-case runs of a to z and 0 to 9."""
    return _TOKENIZER.tokenize(text)


def rouge_l(said: str, true: str) -> dict[str, float] | None:
    """As TOFU and OpenUnlearning take it: recall (of the true answer) and F1, each in [0, 1]; None if that has no words."""
    if not words(true):
        return None
    score = _SCORER.score(true, said)["rougeL"]
    return {"recall": score.recall, "f1": score.fmeasure}
