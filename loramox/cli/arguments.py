"""Turn command-line flags and recipes into settings, and print the last lines of a verb."""

import argparse
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loramox.cli.launched import as_launched
from loramox.errors import LoramoxError, SettingsError, escaped
from loramox.settings import meant, recipe_as_flags, refuse_replaced

VERBS = {
    "demo": "train a small model on a synthetic world and make it forget part of it; downloads nothing",
    "unlearn": "make a forget adapter from a forget set and a retain set: train, then extrapolate",
    "train": "the first half of unlearn: train the adapter, ΔW",
    "extrapolate": "the second half of unlearn: write the forget adapter, at any alpha, in seconds",
    "evaluate": "score a model, with or without an adapter, on the forget and retain sets",
    "attack": "try to recover the forgotten rows: relearning, quantizing, other forms and contexts, sampling, base and adapter combined",
    "sweep": "score a run at many alphas, plot the trade-off, and choose an alpha",
    "plan": "estimate memory, and the time of an epoch, before any weights are loaded, and find settings that fit a GPU",
    "requests": "a ledger of unlearning requests that arrive over time and can be revoked, and one adapter for all of them",
    "report": "summarize a run, its sweep and its attacks on one HTML page",
    "ship": "check, merge or convert a forget adapter for serving",
}

STEPS = {  # of the verbs that have several
    "ship check": "test whether the adapter loads in PEFT, vLLM, SGLang, llama.cpp and Ollama",
    "ship merge": "merge the adapter into the base's 16- or 32-bit weights, and quantize the result if you want",
    "ship gguf": "convert the adapter to a LoRA GGUF, for llama.cpp and Ollama",
    "ship serve-folder": "lay out a folder for transformers serve",
    "requests add": "train an adapter for one more request and enter it in the ledger; takes every setting of train",
    "requests list": "list the requests in order of arrival",
    "requests show": "show the entry of one request",
    "requests revoke": "remove a request for good",
    "requests refresh": "train again the requests that were trained on top of revoked ones",
    "requests build": "write one adapter for all requests in force",
    "requests verify": "compare every file with its checksum in the ledger; exits with 1 when one differs",
}

USAGES = {
    "unlearn": "--model M --forget F --retain R --out DIR",
    "train": "--model M --forget F --retain R --out DIR",
    "evaluate": "--model M [--adapter A] (--forget F --retain R | --suite S) --out DIR",
    "attack": "--model M --adapter A --forget F --retain R --out DIR",
    "plan": "--model M --gpu_memory 12GB [--forget F --retain R]",
    "ship merge": "--adapter A --out DIR",
    "ship gguf": "--adapter A --out FILE.gguf",
    "sweep": "--trained DIR/trained (--forget F --retain R | --suite tofu) --out DIR/sweep",
    "extrapolate": "TRAINED --out DIR [--alpha A | --scale S] [--setting value …]",
    "requests build": "LEDGER --out DIR [--setting value …]",
    "requests add LEDGER": "--forget F --retain R [--model M] [--id NAME]",
}


def refuse_replaced_flags(words: Sequence[str]) -> None:
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            refuse_replaced(flag.removeprefix("--"), flag)


def settings_of(verb: str, words: list[str], *kinds: type, first: Sequence[str] = ()) -> tuple[Any, ...]:
    """One object of each kind, from an optional recipe and the flags after it; both win over the flags in `first`, and over the
    config of `accelerate launch`."""
    parser, words = _read(verb, words, kinds)
    if any(word.partition("=")[0] in ("--output_dir", "--output-dir") for word in words):
        raise SettingsError("--output_dir is set from --out, so that all parts of a run are in one folder. Give --out")
    return parse(parser, [*as_launched(verb), *first, *words])


def given_settings(verb: str, words: list[str], *kinds: type) -> set[str]:
    """The names of the settings that a recipe or a flag gives."""
    parser, words = _read(verb, words, kinds)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    return set(vars(parser.parse_known_args(words)[0]))


def parser_of(verb: str, kinds: Sequence[type], usage: str) -> Any:
    from loramox.cli.help import Parser

    description = (VERBS | STEPS)[verb.removesuffix(" LEDGER")]
    return Parser(kinds, prog=f"loramox {verb}", description=description, usage=f"loramox {verb} {usage}")


def plain_parser(verb: str, note: str = "") -> argparse.ArgumentParser:
    """The parser of a verb, or of a step of one, that has a few flags of its own and no settings."""
    description = (VERBS | STEPS)[verb] + note
    return argparse.ArgumentParser(prog=f"loramox {verb}", description=description, allow_abbrev=False)


def run_step(verb: str, steps: Mapping[str, Callable[[list[str]], None]], words: list[str]) -> None:
    """Run the step of a verb that the first word names."""
    parser = argparse.ArgumentParser(
        prog=f"loramox {verb}",
        description=VERBS[verb],
        epilog="steps:\n" + "\n".join(f"  {step:13} {STEPS[f'{verb} {step}']}" for step in steps),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=steps, metavar="STEP", help=", ".join(steps))
    steps[parser.parse_args(words[:1]).step](words[1:])


def _read(verb: str, words: list[str], kinds: Sequence[type]) -> tuple[Any, list[str]]:
    """The parser of a verb, and its words with the recipe replaced by the flags that it stands for."""
    parser = parser_of(verb, kinds, f"[RECIPE.yaml] {USAGES[verb]} [--setting value …]")
    if words and words[0].endswith((".yaml", ".yml")):
        words = recipe_as_flags(words[0], parser) + words[1:]
    for before, word in itertools.pairwise(words):
        if word.endswith((".yaml", ".yml")) and not before.startswith("-"):
            raise SettingsError(f"{word}: a recipe comes first, before all flags: loramox {verb} {word} …")
    return parser, words


def parse(parser: Any, words: list[str]) -> tuple[Any, ...]:
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except LoramoxError:
        raise
    except ValueError as error:  # transformers' own checks of its TrainingArguments
        raise SettingsError(str(error)) from error
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = meant(unknown[0], known)
        raise SettingsError(f"unknown argument {unknown[0]}{f'; did you mean {near}?' if near else ''}")
    return tuple(parsed)


def upload(what: str, config: Any) -> None:
    """Upload the shipped folder or file if --push_to_hub is given, and list the files."""
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
    """Whether this process prints: only the first of several does."""
    return os.environ.get("RANK", "0") == "0"


def say(*lines: str) -> None:
    """Print lines. [bold], [bold red] and [/] are rich's markup; all other brackets, as in paths, are printed as they are."""
    if speaks():
        from rich.console import Console

        text = re.sub(r"\[(?=[a-z#/@])(?!bold\]|bold red\]|/\])", r"\\[", escaped("\n".join(lines)))
        Console(soft_wrap=True).print("\n", text, sep="", highlight=False)
