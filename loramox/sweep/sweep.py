"""The sweep: score one trained adapter at many alphas or scales with one load of the model, and choose one."""

import functools
import json
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel

from loramox.adapter import loading
from loramox.adapter.export import ShippingConfig, extrapolate
from loramox.adapter.factors import read_factors
from loramox.adapter.folder import WEIGHTS, at_rank, served_rank
from loramox.adapter.provenance import check_asked_base, read_provenance
from loramox.adapter.source import tuned_factors
from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns
from loramox.errors import AdapterError, MissingExtraError, RunError, SettingsError
from loramox.evaluate.asked import (
    Asked,
    count_parts,
    described,
    disjoint_parts,
    questions_of,
    read_sources,
    with_neighbours,
)
from loramox.evaluate.equivalence import holm
from loramox.evaluate.measure import Record, ScoringConfig, check_numbers
from loramox.evaluate.records import SUMMARY, read_records, read_retrained, write_records
from loramox.evaluate.subject import check_sides
from loramox.evaluate.summary import Summary, summarise
from loramox.files import has_files, read_json, sha256_of, write_json
from loramox.model.algebra import Factors
from loramox.model.config import ModelConfig, check_device, identify, read_config, several_processes
from loramox.model.load import load_reference
from loramox.model.lora import at_scale, with_factors
from loramox.model.sharding import shard
from loramox.run import command, one_writer, versions
from loramox.settings import of_record
from loramox.sweep.config import SweepConfig
from loramox.sweep.frontier import Axis, as_named, grid, poor_direction, still_known
from loramox.sweep.plot import draw_frontier
from loramox.sweep.search import Measured, choose, mean, next_for, search
from loramox.train.config import METHODS
from loramox.train.earlier import TUNED, put_on

FRONTIER = "frontier.json"
PICTURE = "frontier.png"


@one_writer
def sweep(config: SweepConfig, asked: Asked, scoring: ScoringConfig | None = None) -> dict[str, Any]:
    """Score the forget model at many alphas or scales, choose one, and write `config.out`; return the contents of frontier.json.

    The model, its quantization, tokenisation and columns are those of the run. The axis is alpha for a method that has one, else
    the scale of ΔW, 1 being as trained. Each point has its own folder of records; at 0 it is the reference. Under `torchrun` or
    `accelerate launch` every process calls this; they share the rows of each point, and the first one writes.

    Raises:
        LoramoxError: for anything that is wrong, before the model is loaded.
    """
    scoring = scoring or ScoringConfig()
    process = PartialState(cpu=scoring.use_cpu)  # its device is this process's from here on
    out, trained = Path(config.out), Path(config.trained)
    source = _source(trained)
    axis = _axis(config, source)
    model, tokenisation, columns = _as_trained(config, asked, source["settings"])
    device = check_device(model, scoring.use_cpu)
    base_config = read_config(model, weights=True)
    base = identify(model, base_config)
    check_asked_base(source, base, trained)
    read = read_sources(asked.sources(), columns, asked.suite)
    rows = disjoint_parts(read, asked.drop_overlap)
    check_sides(source, rows, config.trained)
    rows = with_neighbours(rows, asked.neighbours)
    questions = questions_of(rows, model, base_config, tokenisation, scoring, asked.suite)
    counts = count_parts(read, rows, questions)
    knows = None if "tuned_adapter" in source else base  # the base without it does not know the rows
    retrained, *others = read_retrained(asked.retrained, questions, knows, tokenisation.prompt_template) or [[]]
    summary_of = functools.partial(summarise, retrained=retrained, others=others, share=asked.equivalence)
    _check(config, rows, retrained, tuned="tuned_adapter" in source)
    delta, _ = read_factors(trained / "momentum")
    shipped, _ = at_rank(delta, served_rank(source["settings"]["r"]))
    tuned = tuned_factors(source) if "tuned_adapter" in source else None
    plan = {
        "trained": str(trained),
        "unit": axis.unit,
        "weights": sha256_of(trained / "momentum" / WEIGHTS),
        "base": base,
        "data": described(asked.sources(), rows),
        "retrained": asked.retrained_record(),
        "scoring": {"max_new_tokens": scoring.max_new_tokens},
        "neighbours": asked.neighbours,
        "dtype": str(model.torch_dtype(device)).removeprefix("torch."),
    }
    if process.is_main_process:
        _open(out, plan)
    process.wait_for_everyone()
    plan["row_counts"] = counts  # no part of what a sweep that goes on is compared by: `data` is

    adapted = _adapted(model, trained, tuned, device)
    with at_scale(adapted, 0):  # the reference, of which a tuned adapter is a part
        questions.remember_reference(adapted)

    def measure(at: float) -> list[Record]:
        """The records of one point: from its folder where it was measured before, else asked of the model and written there."""
        folder = out / f"at-{at:g}"
        if (folder / SUMMARY).exists():
            return read_records(folder, like=questions.identities())
        start = time.perf_counter()
        with with_factors(adapted, shipped), at_scale(adapted, axis.scale(at)):
            records = questions.ask(adapted, f"{axis.unit} = {at:g}, ")
        if not at:
            check_numbers(records)  # a large alpha may overflow: that point is on record, and never chosen
        if process.is_main_process:
            about = {"unit": axis.unit, "at": at, "seconds": time.perf_counter() - start}
            write_records(folder, records, summary_of(records), about)
        return records

    measured = _measured(config, axis, measure, retrained)
    return _conclude(config, plan, measured, _points(measured, summary_of), retrained, axis)


def _adapted(model: ModelConfig, trained: Path, tuned: dict[str, Factors] | None, device: torch.device) -> PeftModel:
    """The model with the trained adapter on it, and below that the user's own, if it was trained beside one."""
    adapted = loading.put_on(load_reference(model, device), trained / "momentum")
    if tuned:
        put_on(adapted, tuned, TUNED)
    if model.shard:
        shard(adapted, PartialState().device)
    return adapted


def _as_trained(
    config: SweepConfig, asked: Asked, settings: dict[str, Any]
) -> tuple[ModelConfig, Tokenisation, Columns]:
    """How the run loaded its model, and read and tokenised its rows."""
    model, tokenisation, columns = (of_record(kind, settings) for kind in (ModelConfig, Tokenisation, Columns))
    if asked.suite:  # training may have truncated its own rows; these are others
        tokenisation = replace(tokenisation, max_length=None, long_rows="refuse")
    model.model = config.model or model.model
    model.shard = model.shard and several_processes()  # else one process holds all
    return model, tokenisation, columns


def _axis(config: SweepConfig, source: dict[str, Any]) -> Axis:
    """What is varied: alpha where the method has one, else the scale. Raises `SettingsError` for values of the other."""
    alpha = source["alpha"]
    unit, trained, other = ("scale", 1.0, "alpha") if alpha is None else ("alpha", alpha, "scale")
    given = getattr(config, f"{other}s")
    if given is not None:
        has = "has an alpha" if unit == "alpha" else "has no alpha, so the scale of its adapter is varied"
        raise SettingsError(f"--{other}s {' '.join(f'{v:g}' for v in given)}: {source['method']} {has}. Give --{unit}s")
    method = METHODS.get(source["settings"]["method"])
    if method and method.static:
        return Axis(unit, trained)
    # The model that ships is trained itself, to an end; of a method registered elsewhere nothing else is known.
    return Axis(unit, trained, ceiling=as_named(trained))


def _measured(
    config: SweepConfig, axis: Axis, measure: Callable[[float], list[Record]], retrained: Sequence[Record]
) -> Measured:
    """The records at every value that is wanted, at those that the rule adds to them, and at any that are in the folder already.

    The rule starts from those that are wanted alone. So the same command asks for the same values again, whatever else was
    measured before, and those that are in the folder cost nothing.
    """
    given = config.alphas if axis.unit == "alpha" else config.scales
    wanted = {0.0, *map(as_named, given or grid(axis.trained))}
    names = [f.parent.name for f in Path(config.out).glob(f"at-*/{SUMMARY}")]
    found = {float(m[1]) for m in (re.fullmatch(r"at-(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name) for name in names) if m}
    prefer = functools.partial(
        next_for, config.rule, retrained=retrained, budget=config.budget, axis=axis, forget_to=config.forget_to
    )
    measured = search({at: measure(at) for at in sorted(wanted)}, measure, config.refine, prefer)
    others = {at: measure(at) for at in found - measured.keys()}
    return dict(sorted((measured | others).items()))


def _check(config: SweepConfig, rows: dict[str, Any], retrained: Sequence[Record], tuned: bool) -> None:
    if not {"forget", "retain"} <= rows.keys():
        raise SettingsError(
            "a frontier needs rows to forget and rows to retain: give both --forget and --retain, or --suite tofu (MUSE's own rows "
            "have no retain rows: give such with --retain, and its texts with --forget and --holdout)"
        )
    if config.rule == "holdout" and "holdout" not in rows:
        raise SettingsError("--rule holdout compares with rows never seen: give --holdout")
    if config.rule == "retrained" and not retrained:
        raise SettingsError(
            "--rule retrained compares with a model that never saw the forget rows: give --retrained, its evaluation on the same forget rows"
        )
    if config.rule == "forget_to" and config.forget_to is None and not retrained and "holdout" not in rows:
        raise SettingsError("--rule forget_to needs a target: give --forget_to 0.05, --retrained or --holdout")
    if config.ship:
        ship = Path(config.ship)
        for folder in (ship, Path(f"{ship}-combined")) if tuned else (ship,):
            if folder.is_file() or has_files(folder):
                also = "" if folder == ship else f": {folder}, which it writes as well,"
                raise RunError(f"--ship {config.ship}{also} exists already. Give a folder that does not exist yet")


def moved_base(config: SweepConfig) -> str | None:
    """The base that a shipped adapter must name because it has moved since training; None where it has not."""
    # Under its old name it keeps the revision of training, which a name alone does not say.
    named = read_provenance(Path(config.trained), "trained")["base"]["model"]
    return None if config.model == named else config.model


def _source(trained: Path) -> dict[str, Any]:
    """The provenance of the run. Raises `AdapterError` for one that cannot be swept."""
    source = read_provenance(trained, "trained")
    if "model" not in source["settings"]:
        raise AdapterError(
            f"--trained {trained} was made from Python: how its model was loaded and its rows were tokenised is not known. Make a "
            "forget adapter of it with loramox extrapolate, and measure it with loramox evaluate --scale"
        )
    return source


def _open(out: Path, plan: dict[str, Any]) -> None:
    path = out / FRONTIER
    if path.exists():
        held = read_json(path, dict)
        if "memorization" in held:
            raise RunError(
                f"--out {out} holds a sweep of loramox 0.1, which cannot be continued. Choose another folder. loramox report still reads it"
            )
        # A part that an older version did not write is not compared.
        other = [part for part, value in json.loads(json.dumps(plan)).items() if held.get(part, value) != value]
        if other:
            raise RunError(
                f"--out {out} holds another sweep ({', '.join(other)} differ). Choose another folder, or delete that one"
            )
    elif has_files(out):
        raise RunError(f"--out {out} has files in it that are no sweep; they are left alone. Choose another folder")
    else:
        write_json(path, {"status": "running", **plan})


def _points(measured: Measured, summary_of: Callable[[list[Record]], Summary]) -> list[dict[str, Any]]:
    """The metrics of each point; p-values of equivalence also as they are after so many tries (`holm`), the reference aside."""
    points = [
        {"at": at, **{name: m.value for name, m in summary_of(records).metrics.items()}}
        for at, records in measured.items()
    ]
    tried = [point for point in points if point["at"]]
    for name in [name for name in points[0] if name.endswith("_equivalence")]:
        for point, p in zip(tried, holm([point.get(name, 1.0) for point in tried]), strict=True):
            point[f"{name}_holm"] = p
    return points


def _warning(points: list[dict[str, Any]], choice: dict[str, Any], axis: Axis) -> str | None:
    """What is wrong with the frontier, else with what was chosen of it."""
    forget, retain = ([p[f"{part}_probability"] for p in points] for part in ("forget", "retain"))
    poor = poor_direction(forget, retain, axis)
    chosen = choice.get("at")
    if poor or chosen is None or choice["rule"] == "forget_to":  # which states how much is to be left
        return poor
    left = next(p["forget_probability"] for p in points if p["at"] == chosen)
    return still_known(chosen, left, forget[0], axis)


def _conclude(
    config: SweepConfig,
    plan: dict[str, Any],
    measured: dict[float, list[Record]],
    points: list[dict[str, Any]],
    retrained: Sequence[Record],
    axis: Axis,
) -> dict[str, Any]:
    out = Path(config.out)
    choices = [choice._asdict() for choice in choose(measured, retrained, config.budget, axis, config.forget_to)]
    choice = next((c for c in choices if c["rule"] == config.rule), {})
    chosen = choice.get("at")
    frontier = {
        "status": "done",
        **plan,
        "points": points,
        "choices": choices,
        "rule": config.rule,
        "chosen": chosen,
        "warning": _warning(points, choice, axis),
        "command": command(),
        "versions": versions(),
    }
    of_retrained = {part: mean(retrained, part) for part in {r["part"] for r in retrained}}
    if PartialState().is_main_process:
        try:
            draw_frontier(out / PICTURE, points, chosen, of_retrained, axis.unit)
        except MissingExtraError as missing:  # the picture is a convenience: frontier.json has everything in it
            warnings.warn(f"{PICTURE} is not drawn: {missing}, and rerun the command", stacklevel=2)
        write_json(out / FRONTIER, frontier)
        if config.ship and chosen:
            extrapolate(
                config.trained,
                config.ship,
                shipping=ShippingConfig(base=moved_base(config)),
                **{axis.unit: chosen},
                chosen_by=f"loramox sweep --rule {config.rule}: {choice['reason']}",
            )
    return frontier
