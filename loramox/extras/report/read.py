"""What a report is made of: the files of a run, read and checked. What is not there is named, with the command that makes it."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from loramox.errors import RunError
from loramox.evaluate.measure import Record
from loramox.evaluate.records import RECORDS, read_records
from loramox.run import RECORD

# Folders and files that other verbs write into the folder of a run.
SWEEP, FRONTIER = "sweep", "frontier.json"
ATTACK, ATTACKS = "attack", "attacks.json"
SHIPPED, PROVENANCE = "forget-adapter", "provenance.json"

REFERENCE, FORGET, RETRAINED = "reference", "forget model", "retrained model"


class Missing(NamedTuple):
    """An input that is not there: what, in one sentence, and the command that makes it."""

    what: str
    command: str | None = None


@dataclass
class Inputs:
    """Everything that is read, and what could not be."""

    folder: Path
    run: dict[str, Any]
    frontier: dict[str, Any] | None = None
    strength: float | None = None  # of the forget model that is shown
    shipped: float | None = None  # of the adapter in the run's folder
    records: dict[str, list[Record]] = field(default_factory=dict)  # by model, in the same order of rows
    attacks: dict[str, Any] | None = None
    missing: dict[str, Missing] = field(default_factory=dict)  # by part of the page

    def point(self, strength: float | None) -> dict[str, float]:
        """The sweep's metrics at a strength; nothing when it was not measured."""
        points = self.frontier["points"] if self.frontier else []
        return next((p for p in points if p["strength"] == strength), {})


def read_inputs(folder: Path) -> Inputs:
    """Read a run's folder. Raises `RunError` when it is none, and for a file that is damaged or not finished."""
    inputs = Inputs(folder, _read_run(folder))
    inputs.shipped = _shipped(inputs)
    _read_sweep(inputs)
    _read_attacks(inputs)
    return inputs


def number(value: Any) -> float:
    """The number that a JSON file holds, or NaN for anything else."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else math.nan


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise RunError(
            f"{folder} is no run: it has no {RECORD}. Give the folder that loramox unlearn wrote, the one given as --out"
        )
    run = _json(path, "Restore it, or run loramox unlearn again with --overwrite")
    if not isinstance(run, dict) or not all(isinstance(run.get(part), dict) for part in ("settings", "data", "base")):
        raise RunError(f"{path} is no record of loramox. Give the folder that loramox unlearn wrote")
    if not _dicts(run["data"]) or not all(_dict_or_none(run, *("timings", "memory", "versions", "forget_adapter"))):
        raise RunError(f"{path} is damaged. Restore it, or run loramox unlearn again with --overwrite")
    if run.get("status") == "running":
        raise RunError(f"{path}: this run has not finished. Go on with it: the same loramox unlearn with --resume")
    if not all(isinstance(entry, dict) for entry in _list(run, "log", path)):
        raise RunError(f"{path} is damaged: its log holds something else than entries. Restore it")
    return run


def _shipped(inputs: Inputs) -> float | None:
    path = inputs.folder / SHIPPED / PROVENANCE
    made = _json(path, "Restore it, or make the adapter again: loramox extrapolate") if path.is_file() else None
    strength = number((made if isinstance(made, dict) else inputs.run.get("forget_adapter") or {}).get("strength"))
    return None if math.isnan(strength) else strength


def _read_sweep(inputs: Inputs) -> None:
    path, run = inputs.folder / SWEEP / FRONTIER, inputs.run
    if not path.is_file():
        command = sweep_command(inputs)
        inputs.missing["frontier"] = Missing("This run has no sweep, so nothing was measured on its rows.", command)
        return
    inputs.frontier = frontier = _json(path, f"Delete {path.parent} and sweep again: {sweep_command(inputs)}")
    if isinstance(frontier, dict) and frontier.get("status") != "done":
        raise RunError(
            f"{path}: this sweep has not finished. Go on with it: the same loramox sweep with --out {path.parent}"
        )
    _check_frontier(frontier, path)
    if run["data"].get("forget", {}).get("sha256") != frontier["data"].get("forget", {}).get("sha256"):
        inputs.missing["same rows"] = Missing("The sweep asked other forget rows than those that were trained on.")
    measured = [p["strength"] for p in frontier["points"] if p["strength"] > 0]
    wanted = frontier["chosen"] if frontier["chosen"] is not None else inputs.shipped
    inputs.strength = wanted if wanted in measured else None
    if inputs.strength is None:
        inputs.missing["forget model"] = Missing(
            "The sweep chose no strength, and did not measure the one that was shipped: no forget model is shown."
        )
    _read_models(inputs)


def _check_frontier(frontier: Any, path: Path) -> None:
    needed = {"points": list, "choices": list, "data": dict}
    sound = isinstance(frontier, dict) and all(isinstance(frontier.get(k), kind) for k, kind in needed.items())
    sound = sound and all(
        isinstance(p, dict) and not math.isnan(number(p.get("strength"))) and {"forget_probability"} <= p.keys()
        for p in frontier["points"]
    )
    sound = sound and all(
        isinstance(c, dict) and isinstance(c.get("rule"), str) and {"strength", "reason"} <= c.keys()
        for c in frontier["choices"]
    )
    if not sound or not frontier["points"] or not _dicts(frontier["data"]):
        raise RunError(f"{path} is damaged: it is no frontier. Delete {path.parent} and sweep again")
    frontier["chosen"] = None if math.isnan(chosen := number(frontier.get("chosen"))) else chosen


def _read_models(inputs: Inputs) -> None:
    """The records of reference, forget and retrained model, those of the latter in the order of the former."""
    folder, frontier = inputs.folder / SWEEP, inputs.frontier or {}
    for model, strength in ((REFERENCE, 0.0), (FORGET, inputs.strength)):
        at = folder / f"strength-{strength:g}" if strength is not None else None
        if at and (at / RECORDS).is_file():
            try:
                inputs.records[model] = _sound(read_records(at), at)
            except RunError as error:
                raise RunError(
                    f"{at / RECORDS} is damaged or incomplete. Delete {at}, and give the sweep again: it measures only what is "
                    "not there"
                ) from error
    if REFERENCE not in inputs.records or (FORGET not in inputs.records and inputs.strength is not None):
        inputs.missing["records"] = Missing(
            f"The sweep's records of single rows are not there ({RECORDS} at strength 0 and at the chosen one).",
            sweep_command(inputs),
        )
    retrained = frontier.get("retrained")
    at = Path(retrained) if isinstance(retrained, str) else None
    if at and ((at / RECORDS).is_file() or at.is_file()):
        like = inputs.records.get(REFERENCE, ())
        inputs.records[RETRAINED] = _sound(read_records(at, like=like), at)
    else:
        gone = f"The records of the retrained model are gone ({at})" if at else "No retrained model was measured"
        evaluate = f"loramox evaluate --model RETRAINED {rows_flags(inputs, model=True)} --out RETRAINED-RECORDS"
        inputs.missing["retrained"] = Missing(
            f"{gone}: how a model that never knew the forget rows answers is not shown. To have it, move the sweep's folder away, "
            "and measure one on the same rows:",
            f"{evaluate}\n{again_command(inputs)} --retrained RETRAINED-RECORDS",
        )


def _sound(records: list[Record], folder: Path) -> list[Record]:
    needed = {"part", "id", "row", "probability", "plain_text", "tokens"}
    # All others are numbers, or null where they are not finite.
    other = {"part", "id", "row", "plain_text", "prompt", "answer", "said", "wrong_log_p"}

    def sound(record: Record) -> bool:
        numbers = (value for name, value in record.items() if name not in other)
        return needed <= record.keys() and all(isinstance(value, int | float | None) for value in numbers)

    bad = next((n for n, record in enumerate(records, 1) if not sound(record)), None)
    if not records or bad:
        what = f"record {bad} is incomplete" if bad else "it is empty"
        raise RunError(f"{folder} has no sound records: {what}. Evaluate again with --overwrite")
    return records


def _read_attacks(inputs: Inputs) -> None:
    path = inputs.folder / ATTACK / ATTACKS
    command = (
        f"loramox attack --adapter {quoted(inputs.folder / SHIPPED)} --model {quoted(inputs.run['base'].get('model', 'M'))} "
        f"{rows_flags(inputs, model=True)} --out {quoted(path.parent)}"
    )
    attacks = _json(path, f"Delete {path.parent} and attack again: {command}") if path.is_file() else None
    if attacks is None:
        inputs.missing["attacks"] = Missing("Nobody has tried to bring the rows back: no attack was made.", command)
        return
    if isinstance(attacks, dict) and attacks.get("status") != "done":
        inputs.missing["attacks"] = Missing(
            "The attacks have not finished. The same command goes on with them.", command
        )
        return
    states = attacks.get("states") if isinstance(attacks, dict) else None
    sound = (
        isinstance(states, list)
        and all(_dict_or_none(attacks, "adapter", "data"))
        and _dicts(attacks.get("data") or {})
    )
    if not sound or not all(
        isinstance(s, dict) and isinstance(s.get("metrics"), dict) and {"attack", "state"} <= s.keys() for s in states
    ):
        raise RunError(f"{path} is damaged: it holds no states. Delete {path.parent} and attack again: {command}")
    inputs.attacks = attacks


def sweep_command(inputs: Inputs) -> str:
    folder = inputs.folder
    return f"loramox sweep --memorization {quoted(folder / 'memorization')} {rows_flags(inputs)} --out {quoted(folder / SWEEP)}"


def again_command(inputs: Inputs) -> str:
    """The sweep's own command, for the same rows, but with answers and without a retrained model; into this run's folder."""
    command = str((inputs.frontier or {}).get("command", ""))
    if not command.startswith("loramox sweep "):
        return sweep_command(inputs)
    command = re.sub(r" --(out|max_new_tokens|retrained)[ =]\S+", "", command)
    return f"{command} --out {quoted(inputs.folder / SWEEP)}"


def rows_flags(inputs: Inputs, model: bool = False) -> str:
    """The flags that give a command this run's rows, and how its model is loaded."""
    settings, data = inputs.run["settings"], inputs.run["data"]
    flags = [f"--{part} {quoted(data.get(part, {}).get('source', part.upper()))}" for part in ("forget", "retain")]
    if model:
        names = ("prompt_column", "answer_column", "messages_column", "text_column")
        flags += [f"--{name} {quoted(settings[name])}" for name in names if settings.get(name)]
        if settings.get("quantization", "nf4") != "nf4":
            flags.append(f"--quantization {quoted(settings['quantization'])}")
    return " ".join(flags)


def quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged or cannot be read: {error}. {remedy}") from error


def _dicts(value: dict[str, Any]) -> bool:
    return all(isinstance(each, dict) for each in value.values())


def _dict_or_none(record: dict[str, Any], *names: str) -> list[bool]:
    return [isinstance(record.get(name), dict | None) for name in names]


def _list(record: dict[str, Any], name: str, path: Path) -> Sequence[Any]:
    value = record.get(name, [])
    if not isinstance(value, list):
        raise RunError(f"{path} is damaged: its {name} is no list. Restore it")
    return value
