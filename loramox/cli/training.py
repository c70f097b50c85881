"""demo, unlearn, train, extrapolate: rows in, a forget adapter out. plan: the memory and time of a run, before it is started."""

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from loramox.cli.arguments import (
    USAGES,
    given_settings,
    parse,
    parser_of,
    plain_parser,
    say,
    settings_of,
    speaks,
    upload,
)
from loramox.errors import escaped


def demo(words: list[str]) -> None:
    parser = plain_parser("demo")
    parser.add_argument("--out", default="runs/demo", help="Folder to write (default: runs/demo).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the rows and of all training (default: 0).")
    parser.add_argument("--overwrite", action="store_true", help="Replace the demo in that folder.")
    given = parser.parse_args(words)
    from loramox.demo import demo

    demo(given.out, given.seed, given.overwrite)


def unlearn(words: list[str]) -> None:
    from loramox.adapter.export import ShippingConfig
    from loramox.train.synthetic import AUTO, RETAIN_FILE
    from loramox.unlearning import SHIPPED, TRAINED, unlearn

    run, reference, data, args, *settings = fitted("unlearn", words, (*training_kinds(), ShippingConfig))
    columns, tokenisation, _ = settings
    record = unlearn(run, reference, data, args, *settings)
    shipped = record["forget_adapter"]
    cpu = ["--use_cpu", "true"] if args.use_cpu else []
    retain = f"{run.out}/{RETAIN_FILE}" if data.retain == AUTO else data.retain
    overlap = ["--drop_overlap", "true"] if data.drop_overlap else []
    sources = ["--forget", data.forget, "--retain", retain, *overlap, *cpu]
    rows = shlex.join(sources)  # the sweep knows how training read and tokenised them
    show_side_by_side(record)
    program = (
        f"torchrun --nproc_per_node {record['settings']['processes']} -m loramox" if reference.shard else "loramox"
    )
    unit = "scale" if shipped["alpha"] is None else "alpha"
    say(
        f"[bold]{run.out}/{SHIPPED}[/] is the forget adapter: {made_at(shipped['alpha'], record['method'])}, rank {shipped['rank']}",
        *ended(record),
        *watched(record),
        f"[bold]{run.out}/run.json[/] is the record of the run. Training curves: tensorboard --logdir {shlex.quote(run.out)}",
        *not_as_served(reference, run.out, shlex.join([*sources, *_given(columns, tokenisation)])),
        f"Next, score it at several values of {unit}, without training: {program} sweep --trained {shlex.quote(f'{run.out}/{TRAINED}')} {rows} "
        f"--out {shlex.quote(f'{run.out}/sweep')}",
    )


def _given(*settings: Any) -> list[str]:
    """The settings that differ from their defaults, as flags."""
    values = {field.name: (getattr(each, field.name), field.default) for each in settings for field in fields(each)}
    return [word for name, (value, default) in values.items() if value != default for word in (f"--{name}", str(value))]


def show_side_by_side(record: dict[str, Any]) -> None:
    """Print the answers of both models to a few questions, worst first, and a summary of all questions asked."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    found = record.get("side_by_side", {})
    if not (speaks() and found.get("shown")):
        return
    table = Table("", "question", "reference", "forget model", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in found["shown"]:
        table.add_row(row["part"], *(escape(escaped(row[name])) for name in ("question", "reference", "forget_model")))
    Console().print(table)
    if forget := found.get("forget"):
        say(
            f"{forget['fluent']} of {forget['asked']} answers to forget questions are fluent. They contain {forget['leaked']:.0%} of the key words of "
            f"the true answers (reference: {forget['reference']:.0%})"
        )
    if retain := found.get("retain"):
        say(
            f"{retain['kept']} of {retain['asked']} retain questions get the same answer as before; {retain['fluent']} answers are fluent, "
            f"{retain.get('refused', 0)} are refusals"
        )


def not_as_served(reference: Any, out: str, rows: str) -> list[str]:
    """Where training had the base in few bits: how to score the adapter on the weights that servers load."""
    if reference.quantization == "none":
        return []
    from loramox.unlearning import COMBINED, SHIPPED

    folder = COMBINED if reference.tuned_adapter else SHIPPED
    loaded = ["--model", reference.model]
    loaded += ["--revision", reference.revision] if reference.revision else []
    loaded += ["--attn_implementation", reference.attn_implementation] if reference.attn_implementation else []
    loaded += ["--trust_remote_code", "true"] if reference.trust_remote_code else []
    adapter = shlex.join([*loaded, "--adapter", f"{out}/{folder}"])
    return [
        f"It was trained on the base quantized to {reference.quantization}. If you serve 16-bit weights, score it on them: loramox evaluate "
        f"{adapter} {rows} --quantization none --out {shlex.quote(f'{out}/served')}"
    ]


def made_at(alpha: float | None, method: str) -> str:
    """How far a forget adapter goes, in words."""
    return f"as trained by {method}" if alpha is None else f"alpha = {alpha:g}"


def ended(record: dict[str, Any]) -> list[str]:
    """Whether training ended before its plan, and what `--forget_to` chose."""
    from loramox.train.target import said

    early, chosen = record.get("ended_early"), record.get("forget_to")
    return [
        *([f"Training ended after epoch {early['epoch']:g} ({early['why']})"] if early else []),
        *([said(chosen)] if chosen and chosen["met"] else []),  # else it is among the warnings
    ]


def watched(record: dict[str, Any]) -> list[str]:
    """The scores of the rows watched while training, if any, from first to last; and warnings with what to change."""
    from loramox.train.diagnostics import curve

    curves = {part: curve(record["log"], part) for part in ("forget", "retain")}
    warned = [f"[bold]Warning:[/] {each}" for each in record["advice"]]
    if min(map(len, curves.values())) < 2:
        return warned
    right = {part: curve(record["log"], part, "tokens_right") for part in curves}
    tokens = f"; share of their tokens that are the first choice: {_ends(right)}" if all(right.values()) else ""
    return [f"Mean probability of the true answers, on the rows scored in training: {_ends(curves)}{tokens}", *warned]


def _ends(curves: dict[str, list[float]]) -> str:
    return ", ".join(f"{part} {_shown(of[0])} → {_shown(of[-1])}" for part, of in curves.items())


def _shown(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.1e}"


def train(words: list[str]) -> None:
    from loramox.unlearning import SHIPPED, TRAINED, train

    run, reference, data, args, *settings = fitted("train", words, training_kinds())
    record = train(run, reference, data, args, *settings)
    what = "ΔW, from which the forget adapter is made; do not ship it"
    if args.alpha is None:
        what = "the model trained to forget, as an adapter"
    far = record.get("forget_to") or {"unit": "alpha", "at": args.alpha}
    flag = "" if far["at"] is None else f" --{far['unit']} {far['at']:g}"
    say(
        f"[bold]{run.out}/{TRAINED}[/] is {what}",
        *ended(record),
        *watched(record),
        f"[bold]{run.out}/run.json[/] is the record of the run",
        f"Next, write the forget adapter: loramox extrapolate {shlex.quote(f'{run.out}/{TRAINED}')}{flag} "
        f"--out {shlex.quote(f'{run.out}/{SHIPPED}')}",
    )


def extrapolate(words: list[str]) -> None:
    from loramox.adapter.export import ShippingConfig, extrapolate
    from loramox.extras.hub import PushConfig

    parser = parser_of("extrapolate", (ShippingConfig, PushConfig), USAGES["extrapolate"])
    parser.add_argument("trained", metavar="TRAINED", help="Folder 'trained' of a run.")
    parser.add_argument(
        "--alpha",
        type=float,
        help="How far to extrapolate, θ_for = θ_ref − alpha·ΔW. Default: the alpha of training. Methods without alpha take none.",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="For a method without alpha: θ_for = θ_ref + scale·ΔW. Default: 1, as trained.",
    )
    parser.add_argument("--out", required=True, help="Folder to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the adapter in that folder.")
    shipping, pushing, given = parse(parser, words)
    made = extrapolate(given.trained, given.out, given.alpha, shipping, given.overwrite, given.scale)
    say(
        f"[bold]{given.out}[/] is the forget adapter: {made_at(made['alpha'], made['method'])}, rank {made['rank']}, "
        f"truncation error {made['truncation_error']:.2g} of ‖ΔW‖",
        f"Load it: PeftModel.from_pretrained(base, {given.out!r}). Its README.md shows how to switch it off, scale and merge it",
    )
    upload(given.out, pushing)


def training_kinds() -> tuple[type, ...]:
    """The settings of a verb that trains, in the order in which `train` takes them."""
    from loramox.data.encode import Tokenisation
    from loramox.data.rows import Columns, Data
    from loramox.model.lora import ReferenceConfig
    from loramox.run import RunConfig
    from loramox.train.config import UnlearnConfig

    return (RunConfig, ReferenceConfig, Data, UnlearnConfig, Columns, Tokenisation)


def plan(words: list[str]) -> None:
    from loramox.data.encode import Tokenisation
    from loramox.data.rows import Columns
    from loramox.extras.plan.config import PlanConfig
    from loramox.extras.plan.job import plan
    from loramox.extras.plan.show import show_plan
    from loramox.model.lora import ReferenceConfig
    from loramox.train.config import UnlearnConfig

    kinds = (PlanConfig, ReferenceConfig, UnlearnConfig, Columns, Tokenisation)
    show_plan(plan(*settings_of("plan", words, *kinds), given=given_settings("plan", words, *kinds)))  # type: ignore[misc]


def fitted(verb: str, words: list[str], kinds: Sequence[type]) -> tuple[Any, ...]:
    """The settings of a verb that trains; with --fit, those not given are the fastest that are predicted to fit."""
    from loramox.extras.plan.config import FitConfig

    kinds = (*kinds, FitConfig)
    *settings, wanted = settings_of(verb, words, *kinds)
    if wanted.fit is None:
        return tuple(settings)
    from loramox.extras.plan.job import fit

    choice, estimate = fit(wanted.fit, *settings[:6], given=given_settings(verb, words, *kinds))  # type: ignore[misc]
    flags = choice.flags()
    predicted = (
        f", with a predicted peak of {estimate.peak / 2**30:.2f} GB" if estimate else ", as this run was started"
    )
    say(f"--fit {wanted.fit} takes [bold]{shlex.join(flags)}[/]{predicted}")
    *settings, _ = settings_of(verb, words, *kinds, first=flags)
    return tuple(settings)
