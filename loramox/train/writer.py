"""The reference model as a writer of rows: questions that it samples, and its own answers to them.

From the start of a user's turn, a chat model samples questions like those that it was trained on (Magpie, arXiv 2406.08464); from
the first words of a forget question it samples neighbours, questions of the same form on other subjects. Its greedy answers are
what has to stay.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from loramox.data.chat import ChatTemplate, after_thoughts, end_tokens, special_tokens
from loramox.data.encode import DEFAULT_TEMPLATE, IGNORED, Tokenisation, encode
from loramox.data.row import Row, answering, last_question, question_of
from loramox.data.words import words
from loramox.errors import RowsError
from loramox.model.generation import continuations
from loramox.model.head import in_eval_mode
from loramox.train.avoided import longer_words, words_of, words_to_avoid

SOURCE = "--retain auto"
FREE = 1 / 3  # share of the questions that do not begin like a forget question
LATER = 4  # one in so many rows is asked after a refusal
QUESTION_TOKENS, ANSWER_TOKENS = 40, 48
ROUNDS = 8  # how often more questions are sampled while there are too few
# A model can write questions if the forget questions (so many at most) are likelier to it than random tokens, by so many nats
# per token.
JUDGED, ABOVE_CHANCE = 64, 1.0
BEGINNING = 256  # tokens of a question by which it is judged
USUAL = 0.05  # a token in more than this share of the retain answers says nothing of what an answer is about


class Writer:
    """The reference model as a writer of rows.

    It avoids the subject of `forget`, whose questions lend their first words, and of `protected`, which earlier requests made the
    model forget; it asks no question of `given`, the user's retain rows. If `whole`, answers that are too long are cut back to
    their last whole sentence, since their ends are trained on.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        forget: Sequence[Row],
        how: Tokenisation,
        context: int,
        protected: Sequence[Row] = (),
        given: Sequence[Row] = (),
        whole: bool = False,
    ) -> None:
        self.protected, self.given, self.whole = protected, given, whole
        self.model, self.tokenizer, self.forget, self.how, self.context = model, tokenizer, forget, how, context
        self.is_chat = how.prompt_template is None and tokenizer.chat_template is not None
        self._opening, self._closing = around_question(tokenizer, how)
        # What a prompt leaves of the context: an answer, and all that is beyond --max_length.
        self._room = max(ANSWER_TOKENS, context + 1 - (how.max_length or context))
        # Tokens that the prompt has around a question.
        self._frame = len(prompts_of([Row(SOURCE, 1, "", "x")], tokenizer, how, context)[0])
        self._asked = {tuple(words(last_question(row))) for row in (*forget, *protected, *given)}
        self.only_thoughts = False  # of the last answers
        self.ends, self._special = sorted(end_tokens(tokenizer)), tuple(special_tokens(tokenizer))

    def can_ask(self) -> bool:
        """Whether the forget questions are likelier to the model than random tokens; True where there are none to judge by.

        They are not to a model that was trained on answers alone, and what it asks is noise.
        """
        start = max(0, len(self._opened("")) - 1)  # its last token may be joined with the first of the question
        losses = []
        with in_eval_mode(self.model), torch.no_grad():
            for question in [last_question(row) for row in self.forget if row.prompt is not None][:JUDGED]:
                # All logits are made at once, so a question that holds a document is judged by its beginning.
                ids = torch.tensor(
                    [self._opened(question)[: min(self.context, start + BEGINNING)]], device=self.model.device
                )
                labels = ids.clone()
                labels[:, :start] = IGNORED
                losses.append(float(self.model(input_ids=ids, labels=labels).loss))
        if not losses:
            return True
        # A question of one token with nothing before it has no loss.
        judged = [loss for loss in losses if math.isfinite(loss)] or [math.inf]
        return sum(judged) / len(judged) + ABOVE_CHANCE < math.log(len(self.tokenizer))

    def retain_rows(self, count: int, seed: int, show: bool = False, refusals: Sequence[str] = ()) -> list[Row]:
        """Up to `count` questions and the model's own greedy answers, none of which touches a forget row. With `refusals`, one in
        `LATER` is asked after one of them.

        A third of the questions are free; they also show which words are frequent anyway. The others start with the first words
        of a forget question, and are free again where too few come of that. A row with one of the `words_to_avoid` is left out,
        and so is a forget question, and a question that is there already. One seed gives the same rows on the same machine; fewer
        than `count` come back if the model repeats itself too much.
        """
        draw, device = random.Random(seed), self.model.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            tqdm(total=count, desc="retain rows", disable=not show, unit="rows") as bar,
        ):
            torch.manual_seed(seed)
            free = self._collect(round(FREE * count), bar, _free, [], set())
            avoided = words_to_avoid(free, self.forget, self.given)
            if self.protected:
                avoided |= words_to_avoid(free, self.protected, self.given)
            free = [row for row in free if not words_of(row) & avoided]
            rows = self._collect(count, bar, lambda missing: self._starts(missing, avoided, draw), free, avoided)
            rows = self._collect(count, bar, _free, rows, avoided)
        rows = self._after_refusals(rows[:count], refusals, avoided, draw)
        return [replace(row, number=number) for number, row in enumerate(rows, 1)]

    def _after_refusals(
        self, rows: list[Row], refusals: Sequence[str], avoided: set[str], draw: random.Random
    ) -> list[Row]:
        """The rows, one in `LATER` of them asked after a forget question that was refused, with what the model answers then.

        Without such rows a model that has refused once refuses in the turns after it as well (docs/results-earlier.md).
        """
        asked = [last_question(row) for row in self.forget if row.prompt is not None]
        if not (refusals and asked and self.is_chat):
            return rows
        chats = {}
        for place in range(0, len(rows), LATER):
            texts = draw.choice(asked), draw.choice(refusals), question_of(rows[place])
            if self._fits(" ".join(texts), self._room, turns=len(texts)):
                roles = "user", "assistant", "user"
                chats[place] = tuple({"role": role, "content": text} for role, text in zip(roles, texts, strict=True))
        places = list(chats)
        answered = [row for row in self._answered(list(chats.values())) if not longer_words(row.answer) & avoided]
        later = {places[row.number - 1]: row for row in answered}
        return [later.get(place, row) for place, row in enumerate(rows)]

    def _collect(
        self, count: int, bar: tqdm, starts: Callable[[int], list[str]], rows: Sequence[Row], avoided: set[str]
    ) -> list[Row]:
        """`rows` and more, `count` in all: answered questions that begin with `starts`, without the words to avoid."""
        found = {row.prompt: row for row in rows}
        for _ in range(ROUNDS):
            missing = count - len(found)
            if missing <= 0:
                break
            # Near the end most questions are repetitions, so that many have to be sampled for a few that are new.
            questions = self._questions(starts(max(missing + missing // 2, count // 2)))
            for row in self._answered([question for question in questions if question not in found]):
                if not words_of(row) & avoided:
                    found[row.prompt] = row
            bar.update(min(len(found), count) - bar.n)
        return list(found.values())

    def _starts(self, count: int, avoided: set[str], draw: random.Random) -> list[str]:
        """First words of forget questions, in a drawn order: from half to all of those before the first word to avoid."""
        lent = [last_question(row).split() for row in self.forget if row.prompt is not None]
        draw.shuffle(lent)
        starts = []
        for number in range(count):
            question = lent[number % len(lent)] if lent else []
            end = next(
                (i for i, word in enumerate(question) if longer_words(word) & avoided), max(0, len(question) - 1)
            )
            starts.append(" ".join(question[: draw.randint(-(-end // 2), end)]))
        return starts

    def _questions(self, starts: Sequence[str]) -> list[str]:
        """Sampled questions that begin like this, each once, of at least three words."""
        prompts = [self._opened(start) for start in starts]
        closing = self._closing
        # As in Mistral's template, the token that ends a question may be none that ends an answer.
        ends = [*self.ends, *(token for text, token in self.tokenizer.get_added_vocab().items() if text == closing)]
        sampled = continuations(self.model, self.tokenizer, prompts, QUESTION_TOKENS, ends, sample=True)
        first_lines = [
            re.split(rf"\n|{re.escape(closing)}" if closing else r"\n", (start + text).strip())[0].strip()
            for start, text in zip(starts, sampled, strict=True)
        ]
        found = []
        for question in dict.fromkeys(first_lines):
            own = tuple(words(question))
            if len(own) > 2 and own not in self._asked and self._fits(question, self._room):
                found.append(question)
        return found

    def _opened(self, start: str) -> list[int]:
        """Token ids of a user's turn that starts like this; of an end of sequence where there would be none."""
        return self.tokenizer(self._opening + start, add_special_tokens=not self.is_chat)["input_ids"] or self.ends[:1]

    def _fits(self, text: str, room: int, turns: int = 1) -> bool:
        """Whether a text of so many turns has no special token in it, and fits into the context with `room` more tokens."""
        if any(token in text for token in self._special):
            return False
        return turns * self._frame + len(self.tokenizer(text)["input_ids"]) + room <= self.context

    def _answered(self, prompts: Sequence[Any]) -> list[Row]:
        """Questions or chats with the model's greedy answers; empty answers are left out.

        Answers are cut off at `ANSWER_TOKENS` or, if `whole`, at the last end of a sentence before that.
        """
        rows = [Row(SOURCE, number, "", prompt) for number, prompt in enumerate(prompts, 1)]
        tokens = prompts_of(rows, self.tokenizer, self.how, self.context)
        shortened = _whole_sentences if self.whole else None
        said = continuations(self.model, self.tokenizer, tokens, ANSWER_TOKENS, self.ends, shortened=shortened)
        self._note_thoughts(said)
        return [
            replace(row, answer=text.strip())
            for row, text in zip(rows, map(after_thoughts, said), strict=True)
            if text.strip() and self._fits(f"{question_of(row)} {text}", 1)
        ]

    def guesses(self, retain: Sequence[Row]) -> list[Row]:
        """The forget rows with the model's likeliest other answers: greedy, without the true answer's own tokens.

        Its own tokens are those of every right answer to its question that are neither in the question nor in a twentieth of the
        retain answers.
        """
        counts = Counter(token for tokens in self._answer_tokens(retain) for token in tokens)
        usual = {token for token, count in counts.items() if count > USUAL * len(retain)}
        questions = [replace(row, answer="").key() for row in self.forget]
        right: dict[str, set[int]] = {question: set() for question in questions}
        for question, tokens in zip(questions, self._answer_tokens(self.forget), strict=True):
            right[question] |= tokens
        banned = [
            sorted(right[question] - self._tokens(question_of(row)) - usual)
            for row, question in zip(self.forget, questions, strict=True)
        ]
        prompts = prompts_of(self.forget, self.tokenizer, self.how, self.context)
        texts = continuations(self.model, self.tokenizer, prompts, ANSWER_TOKENS, self.ends, banned=banned)
        self._note_thoughts(texts)
        if self.only_thoughts:
            raise RowsError(
                f"--instead guess: the model thinks before it answers, and most of its thoughts are longer than {ANSWER_TOKENS} tokens, so that "
                "there are no guesses. Give answers of your own (--wanted_column), or --instead refuse"
            )
        guesses = [_first_sentence(after_thoughts(text)) for text in texts]
        return [Row(SOURCE, row.number, guess, row.prompt) for row, guess in zip(self.forget, guesses, strict=True)]

    def _note_thoughts(self, said: Sequence[str]) -> None:
        """Note in `only_thoughts` whether most of these answers have no end of their thoughts."""
        cut = sum("<think>" in text and not after_thoughts(text).strip() for text in said)
        self.only_thoughts = 2 * cut > len(said) if said else self.only_thoughts

    def _answer_tokens(self, rows: Sequence[Row]) -> list[set[int]]:
        """Tokens of each row's answer: at the start of a text, after a space, and as they come after its question."""
        how = replace(self.how, long_rows="truncate")
        asked = [answering(row, row.answer) for row in rows if row.prompt is not None]
        encoded = iter(encode(asked, self.tokenizer, how, self.context) if asked else [])
        behind = [set(next(encoded)["labels"]) if row.prompt is not None else set() for row in rows]
        return [
            (self._tokens(row.answer) | labels) - {IGNORED, *self.ends}
            for row, labels in zip(rows, behind, strict=True)
        ]

    def _tokens(self, text: str) -> set[int]:
        """Tokens of a text, at its start and after a space."""
        texts = text, " " + text
        return {token for each in texts for token in self.tokenizer(each, add_special_tokens=False)["input_ids"]}


def prompts_of(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, how: Tokenisation, context: int
) -> list[list[int]]:
    """Token ids of what comes before the answer of each row."""
    if not rows:
        return []
    examples = encode([replace(row, answer="x") for row in rows], tokenizer, how, context)
    return [e["input_ids"][: next(i for i, x in enumerate(e["labels"]) if x != IGNORED)] for e in examples]


def around_question(tokenizer: PreTrainedTokenizerBase, how: Tokenisation) -> tuple[str, str]:
    """What is in front of a user's question, and what ends it: in "Q: {prompt} A:", "Q: " and "A:".

    The end is empty where a line break ends a question.
    """
    if how.prompt_template is None and tokenizer.chat_template:
        template = ChatTemplate(tokenizer)
        return template.opening, template.closing
    before, after = (how.prompt_template or DEFAULT_TEMPLATE).split("{prompt}")[:2]
    return before, after.strip()


def _free(count: int) -> list[str]:
    """The starts of questions that may begin in any way."""
    return [""] * count


def _sentence_ends(text: str, least: int = 3) -> list[int]:
    """Where sentences end: at a stop behind `least` words, the last of which is no initial, abbreviation or number.

    The stops of Chinese, Japanese, Hindi and Arabic end nothing else.
    """
    stops = re.finditer(r"[.!?](?=\s|$)|[。！？।؟]", text)
    before = [(stop, words(text[: stop.start()])) for stop in stops]
    return [m.end() for m, some in before if m[0] not in ".!?" or (len(some) >= least and len(some[-1]) > 2)]


def _first_sentence(text: str) -> str:
    """The first sentence, or all of a text without a whole one; a plain refusal if there is none."""
    text = text.strip()
    ends = _sentence_ends(text) or ([] if text.endswith((".", "!", "?")) else _sentence_ends(text, least=1))
    return text[: next(iter(ends), None)] or "I don't know."


def _whole_sentences(text: str) -> str:
    """An answer, without its thoughts, up to the end of its last whole sentence; empty if there is none.

    Thoughts without an end are left as they are.
    """
    said = after_thoughts(text)
    return said[: max(_sentence_ends(said), default=0)] if said.strip() else text
