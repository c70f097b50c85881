"""The chat template: messages → the prompt that a server sends, the answer after it, and the token that ends the answer."""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from loramox.data.messages import REASONING
from loramox.errors import ModelError, RowsError

# A template that prints the date would make other tokens of a row each day. This is Llama 3's own day where it has no clock.
# A macro before the template, because transformers turns a function that is given to a template into text.
SOME_DAY = datetime(2024, 7, 26)
_CLOCK = "".join(f"|replace('%{sign}', '{SOME_DAY.strftime('%' + sign)}')" for sign in "aAbBdHIjmMpSyY")
STOPPED_CLOCK = f"{{%- macro strftime_now(format) -%}}{{{{ format{_CLOCK} }}}}{{%- endmacro %}}{{{{ '' }}}}"

Messages = Sequence[dict[str, str]]
Reasoning = tuple[tuple[str, str], ...]  # (key of a message, text)

# Stand in for a question and an answer, and mark a text. No text that means anything has them: they are for private use.
_QUESTION, _ANSWER, _MARK = "\ue000", "\ue001", "\ue002"
_OPENS_A_BLOCK = re.compile(r"<\w+>\s*$")  # <think>: what comes next is no answer


class ChatTemplate:
    """A tokenizer's chat template, tried on one question.

    The prompt of a row is the one that a server sends, with two exceptions. Where a finished turn has more before its answer
    (Qwen 3: an empty thinking block), so has the prompt. Where a server's prompt opens a thinking block (DeepSeek-R1), the
    prompt is that of a finished turn. The prompt of a row with reasoning is a server's: reasoning and answer come after it.

    Attributes:
        opening: what stands before a question.
        trained: what stands between a question and its answer in training and evaluation.
        served: what a server puts after a question, for the model to go on from. As a rule the same.
        closing: what ends a question: `served` up to its first added token, or that token where nothing is in front of it.
        end: the token that the template puts behind an answer, None where it puts none there.

    Raises:
        ModelError: the tokenizer has no template that can be used; the message says why.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = any_of(token.content for token in tokenizer.added_tokens_decoder.values())
        question = ({"role": "user", "content": _QUESTION},)
        try:
            template = tokenizer.get_chat_template()
            self._template = STOPPED_CLOCK + template if "strftime_now" in template else template
            before, _, after = self._render([*question, _said(_ANSWER)], finished=True).rpartition(_ANSWER)
            served = self._render(question)
            if _QUESTION not in before or _QUESTION not in served:
                raise ValueError("it leaves out the question or the answer")
        except Exception as error:  # a template is a program and may raise anything
            raise ModelError(
                f"{tokenizer.name_or_path or 'tokenizer'}: the tokenizer's chat template cannot be used: {_why(tokenizer, error)}. Correct "
                "it, or give question/answer rows and the text around a question with --prompt_template"
            ) from error
        self.opening = served.partition(_QUESTION)[0]
        longer = before.removeprefix(served) if before.startswith(served) else ""
        self._as_finished = bool(longer.strip() or _OPENS_A_BLOCK.search(served.removeprefix(before)))
        # White space before an answer is the model's to say.
        self._gap = "" if self._as_finished else longer
        self.served = served.rpartition(_QUESTION)[2]
        first = self._added.search(self.served)
        self.closing = self.served[: first.start() if first else None].strip() or (first.group() if first else "")
        self.trained = before.rpartition(_QUESTION)[2] if self._as_finished else self.served
        found = self._added.search(after)
        self.end = found.group() if found else None

    def text(
        self, messages: Messages, answer: str, where: str, as_served: bool = False, reasoning: Reasoning = ()
    ) -> tuple[str, str]:
        """(prompt, prompt + reasoning + answer + the token that ends it). With `as_served` the prompt is a server's in any case.

        Raises:
            RowsError: the template refuses the messages of the row at `where`, or leaves out some of the answer or of the
                reasoning.
        """
        chat, another = ([*messages, _said(text, reasoning)] for text in (answer, _ANSWER))
        try:
            full, other = (self._render(each, finished=True) for each in (chat, another))
            prompt = self._render(messages)
            unread = self._unread(chat)
        except Exception as error:
            raise RowsError(
                f"{where}: the model's chat template refuses it: {error}. Let user and assistant take turns, put a system message's text "
                "at the start of the first user message, or leave out the row"
            ) from error
        # The answer is where another answer would be.
        finished = os.path.commonprefix([full, other])  # noqa: RUF071 (characters, not folders)
        tail = os.path.commonprefix([full[::-1], other[::-1]])[::-1]  # noqa: RUF071
        if unread:
            raise RowsError(
                f"{where}: the model's chat template leaves out {', '.join(unread)}. Remove it, or give the whole text as prompt and completion"
            )
        if not _has(full, answer):
            raise RowsError(
                f"{where}: the model's chat template leaves out a part of the answer (a thinking block, as a rule). Remove that part"
            )
        gap = self._gap
        if reasoning:
            if not full.startswith(prompt):
                raise RowsError(
                    f"{where}: the model's chat template puts reasoning elsewhere than behind the prompt that a server sends. Remove it, or "
                    "give the whole text as prompt and completion"
                )
            finished, gap = prompt, ""
        elif self._as_finished and not as_served:
            prompt = finished
        # What a template puts behind the end of a turn (a line break, another end) is not the model's to say.
        end = self._added.search(tail)
        said = full[len(finished) : len(full) - len(tail)] + (tail[: end.end()] if end else tail)
        return prompt, prompt + gap + said

    def _unread(self, chat: Messages) -> list[str]:
        """The reasoning in a finished chat that the template leaves out of it or of the prompt, or renders in part."""
        found = []
        for place, message in enumerate(chat):
            for key in [key for key in REASONING if key in message]:
                marked = _MARK + message[key] + _MARK
                changed = [*chat[:place], {**message, key: marked}, *chat[place + 1 :]]
                texts = [self._render(changed, finished=True)]
                if place < len(chat) - 1:
                    texts.append(self._render(changed[:-1]))
                if not all(_has(text, marked) for text in texts):
                    found.append(f"{key} of message {place + 1}")
        return found

    def _render(self, chat: Messages, finished: bool = False) -> str:
        """The text of a finished chat or, of one that is not, the prompt that a server makes of it."""
        return str(
            self._tokenizer.apply_chat_template(
                list(chat), tokenize=False, chat_template=self._template, add_generation_prompt=not finished
            )
        )


def _said(answer: str, reasoning: Reasoning = ()) -> dict[str, str]:
    return {"role": "assistant", "content": answer, **dict(reasoning)}


def _has(text: str, part: str) -> bool:
    """Whether a part is in a text, white space aside: templates trim."""
    return "".join(part.split()) in "".join(text.split())


def after_thoughts(text: str) -> str:
    """What a model says behind its thinking block; nothing where the block has no end."""
    _, ends, said = text.rpartition("</think>")
    return said if ends or not text.lstrip().startswith("<think>") else ""


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: end of sequence, and the one that the chat template puts behind it."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        with suppress(ModelError):  # a broken template matters to rows that go through it
            if end := ChatTemplate(tokenizer).end:
                ends.add(tokenizer.convert_tokens_to_ids(end))
    return frozenset(ends - {None})


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The texts that a tokenizer makes one token of that no text has, and ends of an answer."""
    added, ends = tokenizer.added_tokens_decoder, end_tokens(tokenizer)
    return {t.content: number for number, t in added.items() if t.content.strip() and (t.special or number in ends)}


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these tokens in a text, the longest of those that begin at one place."""
    longest_first = sorted(filter(str.strip, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _why(tokenizer: PreTrainedTokenizerBase, error: Exception) -> str:
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        return f"it has several ({', '.join(sorted(templates))}) and none named default"
    return str(error).rstrip(".")
