"""The context attack: other rows before the question, which may bring the answer back or divert from it."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from loramox.data.encode import DEFAULT_TEMPLATE, Tokenisation
from loramox.data.row import Row, last_question, question_of
from loramox.data.words import words
from loramox.evaluate.attacks.forms import Form, asked_as, by_key_words
from loramox.train.avoided import ELSEWHERE

SHOTS, RELATED, OTHERS = 5, 5, 32  # rows in the context, at most

BOTH = "Answer both questions.\n1. {other}\n2. {question}"
NO_RETAIN = "retain rows with questions that fit into the model's context beside a forget row"
NO_RELATED = "forget rows that share a word, in their questions, that hardly any retain question has, and fit into the model's context"
NO_OTHERS = "other forget rows that fit into the model's context"


def contexts_of(
    asked: Sequence[Row],
    forget: Sequence[Row],
    retain: Sequence[Row],
    lengths: dict[str, int],
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
    how: Tokenisation,
    seed: int,
) -> list[Form]:
    """Every context, of those rows that have it. `lengths` has each row's tokens; `limit` is for a prompt with its answer."""
    # Rows of --auto_retain that are asked after a refused forget question would have the model refuse again.
    questions = {last_question(row) for row in forget}
    retain = [row for row in retain if questions.isdisjoint(turn["content"] for turn in _turns(row)[:-1])]
    shuffled = random.Random(seed).sample(retain, len(retain))
    elsewhere = Counter(word for row in retain for word in set(words(question_of(row))))
    rare = {word for row in forget for word in words(question_of(row)) if elsewhere[word] <= ELSEWHERE * len(retain)}

    def fitting(row: Row, others: Sequence[Row], most: int) -> list[Row]:
        """The first of the others that leave room for the row, and as much again for its answer; the very first is put last."""
        left, found = limit - 2 * lengths[row.where], []
        for other in others:
            needed = lengths.get(other.where, limit)  # without a length, the row alone is too long
            if other.prompt is not None and needed <= left and len(found) < most:
                left -= needed
                found.append(other)
        return found[::-1]

    asks = [rare & set(words(question_of(other))) for other in forget]
    keys = [other.key() for other in forget]
    few, related, given, both = [], [], [], []
    for row in asked:
        own, key = rare & set(words(question_of(row))), row.key()
        others = [i for i in range(len(forget)) if keys[i] != key]
        nearest = sorted(others, key=lambda i: -len(own & asks[i]))
        close = [forget[i] for i in nearest if own & asks[i]]
        if shots := fitting(row, shuffled, SHOTS):
            few.append(_after(row, shots, tokenizer, how))
            both.append(asked_as(row, BOTH.format(other=question_of(shots[-1]), question=last_question(row))))
        if shots := fitting(row, close, RELATED):
            related.append(_after(row, shots, tokenizer, how))
        if facts := fitting(row, [forget[i] for i in nearest], OTHERS):
            text = "\n".join(f"{question_of(fact)} {fact.answer}" for fact in facts)
            given.append(asked_as(row, f"{text}\n\n{last_question(row)}"))
    return [
        Form("after retain rows", few, NO_RETAIN, by_key_words),
        Form("after forget rows on the same subject", related, NO_RELATED, by_key_words),
        Form("other forget rows given", given, NO_OTHERS, by_key_words),
        Form("two questions at once", both, NO_RETAIN, by_key_words),
    ]


def _after(row: Row, shots: Sequence[Row], tokenizer: PreTrainedTokenizerBase, how: Tokenisation) -> Row:
    """The row after other questions and their answers: turns of a chat if it goes through a chat template, text if not."""
    row = asked_as(row, last_question(row))
    own = _turns(row)
    if not row.verbatim and (own is row.prompt or (how.prompt_template is None and tokenizer.chat_template)):
        first = sum(turn["role"] == "system" for turn in own[:1])  # templates take a system message at the start alone
        before = [turn for shot in shots for turn in (*_turns(shot), {"role": "assistant", "content": shot.answer})]
        return replace(row, prompt=(*own[:first], *(t for t in before if t["role"] != "system"), *own[first:]))
    text = "".join(f"{_prompt(shot, how)}{shot.answer}\n\n" for shot in shots)
    return replace(row, prompt=text + _prompt(row, how), verbatim=True)


def _turns(row: Row) -> Sequence[dict[str, str]]:
    return row.prompt if isinstance(row.prompt, tuple) else ({"role": "user", "content": row.prompt or ""},)


def _prompt(row: Row, how: Tokenisation) -> str:
    """What stands before the answer of a row without a chat template, white space included."""
    if row.verbatim:
        return str(row.prompt)
    text = (how.prompt_template or DEFAULT_TEMPLATE).replace("{prompt}", question_of(row))
    return text if text[-1:].isspace() else f"{text} "
