"""The sweep: one memorization adapter, every strength, one load of the model. Where two rooms meet: extrapolate, evaluate."""

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from peft import PeftModel

from loramox.adapter.export import extrapolate
from loramox.adapter.folder import WEIGHTS, at_rank, check_base, read_factors, read_provenance, served_rank
from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns
from loramox.errors import AdapterError, RunError, SettingsError
from loramox.evaluate.evaluate import Asked, check_sides, described, questions_of, read_parts, read_retrained
from loramox.evaluate.measure import Record, ScoringConfig
from loramox.evaluate.records import SUMMARY, read_records, write_records
from loramox.evaluate.summary import summarise
from loramox.files import has_files, sha256_of, write_json
from loramox.model.config import ModelConfig, check_device, identify, read_config, several_processes
from loramox.model.load import load_reference
from loramox.model.lora import AS_TRAINED, at_strength, with_factors
from loramox.model.sharding import shard
from loramox.run import command, versions
from loramox.settings import check_choices, of_record
from loramox.sweep.frontier import grid, poor_direction, still_known
from loramox.sweep.plot import draw_frontier
from loramox.sweep.search import Measured, choose, mean, next_for, scores, search

FRONTIER = "frontier.json"
PICTURE = "frontier.png"
RULES = ("budget", "holdout", "retrained")


@dataclass
class SweepConfig:
    """Which strengths, and the rule that chooses among them."""

    memorization: str = field(metadata={"help": "Folder 'memorization' of a run."})
    out: str = field(
        metadata={"help": "Folder to write. A sweep in it goes on: strengths that are there are not measured again."}
    )
    strengths: list[float] | None = field(
        default=None, metadata={"help": "Strengths α. Default: a quarter of the trained one to one and a half of it."}
    )
    refine: int = field(default=3, metadata={"help": "Strengths to add where the rule looks for its choice."})
    rule: str = field(
        default="budget",
        metadata={
            "help": "What chooses the strength: budget (the largest that costs retain rows no more than --budget), holdout "
            "(forget rows look like rows never seen), retrained (like a model that never saw them).",
            "choices": list(RULES),
        },
    )
    budget: float = field(default=0.02, metadata={"help": "Share of retain probability that forgetting may cost."})
    ship: str | None = field(
        default=None, metadata={"help": "Folder to write the forget adapter at the chosen strength to."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Where the base model is, when it is not where it was in training."}
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.strengths is not None and not all(np.isfinite(s) and s > 0 for s in self.strengths):
            raise SettingsError(f"strengths are {self.strengths}; --strengths needs finite numbers above 0")
        if not 0 < self.budget < 1:
            raise SettingsError(f"budget is {self.budget}; --budget needs a share above 0 and below 1, like 0.02")
        if self.refine < 0:
            raise SettingsError(f"refine is {self.refine}; --refine needs 0 or more")


def sweep(config: SweepConfig, asked: Asked, scoring: ScoringConfig | None = None) -> dict[str, Any]:
    """Measure the forget model at many strengths, choose one, and write `config.out`; return what frontier.json holds.

    The model, its quantization, tokenisation and columns are those of the run. Each strength has its own folder of records; at
    strength 0 it is the reference. Under `torchrun` or `accelerate launch` every process calls this; they share the rows of each
    strength, and the first one writes. Raises a `LoramoxError` before the model is loaded for anything that is wrong.
    """
    scoring = scoring or ScoringConfig()
    process = PartialState(cpu=scoring.use_cpu)  # its device is this process's from here on
    out, memorization = Path(config.out), Path(config.memorization)
    source = _source(memorization)
    settings = source["settings"]
    model, tokenisation, columns = (of_record(kind, settings) for kind in (ModelConfig, Tokenisation, Columns))
    if asked.suite:  # its rows are not those that training had to cut
        tokenisation = replace(tokenisation, max_length=None, long_rows="refuse")
    model.model = config.model or model.model
    model.shard = model.shard and several_processes()  # else one process holds all
    device = check_device(model, scoring.use_cpu)
    base = identify(model, read_config(model))
    check_base(source, base, memorization)
    rows = read_parts(asked.sources(), columns, asked.drop_overlap, asked.suite)
    check_sides(source, rows, config.memorization)
    questions = questions_of(rows, model, read_config(model), tokenisation, scoring, asked.suite)
    retrained = read_retrained(asked.retrained, questions, base)
    _check(config, rows, retrained)
    delta, _ = read_factors(memorization / "momentum")
    plan = {
        "memorization": str(memorization),
        "weights": sha256_of(memorization / "momentum" / WEIGHTS),
        "base": base,
        "data": described(asked.sources(), rows),
        "retrained": asked.retrained,
        "scoring": {"max_new_tokens": scoring.max_new_tokens},
    }
    _open(out, plan)

    shipped, _ = at_rank(delta, served_rank(settings["r"]))
    adapted = PeftModel.from_pretrained(load_reference(model, device), str(memorization / "momentum"))
    if model.shard:
        shard(adapted, process.device)
    with adapted.disable_adapter():
        questions.remember_reference(adapted)

    def measure(strength: float) -> list[Record]:
        folder = out / f"strength-{strength:g}"
        if (folder / SUMMARY).exists():
            return read_records(folder, like=questions.identities())
        start = time.perf_counter()
        with with_factors(adapted, shipped), at_strength(adapted, strength):
            turned = time.perf_counter()
            records = questions.ask(adapted, f"α = {strength:g}, ")
        asked_seconds = time.perf_counter() - turned
        summary = summarise(records, retrained)
        more = time.perf_counter() - start - asked_seconds
        # What a strength costs besides its evaluation: turning the adapter to it, and adding the scores up.
        seconds = {"asking": asked_seconds, "more": more}
        if PartialState().is_main_process:
            write_records(folder, records, summary, {"strength": strength, "seconds": seconds})
        return records

    ceiling = settings["strength"] if settings["objective"] == "npo" else math.inf
    measured = _measured(config, settings["strength"], measure, retrained, ceiling)
    return _conclude(config, plan, measured, retrained, ceiling)


def _measured(
    config: SweepConfig,
    trained: float,
    measure: Callable[[float], list[Record]],
    retrained: Sequence[Record],
    ceiling: float,
) -> Measured:
    """The records at every strength wanted or there already, and at those that the rule adds."""
    wanted = {0.0, *(config.strengths or grid(trained))}
    there = {float(f.parent.name.removeprefix("strength-")) for f in Path(config.out).glob(f"strength-*/{SUMMARY}")}
    measured = {s: measure(s) for s in sorted(wanted | there)}
    prefer = functools.partial(next_for, config.rule, retrained=retrained, budget=config.budget, ceiling=ceiling)
    return search(measured, measure, len(wanted) + config.refine - len(measured), prefer)


def _check(config: SweepConfig, rows: dict[str, Any], retrained: Sequence[Record]) -> None:
    if not {"forget", "retain"} <= rows.keys():
        raise SettingsError(
            "a frontier has two sides, rows to forget and rows to retain: give both --forget and --retain, or --suite tofu (MUSE's own rows "
            "have no retain rows: give such with --retain, and its texts with --forget and --holdout)"
        )
    if config.rule == "holdout" and "holdout" not in rows:
        raise SettingsError("--rule holdout compares with rows never seen: give --holdout")
    wrong = any(r.wrong_answers for r in rows["forget"]) and len(scores(retrained, "forget", "truth_ratio"))
    if config.rule == "retrained" and not wrong:
        raise SettingsError(
            "--rule retrained compares truth ratios with those of a model that never saw the forget rows: give --retrained, its "
            "evaluation on the same forget rows, which need wrong answers (column perturbed_answer)"
        )
    ship = config.ship and Path(config.ship)
    if ship and (ship.is_file() or has_files(ship)):
        raise RunError(f"--ship {config.ship} exists already. Give a folder that does not exist yet")


def _source(memorization: Path) -> dict[str, Any]:
    """The provenance of the run. Raises a `LoramoxError` for one that cannot be swept."""
    source = read_provenance(memorization, "memorization")
    settings = source["settings"]
    if "model" not in settings:
        raise AdapterError(
            f"--memorization {memorization} was made from Python, and does not say how its model was loaded and its rows were tokenised. Make a "
            "forget adapter of it with loramox extrapolate, and measure it with loramox evaluate --strength"
        )
    if settings["strength"] == AS_TRAINED:
        raise SettingsError(
            f"--memorization {memorization} was trained to forget by {source['method']}, and is one model, not a line of strengths. "
            "Measure it with loramox evaluate; what loramox unlearn --method mox memorizes can be swept"
        )
    return source


def _open(out: Path, plan: dict[str, Any]) -> None:
    """Start a sweep in `out`, or go on with the same one."""
    path = out / FRONTIER
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        other = [part for part, value in json.loads(json.dumps(plan)).items() if held.get(part) != value]
        if other:
            raise RunError(
                f"--out {out} holds another sweep ({', '.join(other)} differ). Choose another folder, or delete that one"
            )
    elif has_files(out):
        raise RunError(f"--out {out} has files in it that are no sweep; they are left alone. Choose another folder")
    elif PartialState().is_main_process:
        write_json(path, {"status": "running", **plan})


def _warning(points: list[dict[str, Any]], chosen: float | None) -> str | None:
    forget, retain = ([p[f"{part}_probability"] for p in points] for part in ("forget", "retain"))
    at = next((i for i, p in enumerate(points) if p["strength"] == chosen), 0)
    return poor_direction(forget, retain) or (still_known(chosen, forget[at], forget[0]) if at else None)


def _conclude(
    config: SweepConfig,
    plan: dict[str, Any],
    measured: dict[float, list[Record]],
    retrained: Sequence[Record],
    ceiling: float,
) -> dict[str, Any]:
    """Choose, draw, write down and ship."""
    out = Path(config.out)
    points = [
        {"strength": s, **{name: m.value for name, m in summarise(records, retrained).metrics.items()}}
        for s, records in measured.items()
    ]
    choices = [choice._asdict() for choice in choose(measured, retrained, config.budget, ceiling)]
    chosen = next((c["strength"] for c in choices if c["rule"] == config.rule), None)
    frontier = {
        "status": "done",
        **plan,
        "points": points,
        "choices": choices,
        "rule": config.rule,
        "chosen": chosen,
        "warning": _warning(points, chosen),
        "command": command(),
        "versions": versions(),
    }
    theirs = {part: mean(retrained, part) for part in {r["part"] for r in retrained}}
    if PartialState().is_main_process:
        draw_frontier(out / PICTURE, points, chosen, theirs)
        write_json(out / FRONTIER, frontier)
        if config.ship and chosen:
            extrapolate(config.memorization, config.ship, chosen)
    return frontier
