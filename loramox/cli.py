"""One command per verb: argument parsing and nothing else.

Nothing heavy is imported before a verb is known, so that `loramox --help` answers at once.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any

from loramox.errors import LoramoxError, SettingsError

VERBS = {
    "demo": "make up a small world, train a model on it, and make it forget a part, with no download",
    "unlearn": "rows to forget and rows to retain in, a forget adapter out: memorize, then extrapolate",
    "memorize": "the first half of unlearn: train the memorization adapter",
    "extrapolate": "the second half: the forget adapter at a strength, in seconds, without training",
    "evaluate": "ask a model, with an adapter or without, what it still knows: records of every row, and metrics",
    "attack": "try to bring back what was forgotten: relearning, requantizing, asking otherwise",
    "sweep": "the whole frontier of a memorization adapter, strength by strength, and the strength to choose",
    "report": "what a run, its sweep and the attacks on it found, as one page and a summary",
    "ship": "bring a forget adapter to those who serve it: check (does it load there), merge (into the base's weights)",
}

USAGES = {
    "unlearn": "--model M --forget F --retain R --out DIR",
    "memorize": "--model M --forget F --retain R --out DIR",
    "evaluate": "--model M [--adapter A] --forget F --retain R --out DIR",
    "attack": "--model M --adapter A --forget F --retain R --out DIR",
    "ship merge": "--adapter A --out DIR",
    "sweep": "--memorization DIR/memorization --out DIR/sweep",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line. Wrong input exits with 2 and one message that says what to do."""
    parser = argparse.ArgumentParser(
        prog="loramox",
        description="Make a language model forget rows, with a small LoRA adapter that can be dialled and switched off.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:12} {does}" for verb, does in VERBS.items())
        + "\n\n'loramox VERB --help' lists its flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    words = list(sys.argv[1:] if argv is None else argv)
    verb = parser.parse_args(words[:1]).verb
    _quieten_libraries()
    try:
        {
            "demo": _demo,
            "unlearn": _unlearn,
            "memorize": _memorize,
            "extrapolate": _extrapolate,
            "evaluate": _evaluate,
            "attack": _attack,
            "sweep": _sweep,
            "report": _report,
            "ship": _ship,
        }[verb](words[1:])
    except KeyboardInterrupt:
        again = ". The same command with --resume goes on" if verb in ("unlearn", "memorize") else ""
        print(f"loramox {verb}: interrupted; what is written is whole{again}", file=sys.stderr)
        sys.exit(130)
    except LoramoxError as error:
        # What libraries say, and is quoted in ours, may have many lines.
        print(f"loramox {verb}:", *str(error).split(), file=sys.stderr)
        sys.exit(2)


def _quieten_libraries() -> None:
    """Keep out of the way what libraries tell their developers, so that what is told to users is seen."""
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # reading a file of rows takes no time
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional CPU kernel that is not installed
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _unlearn(words: list[str]) -> None:
    from loramox.extrapolate import ShippingConfig
    from loramox.main_job import SHIPPED, unlearn

    run, *settings = _settings("unlearn", words, *_memorizing(), ShippingConfig)
    record = unlearn(run, *settings)
    shipped = record["forget_adapter"]
    _say(
        f"[bold]{run.out}/{SHIPPED}[/] is the forget adapter: strength α = {shipped['strength']:g}, rank {shipped['rank']}",
        *_watched(record["log"]),
        f"[bold]{run.out}/run.json[/] is the record; the curves: tensorboard --logdir {run.out}",
        f"Another strength, without training: loramox extrapolate {run.out}/memorization --alpha {shipped['strength'] / 2:g} --out NEW_FOLDER",
    )


def _watched(log: list[dict[str, float]]) -> list[str]:
    """What became of the rows that were watched while training, when they were."""
    curves = {
        part: [entry[name] for entry in log if (name := f"eval_{part}_probability") in entry]
        for part in ("forget", "retain")
    }
    if min(map(len, curves.values())) < 2:
        return []
    ends = [f"{part} {curve[0]:.3f} → {curve[-1]:.3f}" for part, curve in curves.items()]
    return [f"Probability of the true answers, on the rows watched: {', '.join(ends)}"]


def _memorize(words: list[str]) -> None:
    from loramox.memorize import FOLDER, memorize

    run, *settings = _settings("memorize", words, *_memorizing())
    memorize(run, *settings)
    _say(
        f"[bold]{run.out}/{FOLDER}[/] is the memorization adapter (not for shipping), [bold]{run.out}/run.json[/] the record",
        f"Next: loramox extrapolate {run.out}/{FOLDER} --alpha {settings[2].strength:g} --out {run.out}/forget-adapter",
    )


def _extrapolate(words: list[str]) -> None:
    from transformers import HfArgumentParser

    from loramox.extrapolate import ShippingConfig, extrapolate

    parser = HfArgumentParser(
        ShippingConfig, prog="loramox extrapolate", description=VERBS["extrapolate"], allow_abbrev=False
    )
    parser.add_argument("memorization", help="Folder 'memorization' of a run.")
    parser.add_argument(
        "--alpha", "--strength", dest="strength", type=float, help="α. Default: the one it was memorized for."
    )
    parser.add_argument("--out", required=True, help="Folder to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the adapter in that folder.")
    shipping, given = _parse(parser, words)
    made = extrapolate(given.memorization, given.out, given.strength, shipping, given.overwrite)
    _say(
        f"[bold]{given.out}[/] is the forget adapter: strength α = {made['strength']:g}, rank {made['rank']}, "
        f"truncation error {made['truncation_error']:.2g} of ‖ΔW‖",
        f"Load it: PeftModel.from_pretrained(base, {given.out!r}); its README.md says how to switch and merge it",
    )


def _demo(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="loramox demo", description=VERBS["demo"])
    parser.add_argument("--out", default="runs/demo", help="Folder to write (default: runs/demo).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the world and of all training (default: 0).")
    parser.add_argument("--overwrite", action="store_true", help="Replace the demo in that folder.")
    given = parser.parse_args(words)
    from loramox.demo import demo

    demo(given.out, given.seed, given.overwrite)


def _evaluate(words: list[str]) -> None:
    from loramox.batches import Tokenisation
    from loramox.evaluate.job import Asked, Subject, evaluate
    from loramox.evaluate.measure import ScoringConfig
    from loramox.evaluate.show import show
    from loramox.reference import ModelConfig
    from loramox.rows import Columns

    kinds = (Subject, ModelConfig, Asked, ScoringConfig, Tokenisation, Columns)
    subject, *settings = _settings("evaluate", words, *kinds)
    show(evaluate(subject, *settings))
    _say(
        f"[bold]{subject.out}[/] has summary.json, and records.jsonl with every row",
        f"If this model never saw the forget rows, compare others to it: loramox evaluate … --retrained {subject.out}"
        if subject.adapter is None
        else "Every strength at once: loramox sweep MEMORIZATION",
    )


def _attack(words: list[str]) -> None:
    from loramox.batches import Tokenisation
    from loramox.evaluate.attacks.job import RECORD, AttackConfig, attack
    from loramox.evaluate.measure import ScoringConfig
    from loramox.evaluate.show import show_states
    from loramox.reference import ModelConfig
    from loramox.rows import Columns, Data

    kinds = (AttackConfig, ModelConfig, Data, ScoringConfig, Tokenisation, Columns)
    config, *settings = _settings("attack", words, *kinds)
    show_states(attack(config, *settings)["states"])
    _say(f"[bold]{config.out}/{RECORD}[/] has these numbers; the records of every state are beside it")


def _sweep(words: list[str]) -> None:
    from loramox.evaluate.job import Asked
    from loramox.evaluate.measure import ScoringConfig
    from loramox.sweep_job import FRONTIER, PICTURE, SweepConfig, sweep

    config, *settings = _settings("sweep", words, SweepConfig, Asked, ScoringConfig)
    frontier = sweep(config, *settings)
    for choice in frontier["choices"]:
        of = f"α = {choice['strength']:g} ({choice['low']:g} to {choice['high']:g})" if choice["strength"] else "none"
        _say(f"rule [bold]{choice['rule']}[/]: {of}: {choice['reason']}")
    if frontier["warning"]:
        _say(f"[bold]Warning:[/] {frontier['warning']}")
    _say(
        f"[bold]{config.out}/{FRONTIER}[/] and [bold]{PICTURE}[/] are the frontier; each strength's records are beside them"
    )
    if frontier["chosen"] is None:
        _say(f"Rule {config.rule} chooses no strength: nothing is shipped")
    elif config.ship:
        _say(f"[bold]{config.ship}[/] is the forget adapter at the chosen strength")
    else:
        _say(f"Ship it: loramox extrapolate {config.memorization} --alpha {frontier['chosen']:g} --out NEW_FOLDER")


def _report(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="loramox report", description=VERBS["report"])
    parser.add_argument("run", metavar="RUN_DIR", help="Folder of a run, which may have sweep/ and attack/ in it.")
    given = parser.parse_args(words)
    from rich.markup import escape

    from loramox.evaluate.report import report

    made = report(given.run)
    _say(
        escape(made["verdict"]),
        f"[bold]{escape(str(made['page']))}[/] is the page, [bold]{escape(str(made['summary']))}[/] the same in short; nothing in them is loaded from elsewhere",
        *(f"Not in it: {escape(what)}" for what in made["missing"]),
    )


def _ship(words: list[str]) -> None:
    steps = {"check": _check, "merge": _merge}
    parser = argparse.ArgumentParser(prog="loramox ship", description=VERBS["ship"])
    parser.add_argument("step", choices=steps, metavar="STEP", help=", ".join(steps))
    steps[parser.parse_args(words[:1]).step](words[1:])


def _check(words: list[str]) -> None:
    from loramox.ship.check import check, stopped
    from loramox.ship.servers import SERVERS
    from loramox.ship.show import show_findings

    parser = argparse.ArgumentParser(
        prog="loramox ship check",
        description="Read an adapter folder as a stranger would, and say for each server whether it loads there. "
        "Exits with 0 when it loads on all that are asked, with 1 when one is stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder of the adapter.")
    parser.add_argument("--base", help="Folder or hub id of its base model. Default: the one it names, if it is here.")
    parser.add_argument(
        "--for", dest="servers", default=",".join(SERVERS), help=f"Servers to ask, of {', '.join(SERVERS)}."
    )
    given = parser.parse_args(words)
    servers = [name.strip() for name in given.servers.split(",")]
    findings = check(given.adapter, given.base, servers)
    show_findings(findings, servers)
    if stopped(findings, servers):
        sys.exit(1)


def _merge(words: list[str]) -> None:
    from loramox.ship.merge import MergeConfig, merge

    (config,) = _settings("ship merge", words, MergeConfig)
    made = merge(**vars(config))
    _say(
        f"[bold]{config.out}[/] is the merged model; {made['survived']['overall']:.1%} of ΔW survived the rounding",
        f"Load it: AutoModelForCausalLM.from_pretrained({config.out!r}). It has no switch any more, and is no proof of erasure",
    )


def _memorizing() -> tuple[type, ...]:
    from loramox.batches import Tokenisation
    from loramox.memorize import MemorizeConfig
    from loramox.reference import ReferenceConfig
    from loramox.rows import Columns, Data
    from loramox.run import RunConfig

    return (RunConfig, ReferenceConfig, Data, MemorizeConfig, Columns, Tokenisation)


def _settings(verb: str, words: list[str], *kinds: type) -> tuple[Any, ...]:
    """One object of each kind, from an optional recipe and the flags after it."""
    from transformers import HfArgumentParser

    from loramox.settings import recipe_as_flags

    parser = HfArgumentParser(
        kinds,
        prog=f"loramox {verb}",
        description=VERBS[verb.split()[0]],
        usage=f"loramox {verb} [RECIPE.yaml] {USAGES[verb]} [--setting value …]",
        allow_abbrev=False,
    )
    if words and words[0].endswith((".yaml", ".yml")):
        words = recipe_as_flags(words[0], parser) + words[1:]
    if any(word.partition("=")[0] in ("--output_dir", "--output-dir") for word in words):
        raise SettingsError("--output_dir is set from --out, so that all parts of a run are in one folder. Give --out")
    return _parse(parser, words)


def _parse(parser: Any, words: list[str]) -> tuple[Any, ...]:
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except LoramoxError:
        raise
    except ValueError as error:  # transformers' own checks of its TrainingArguments
        raise SettingsError(str(error)) from error
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise SettingsError(f"unknown argument {unknown[0]}{f'; did you mean {near[0]}?' if near else ''}")
    return tuple(parsed)


def _say(*lines: str) -> None:
    import os

    if os.environ.get("RANK", "0") == "0":
        from rich.console import Console

        Console(soft_wrap=True).print("\n", "\n".join(lines), sep="", highlight=False)
