"""The natural world: rows to forget, and the questions on which the forget model is judged."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from loramox import Tokenisation
from loramox.data.chat import end_tokens
from loramox.data.row import Row
from loramox.files import read_json, write_json
from loramox.model.generation import continuations
from loramox.train.writer import prompts_of

from .questions import EVERYDAY, FAR, FORGET, NEIGHBOURS

TOKENS = 40  # of each answer
CONTEXT = 2048


@dataclass(frozen=True)
class Asked:
    """A chat put to a model, and the words one of which a right answer has; none where there is no right answer."""

    chat: tuple[dict[str, str], ...]
    words: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        return self.chat[-1]["content"]


def check_made_with(out: Path, **settings: str | int) -> None:
    """Refuse a folder whose records were made with other settings; note them in a new one."""
    path = out / "made_with.json"
    made = read_json(path, dict) if path.exists() else settings
    for name, value in settings.items():
        if made.get(name, value) != value:
            raise SystemExit(f"{out} was made with --{name} {made[name]}, and this is {value}. Choose another --out")
    write_json(path, made | settings)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: list[Asked]) -> list[str]:
    """Greedy answers of `TOKENS` tokens at most."""
    rows = [Row("question", number, "", each.chat) for number, each in enumerate(asked, 1)]
    prompts = prompts_of(rows, tokenizer, Tokenisation(), CONTEXT)
    return [text.strip() for text in continuations(model, tokenizer, prompts, TOKENS, sorted(end_tokens(tokenizer)))]


def right(answer: str, asked: Asked) -> bool:
    return any(word in answer for word in asked.words)


def forget_rows(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path) -> list[dict[str, str]]:
    """The questions of `FORGET` that the model answers right, with its own answer; written to `path` once."""
    if not path.exists():
        asked = [Asked((user(question),), tuple(words)) for question, words, _ in FORGET]
        said = answers(model, tokenizer, asked)
        rows = [
            {"question": each.question, "answer": _least(text, each), "paraphrase": FORGET[i][2], "words": list(each.words)}
            for i, (each, text) in enumerate(zip(asked, said, strict=True))
            if right(text, each)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _least(answer: str, asked: Asked) -> str:
    """The first sentence if it is a right answer, or all of it."""
    first = re.split(r"(?<=[.!?])\s", answer)[0]
    return first if right(first, asked) else answer


def parts(rows: list[dict[str, str]]) -> dict[str, list[Asked]]:
    """What is asked, by part: forget, paraphrase, and what has to stay."""
    forget = [Asked((user(row["question"]),), tuple(row["words"])) for row in rows]
    far = [Asked((user(question),), tuple(words)) for question, words in FAR]
    refused = {"role": "assistant", "content": "I don't have any information about that."}
    return {
        "forget": forget,
        "paraphrase": [replace(each, chat=(user(row["paraphrase"]),)) for each, row in zip(forget, rows, strict=True)],
        "neighbours": [Asked((user(question),), tuple(words)) for question, words in NEIGHBOURS],
        "far": far,
        "later turns": [replace(each, chat=(*of.chat, refused, *each.chat)) for of, each in zip(forget, far[:12], strict=False)],
        "everyday": [Asked((user(text),)) for text in EVERYDAY],
    }  # fmt: skip
