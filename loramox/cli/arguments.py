"""From words on the command line, and a recipe, to settings; and the lines that a verb ends with."""

import argparse
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

from loramox.cli.launched import as_launched
from loramox.errors import LoramoxError, SettingsError

VERBS = {
    "demo": "make up a small world, train a model on it, and make it forget a part, with no download",
    "unlearn": "rows to forget and rows to retain in, a forget adapter out: memorize, then extrapolate",
    "memorize": "the first half of unlearn: train the memorization adapter",
    "extrapolate": "the second half: the forget adapter at a strength, in seconds, without training",
    "evaluate": "ask a model, with an adapter or without, what it still knows: records of every row, and metrics",
    "attack": "try to bring back what was forgotten: relearning, requantizing, asking otherwise",
    "sweep": "the whole frontier of a memorization adapter, strength by strength, and the strength to choose",
    "plan": "what a run will take, memory and time, before any weights are loaded, and which settings fit a card",
    "requests": "a ledger of requests that come one after another and may be revoked, and one adapter for all in force",
    "report": "what a run, its sweep and the attacks on it found, as one page and a summary",
    "ship": "bring a forget adapter to those who serve it: check (does it load there), merge (into the base's weights), gguf (for "
    "llama.cpp and Ollama), serve-folder (for transformers serve)",
}

STEPS = {  # of the verbs that have several
    "ship merge": "the adapter into the base's 16- or 32-bit weights, a few rows at a time; quantized afterwards, if it must be",
    "ship gguf": "the adapter as a LoRA GGUF, for llama.cpp and Ollama",
    "requests add": "memorize one more request and enter it; takes every setting of memorize",
    "requests list": "the requests, in order of arrival",
    "requests show": "all that is known of one request",
    "requests revoke": "take a request out, for good",
    "requests refresh": "memorize again what was memorized on top of revoked requests",
    "requests build": "the adapter for all requests in force",
    "requests verify": "compare every file with what it was when it was entered; exits with 1 when one differs",
}

USAGES = {
    "unlearn": "--model M --forget F --retain R --out DIR",
    "memorize": "--model M --forget F --retain R --out DIR",
    "evaluate": "--model M [--adapter A] (--forget F --retain R | --suite S) --out DIR",
    "attack": "--model M --adapter A --forget F --retain R --out DIR",
    "plan": "--model M --gpu_memory 12GB [--forget F --retain R]",
    "ship merge": "--adapter A --out DIR",
    "ship gguf": "--adapter A --out FILE.gguf",
    "sweep": "--memorization DIR/memorization --out DIR/sweep",
    "requests add LEDGER": "--forget F --retain R [--model M] [--id NAME]",
}


def settings_of(verb: str, words: list[str], *kinds: type, first: Sequence[str] = ()) -> tuple[Any, ...]:
    """One object of each kind, from an optional recipe and the flags after it; both win over the flags in `first`, and over what
    the config of `accelerate launch` asks for."""
    parser, words = _read(verb, words, kinds)
    if any(word.partition("=")[0] in ("--output_dir", "--output-dir") for word in words):
        raise SettingsError("--output_dir is set from --out, so that all parts of a run are in one folder. Give --out")
    return parse(parser, [*as_launched(verb), *first, *words])


def given_settings(verb: str, words: list[str], *kinds: type) -> set[str]:
    """The names of the settings that a recipe or a flag gives, whatever their values."""
    parser, words = _read(verb, words, kinds)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    return set(vars(parser.parse_known_args(words)[0]))


def _read(verb: str, words: list[str], kinds: Sequence[type]) -> tuple[Any, list[str]]:
    """The parser of a verb, and its words with a recipe's in the place of the recipe."""
    from transformers import HfArgumentParser

    from loramox.settings import recipe_as_flags

    parser = HfArgumentParser(
        kinds,
        prog=f"loramox {verb}",
        description=(VERBS | STEPS)[verb.removesuffix(" LEDGER")],
        usage=f"loramox {verb} [RECIPE.yaml] {USAGES[verb]} [--setting value …]",
        allow_abbrev=False,
    )
    if words and words[0].endswith((".yaml", ".yml")):
        words = recipe_as_flags(words[0], parser) + words[1:]
    for before, word in itertools.pairwise(words):
        if word.endswith((".yaml", ".yml")) and not before.startswith("-"):
            raise SettingsError(f"{word}: a recipe comes first, before all flags: loramox {verb} {word} …")
    return parser, words


def parse(parser: Any, words: list[str]) -> tuple[Any, ...]:
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except LoramoxError:
        raise
    except ValueError as error:  # transformers' own checks of its TrainingArguments
        raise SettingsError(str(error)) from error
    if unknown:
        from loramox.settings import meant

        known = [option for action in parser._actions for option in action.option_strings]
        near = meant(unknown[0], known)
        raise SettingsError(f"unknown argument {unknown[0]}{f'; did you mean {near}?' if near else ''}")
    return tuple(parsed)


def upload(what: str, config: Any) -> None:
    """Push what was shipped, if that was asked for, and list the files."""
    from loramox.extras.hub import push

    if config.push_to_hub is None:
        return
    files = push(what, config)
    done = "would be uploaded" if config.dry_run else "were uploaded"
    say(
        f"To {config.push_to_hub} {done}, and nothing else:",
        *(f"    {f.name} ({f.stat().st_size:,} bytes)" for f in files),
    )


def speaks() -> bool:
    """Whether this process is the first: of several, one speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(*lines: str) -> None:
    """Print lines. [bold], [bold red] and [/] are rich's markup; other brackets, as a path may have, are themselves."""
    if speaks():
        from rich.console import Console

        text = re.sub(r"\[(?=[a-z#/@])(?!bold\]|bold red\]|/\])", r"\\[", "\n".join(lines))
        Console(soft_wrap=True).print("\n", text, sep="", highlight=False)
