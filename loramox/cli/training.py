"""demo, unlearn, memorize, extrapolate: rows in, a forget adapter out."""

import argparse
import shlex
from typing import Any

from loramox.cli.arguments import VERBS, parse, say, upload
from loramox.cli.planning import fitted


def demo(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="loramox demo", description=VERBS["demo"])
    parser.add_argument("--out", default="runs/demo", help="Folder to write (default: runs/demo).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the world and of all training (default: 0).")
    parser.add_argument("--overwrite", action="store_true", help="Replace the demo in that folder.")
    given = parser.parse_args(words)
    from loramox.demo import demo

    demo(given.out, given.seed, given.overwrite)


def unlearn(words: list[str]) -> None:
    from loramox.adapter.export import ShippingConfig
    from loramox.unlearning import SHIPPED, unlearn

    run, reference, data, *settings = fitted("unlearn", words, (*any_method(), ShippingConfig))
    record = unlearn(run, reference, data, *settings)
    shipped = record["forget_adapter"]
    dialled = shipped["strength"] > 0
    made = f"strength α = {shipped['strength']:g}" if dialled else f"as trained by {record['method']}"
    cpu = ["--use_cpu", "true"] if settings[0].use_cpu else []
    rows = shlex.join(["--forget", data.forget, "--retain", data.retain, *cpu])
    cut = ["--shard", "true"] if reference.shard else []
    model = shlex.join(["--model", reference.model, "--quantization", reference.quantization, *cut])
    program = f"torchrun --nproc_per_node {record['settings']['processes']} -m loramox" if cut else "loramox"
    say(
        f"[bold]{run.out}/{SHIPPED}[/] is the forget adapter: {made}, rank {shipped['rank']}",
        *watched(record),
        f"[bold]{run.out}/run.json[/] is the record; the curves: tensorboard --logdir {run.out}",
        f"Next, what each strength is worth, without training: {program} sweep --memorization {run.out}/memorization {rows} --out {run.out}/sweep"
        if dialled
        else f"Next, what it forgot: {program} evaluate {model} --adapter {run.out}/{SHIPPED} {rows} --out {run.out}/evaluation",
    )


def watched(record: dict[str, Any]) -> list[str]:
    """What became of the rows that were watched while training, when they were; and what to do where it went wrong."""
    from loramox.train.diagnostics import curve

    curves = {part: curve(record["log"], part) for part in ("forget", "retain")}
    warned = [f"[bold]Warning:[/] {each}" for each in record["advice"]]
    if min(map(len, curves.values())) < 2:
        return warned
    right = {part: curve(record["log"], part, "tokens_right") for part in curves}
    tokens = f"; share of their tokens that are the first choice: {_ends(right)}" if all(right.values()) else ""
    return [f"On the rows watched, probability of the true answers: {_ends(curves)}{tokens}", *warned]


def _ends(curves: dict[str, list[float]]) -> str:
    return ", ".join(f"{part} {_shown(of[0])} → {_shown(of[-1])}" for part, of in curves.items())


def _shown(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.1e}"


def memorize(words: list[str]) -> None:
    from loramox.unlearning import FOLDER, memorize

    run, *settings = fitted("memorize", words, any_method())
    record = memorize(run, *settings)
    strength = settings[2].strength
    what = "the memorization adapter (not for shipping)" if strength > 0 else "the adapter as trained"
    alpha = f" --alpha {strength:g}" if strength > 0 else ""
    say(
        f"[bold]{run.out}/{FOLDER}[/] is {what}, [bold]{run.out}/run.json[/] the record",
        *watched(record),
        f"Next: loramox extrapolate {run.out}/{FOLDER}{alpha} --out {run.out}/forget-adapter",
    )


def extrapolate(words: list[str]) -> None:
    from transformers import HfArgumentParser

    from loramox.adapter.export import ShippingConfig, extrapolate
    from loramox.extras.hub import PushConfig

    kinds = (ShippingConfig, PushConfig)
    parser = HfArgumentParser(kinds, prog="loramox extrapolate", description=VERBS["extrapolate"], allow_abbrev=False)
    parser.add_argument("memorization", help="Folder 'memorization' of a run.")
    parser.add_argument(
        "--alpha", "--strength", dest="strength", type=float, help="α. Default: the one it was memorized for."
    )
    parser.add_argument("--out", required=True, help="Folder to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the adapter in that folder.")
    shipping, pushing, given = parse(parser, words)
    made = extrapolate(given.memorization, given.out, given.strength, shipping, given.overwrite)
    of = f"strength α = {made['strength']:g}" if made["strength"] > 0 else f"as trained by {made['method']}"
    say(
        f"[bold]{given.out}[/] is the forget adapter: {of}, rank {made['rank']}, "
        f"truncation error {made['truncation_error']:.2g} of ‖ΔW‖",
        f"Load it: PeftModel.from_pretrained(base, {given.out!r}); its README.md says how to switch and merge it",
    )
    upload(given.out, pushing)


def any_method() -> tuple[type, ...]:
    """What `memorizing` has, with the settings of every method in the place of MOX's."""
    from loramox.train.baseline_config import BaselineConfig
    from loramox.train.config import MemorizeConfig

    return tuple(BaselineConfig if kind is MemorizeConfig else kind for kind in memorizing())


def memorizing() -> tuple[type, ...]:
    from loramox.data.encode import Tokenisation
    from loramox.data.rows import Columns, Data
    from loramox.model.lora import ReferenceConfig
    from loramox.run import RunConfig
    from loramox.train.config import MemorizeConfig

    return (RunConfig, ReferenceConfig, Data, MemorizeConfig, Columns, Tokenisation)
