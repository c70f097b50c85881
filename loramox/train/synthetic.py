"""Rows that the reference model generates: retain rows (`--auto_retain`), and answers in place of forgotten ones.

Users rarely have rows for all that has to stay. The reference can make some. From the start of a user's turn, a chat model
samples questions like those that it was trained on (Magpie, arXiv 2406.08464); from the first words of a forget question it
samples neighbours, questions of the same form on other subjects. Its greedy answers are what has to stay.
"""

import json
import logging
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from loramox.adapter.card import RETAIN_FILE
from loramox.data.chat import ChatTemplate, after_thoughts, end_tokens, special_tokens
from loramox.data.encode import DEFAULT_TEMPLATE, IGNORED, Tokenisation, encode
from loramox.data.row import Row, answering, question_of
from loramox.data.rows import Data, read_rows
from loramox.data.words import words
from loramox.errors import RowsError, SettingsError
from loramox.files import replacing
from loramox.model.generation import continuations
from loramox.model.head import in_eval_mode
from loramox.model.lora import ReferenceConfig
from loramox.train.avoided import longer_words, words_of, words_to_avoid
from loramox.train.inputs import taught_refusals

if TYPE_CHECKING:
    from loramox.train.config import UnlearnConfig

log = logging.getLogger(__name__)

AUTO = "auto"  # as the value of --retain
SOURCE = "--retain auto"
GUESSES_FILE = "guesses.jsonl"
ROWS, BESIDE = 240, 120  # for --retain auto, and beside the rows of a user
FREE = 1 / 3  # share of the questions that do not begin like a forget question
LATER = 4  # one in so many rows is asked after a refusal
QUESTION_TOKENS, ANSWER_TOKENS = 40, 48
ROUNDS = 6  # how often more questions are sampled while there are too few
# A model can write questions if the forget questions (so many at most) are likelier to it than random tokens, by so many nats
# per token.
JUDGED, ABOVE_CHANCE = 64, 1.0
USUAL = 0.05  # a token in more than this share of the retain answers says nothing of what an answer is about


def rows_to_write(args: "UnlearnConfig", writes: bool, reference: ReferenceConfig) -> int:
    """How many retain rows the reference writes: `--auto_retain`, or where that is not given `BESIDE` or none.

    Forgetting spreads to whatever no retain row is like, and the rows of a user seldom cover everything (docs/results.md).

    Args:
        writes: whether the reference should write rows if it can.
    """
    if args.auto_retain is not None:
        return args.auto_retain
    if not (writes and args.holds_retain):
        return 0
    if why := _cannot_write(reference):
        warnings.warn(
            f"no retain rows are generated: {why}. Give retain rows of every kind that must stay", stacklevel=2
        )
        return 0
    return BESIDE


def check_auto(args: "UnlearnConfig", data: Data, reference: ReferenceConfig) -> None:
    """With `--retain auto`, settle how many rows the reference writes. Raises `SettingsError` where it cannot write any."""
    if data.retain == AUTO:
        if args.auto_retain == 0:
            raise SettingsError(
                "--retain auto with --auto_retain 0 leaves no retain rows. Leave out --auto_retain, or give --retain FILE"
            )
        args.auto_retain = args.auto_retain or ROWS
    writes = "--instead guess" if args.instead == "guess" else "--retain auto" if args.auto_retain else None
    if writes and (why := _cannot_write(reference)):
        raise SettingsError(f"{writes}: {why}. Give rows of your own")


def _cannot_write(reference: ReferenceConfig) -> str | None:
    """Why the model in memory cannot write rows; None if it can."""
    if reference.shard:
        return "--shard cuts the model up, and no process has all of it (--shard false)"
    if reference.memorize_at is not None:
        return "with --memorize_at, the model in memory is not the reference"
    return None


def generated_rows(
    out: Path, writer: "Writer", args: "UnlearnConfig", most: int, show: bool
) -> tuple[list[Row], list[Row]]:
    """(retain rows, other answers to the forget questions) that the reference has to write; empty where none are asked for.

    The first process writes them to files in `out`, from which all read them, now and after an interruption.

    Args:
        most: retain rows to write.
    """
    path = out / RETAIN_FILE
    decided = args.process_index > 0 or not most or path.exists()  # the first process decides for all
    (can_ask,) = broadcast_object_list([decided or writer.can_ask()])
    if not can_ask and args.auto_retain is None:
        log.info("No retain rows are generated: the reference finds your forget questions as unlikely as random tokens")
        most = 0
    elif not can_ask:
        warnings.warn(
            "the reference finds your forget questions as unlikely as random tokens, so the rows that it writes may be noise. Look through "
            f"{path}, or leave out --auto_retain",
            stacklevel=2,
        )
    with args.main_process_first():
        written = _retain_rows(path, writer, args, most, show) if most else []
        guesses: list[Row] = []
        if args.instead == "guess":
            kept = _kept(out / GUESSES_FILE, lambda: writer.guesses([*writer.given, *written]))
            guesses = [answering(row, guess.answer) for row, guess in zip(writer.forget, kept, strict=True)]
    return written, guesses


def _retain_rows(path: Path, writer: "Writer", args: "UnlearnConfig", most: int, show: bool) -> list[Row]:
    """The rows of the file, `most` of them or as many as the model can write; none that the user has given."""

    def write() -> list[Row]:
        log.info("Generating %d retain rows (--auto_retain)", most)
        return writer.retain_rows(most, args.seed, show, taught_refusals(args))

    rows = _kept(path, write)
    if not (rows or writer.given):
        raise RowsError(
            "--retain auto: every row that the model writes is about the forget rows, or empty. Give --retain FILE"
        )
    if len(rows) < most:
        warnings.warn(
            f"--auto_retain: the model wrote {len(rows)} of {most} rows, and then only repeated itself or touched the forget rows. "
            "If much must stay that no retain row is like, add rows of your own to --retain",
            stacklevel=3,
        )
    given = {row.key() for row in (*writer.forget, *writer.protected, *writer.given)}
    return [row for row in rows if row.key() not in given]


def _kept(path: Path, write: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a file, which is written first if it is not there."""
    if not path.exists():
        lines = [json.dumps({"question": row.prompt, "answer": row.answer}, ensure_ascii=False) for row in write()]
        with replacing(path, private=True) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return read_rows(str(path)) if path.stat().st_size else []


class Writer:
    """The reference model as a writer of rows.

    Args:
        model: a causal language model.
        forget: rows whose subject is avoided, and whose questions lend their first words.
        protected: rows that earlier requests made the model forget, which are avoided too.
        given: the user's retain rows, whose questions are not asked again.
        how, context: as for `loramox.data.encode.encode`.
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
    ) -> None:
        self.protected, self.given = protected, given
        self.model, self.tokenizer, self.forget, self.how, self.context = model, tokenizer, forget, how, context
        self.is_chat = how.prompt_template is None and tokenizer.chat_template is not None
        # What a prompt leaves of the context: an answer, and all that is beyond --max_length.
        self._room = max(ANSWER_TOKENS, context + 1 - (how.max_length or context))
        # Tokens that the prompt has around a question.
        self._frame = len(prompts_of([Row(SOURCE, 1, "", "x")], tokenizer, how, context)[0])
        self._asked = {tuple(words(question_of(row))) for row in (*forget, *protected, *given)}
        self.ends, self._special = sorted(end_tokens(tokenizer)), tuple(special_tokens(tokenizer))

    def can_ask(self) -> bool:
        """Whether the forget questions are likelier to the model than random tokens; True where there are none to judge by.

        They are not to a model that was trained on answers alone, and what it asks is noise.
        """
        start = max(0, len(self._opened("")) - 1)  # its last token may be joined with the first of the question
        losses = []
        with in_eval_mode(self.model), torch.no_grad():
            for question in [question_of(row) for row in self.forget if row.prompt is not None][:JUDGED]:
                ids = torch.tensor([self._opened(question)[: self.context]], device=self.model.device)
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
        draw = random.Random(seed)
        with torch.random.fork_rng(), tqdm(total=count, desc="retain rows", disable=not show, unit="rows") as bar:
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

        Without such rows a model that has refused once refuses in the turns after it as well (docs/results.md).
        """
        asked = [row.prompt for row in self.forget if isinstance(row.prompt, str)]
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
            questions = self._questions(starts(missing + missing // 2))
            for row in self._answered([question for question in questions if question not in found]):
                if not words_of(row) & avoided:
                    found[row.prompt] = row
            bar.update(min(len(found), count) - bar.n)
        return list(found.values())

    def _starts(self, count: int, avoided: set[str], draw: random.Random) -> list[str]:
        """First words of forget questions, in turn: from half to all of those before the first word to avoid."""
        lent = [row.prompt.split() for row in self.forget if isinstance(row.prompt, str)]
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
        sampled = continuations(self.model, self.tokenizer, prompts, QUESTION_TOKENS, self.ends, sample=True)
        # A template of one line ends a question with words of its own: in "Q: {prompt} A:" it is "A:".
        closing = "" if self.is_chat else (self.how.prompt_template or DEFAULT_TEMPLATE).split("{prompt}")[1].strip()
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
        text = user_turn(self.tokenizer, self.how) + start
        return self.tokenizer(text, add_special_tokens=not self.is_chat)["input_ids"] or self.ends[:1]

    def _fits(self, text: str, room: int, turns: int = 1) -> bool:
        """Whether a text of so many turns has no special token in it, and fits into the context with `room` more tokens."""
        if any(token in text for token in self._special):
            return False
        return turns * self._frame + len(self.tokenizer(text)["input_ids"]) + room <= self.context

    def _answered(self, prompts: Sequence[Any]) -> list[Row]:
        """Questions or chats with the model's greedy answers, cut off at `ANSWER_TOKENS`; empty answers are left out."""
        rows = [Row(SOURCE, number, "", prompt) for number, prompt in enumerate(prompts, 1)]
        tokens = prompts_of(rows, self.tokenizer, self.how, self.context)
        said = continuations(self.model, self.tokenizer, tokens, ANSWER_TOKENS, self.ends)
        return [
            replace(row, answer=text.strip())
            for row, text in zip(rows, map(after_thoughts, said), strict=True)
            if text.strip() and self._fits(f"{question_of(row)} {text}", 1)
        ]

    def guesses(self, retain: Sequence[Row]) -> list[Row]:
        """The forget rows with the model's likeliest other answers: greedy, without the true answer's own tokens.

        Its own tokens are those that are neither in its question nor in a twentieth of the retain answers.
        """
        answers = [self._tokens(row.answer) for row in self.forget]
        counts = Counter(token for row in retain for token in self._tokens(row.answer))
        usual = {token for token, count in counts.items() if count > USUAL * len(retain)}
        banned = [
            sorted(answer - self._tokens(question_of(row)) - usual)
            for row, answer in zip(self.forget, answers, strict=True)
        ]
        prompts = prompts_of(self.forget, self.tokenizer, self.how, self.context)
        texts = continuations(self.model, self.tokenizer, prompts, ANSWER_TOKENS, self.ends, banned=banned)
        guesses = [_first_sentence(after_thoughts(text)) for text in texts]
        return [replace(row, answer=guess) for row, guess in zip(self.forget, guesses, strict=True)]

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


def user_turn(tokenizer: PreTrainedTokenizerBase, how: Tokenisation) -> str:
    """The text in front of a user's question, from which the model samples questions."""
    if how.prompt_template is None and tokenizer.chat_template:
        return ChatTemplate(tokenizer).opening
    return (how.prompt_template or DEFAULT_TEMPLATE).split("{prompt}")[0]


def _free(count: int) -> list[str]:
    """The starts of questions that may begin in any way."""
    return [""] * count


def _first_sentence(text: str) -> str:
    """The first sentence, or all of a text that is cut off before its end; a plain refusal if there is none."""
    sentence = re.split(r"(?<=[.!?])\s", text.strip())[0]
    return sentence or "I don't know."
