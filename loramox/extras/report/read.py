"""Read and check the files of a run for its report. A missing one is named, with the command that makes it."""

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from loramox.adapter.card import RETAIN_FILE
from loramox.adapter.provenance import as_now
from loramox.errors import RunError
from loramox.evaluate.attacks.relearn import CONTROLS
from loramox.evaluate.measure import Record
from loramox.evaluate.records import RECORDS, read_records
from loramox.evaluate.records import SUMMARY as EVALUATED
from loramox.files import read_json
from loramox.run import RECORD
from loramox.sweep.frontier import frontier_as_now, records_folder
from loramox.train.synthetic import AUTO

# Folders and files that other verbs write into the folder of a run.
SWEEP, FRONTIER = "sweep", "frontier.json"
ATTACK, ATTACKS = "attack", "attacks.json"
EVALUATION = "evaluation"
TRAINED, SHIPPED, PROVENANCE = "trained", "forget-adapter", "provenance.json"
COMBINED = "combined-adapter"
TRAINED_BY_0_1 = "memorization"

REFERENCE, FORGET, RETRAINED = "reference", "forget model", "retrained model"


class Missing(NamedTuple):
    """A missing input: what it is, in one sentence, and the command that makes it."""

    what: str
    command: str | None = None


@dataclass
class Inputs:
    """Everything that was read, and what is missing."""

    folder: Path
    run: dict[str, Any]
    frontier: dict[str, Any] = field(default_factory=dict)  # empty where there is none, as the next two
    at: float | None = None  # alpha or scale of the forget model that is shown
    shipped: float | None = None  # of the adapter in the run's folder
    records: dict[str, list[Record]] = field(default_factory=dict)  # by model, in the same order of rows
    attacks: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, Missing] = field(default_factory=dict)  # by part of the page

    @property
    def unit(self) -> str:
        """Of `at` and `shipped`: alpha for a method that has one, else scale."""
        return "scale" if self.run.get("alpha") is None else "alpha"

    @property
    def control(self) -> str:
        """On what attacks were made to compare with: the retrained model, else rows never known; empty where on neither."""
        states = [str(state["state"]) for state in self.attacks.get("states", ())]
        return next((each for each in CONTROLS if any(state.endswith(each) for state in states)), "")

    def point(self, at: float | None) -> dict[str, float]:
        return next((p for p in self.frontier.get("points", ()) if p["at"] == at), {})

    def score(self, at: float | None, metric: str) -> float:
        return number(self.point(at).get(metric))


def read_inputs(folder: Path) -> Inputs:
    """Read a run's folder. Raises `RunError` when it is none, and for a file that is damaged or not finished."""
    inputs = Inputs(folder, _read_run(folder))
    inputs.shipped = _shipped(inputs)
    _read_sweep(inputs)
    _read_attacks(inputs)
    inputs.evaluation = _read_evaluation(folder)
    return inputs


def same_value(one: float, other: float) -> bool:
    """Whether two alphas or scales are one: a sweep rounds its own to six digits, and a provenance does not."""
    return math.isclose(one, other, rel_tol=1e-5)


def number(value: Any) -> float:
    """The number that a JSON file holds, or NaN for anything else."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else math.nan


def fits(value: Any, shape: Any) -> bool:
    """Whether what a JSON file holds has a shape.

    A shape is a type; a list of one shape, which every item has; or a dict of shapes by key. A key that ends in "?" may be
    absent or null, and "*" stands for every key.
    """
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return False
    if "*" in shape:
        return all(fits(each, shape["*"]) for each in value.values())
    return all(
        value.get(key[:-1]) is None or fits(value[key[:-1]], each)
        if key.endswith("?")
        else key in value and fits(value[key], each)
        for key, each in shape.items()
    )


PARTS = {"*": dict}  # part → what its rows were
RUN = {"settings": dict, "data": PARTS, "base": dict, "log?": [dict]}
RUN |= dict.fromkeys(("timings?", "memory?", "versions?", "forget_adapter?"), dict)
RUN |= {"forget_to?": {"unit": str, "at": int | float}}
SWEPT = {
    "points": [{"at": int | float, "forget_probability": object}],
    "choices": [{"rule": str, "at": object, "reason": object}],
    "data": PARTS,
}
ATTACKED = {
    "states": [{"attack": object, "state": object, "metrics": dict, "intervals?": dict}],
    "adapter?": dict,
    "data?": PARTS,
    "rows?": dict,
    "absent?": dict,
    "steps_saved?": dict,
}


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise RunError(
            f"{folder} is no run: it has no {RECORD}. Give the folder that loramox unlearn wrote, the one given as --out"
        )
    run = _json(path, "Restore it, or run loramox unlearn again with --overwrite")
    if not fits(run, RUN):
        raise RunError(
            f"{path} is no record of loramox, or is damaged. Restore it, or give the folder that loramox unlearn wrote"
        )
    run = as_now(run)
    if run.get("status") == "running":
        raise RunError(f"{path}: this run has not finished. Rerun loramox unlearn with --resume to continue it")
    return run


def _shipped(inputs: Inputs) -> float | None:
    """The alpha of the adapter in the run's folder, or its scale."""
    path = inputs.folder / SHIPPED / PROVENANCE
    if path.is_file():
        made = as_now(_json(path, "Restore it, or make the adapter again: loramox extrapolate"))
    elif shipped := inputs.run.get("forget_adapter"):  # it was moved. 0.1 shipped the alpha of training alone
        made = {"alpha": inputs.run.get("alpha"), **shipped}
        if chosen := inputs.run.get("forget_to"):
            made[chosen["unit"]] = chosen["at"]
    else:
        return None
    at = number(made.get("alpha") if inputs.unit == "alpha" else made.get("scale", 1.0))
    return None if math.isnan(at) else at


def _read_sweep(inputs: Inputs) -> None:
    path, command = inputs.folder / SWEEP / FRONTIER, sweep_command(inputs)
    if not path.is_file():
        inputs.missing["frontier"] = Missing("This run has no sweep, so nothing was measured on its rows.", command)
        return
    frontier = _json(path, f"Delete {path.parent} and sweep again: {command}")
    if frontier.get("status") != "done":
        raise RunError(
            f"{path}: this sweep has not finished. Rerun loramox sweep with --out {quoted(path.parent)} to continue it"
        )
    inputs.frontier = frontier = frontier_as_now(frontier)
    if not fits(frontier, SWEPT) or not frontier["points"]:
        raise RunError(f"{path} is damaged: it is no frontier. Delete {path.parent} and sweep again")
    frontier["chosen"] = None if math.isnan(chosen := number(frontier.get("chosen"))) else chosen
    if _other_rows(inputs, frontier["data"]):
        inputs.missing["same rows"] = Missing("The sweep scored other forget rows than those that were trained on.")
    measured = [p["at"] for p in frontier["points"] if p["at"] > 0]
    if (shipped := inputs.shipped) is not None:
        inputs.shipped = next((at for at in measured if same_value(at, shipped)), shipped)
    inputs.at = frontier["chosen"] if frontier["chosen"] is not None else inputs.shipped
    if inputs.at not in measured:
        inputs.at = None
        inputs.missing["forget model"] = Missing(
            f"The sweep chose no {inputs.unit}, and did not measure the one that was shipped: no forget model is shown."
        )
    _read_models(inputs)


def _other_rows(inputs: Inputs, data: dict[str, Any]) -> bool:
    """Whether other forget rows were scored than those of training.

    Not known where training had wanted answers: its digest is of them too, and scoring does not read them.
    """
    if inputs.run["settings"].get("wanted_column"):
        return False
    ours, theirs = (parts.get("forget", {}).get("sha256") for parts in (inputs.run["data"], data))
    return theirs not in (None, ours)


def _read_models(inputs: Inputs) -> None:
    """The records of reference, forget and retrained model, those of the latter in the order of the former."""
    for model, value in ((REFERENCE, 0.0), (FORGET, inputs.at)):
        folder = records_folder(inputs.folder / SWEEP, value) if value is not None else None
        if folder and (folder / RECORDS).is_file():
            try:
                inputs.records[model] = _sound(read_records(folder), folder)
            except RunError as error:
                raise RunError(
                    f"{folder / RECORDS} is damaged or incomplete. Delete {folder}, and rerun the sweep: it measures only missing points"
                ) from error
    if REFERENCE not in inputs.records or (FORGET not in inputs.records and inputs.at is not None):
        inputs.missing["records"] = Missing(
            f"The sweep's records of single rows are missing ({RECORDS} at {inputs.unit} 0 and at the chosen one).",
            sweep_command(inputs),
        )
    retrained = inputs.frontier.get("retrained")
    retrained = retrained[0] if isinstance(retrained, list) else retrained
    folder = Path(retrained) if isinstance(retrained, str) else None
    gone = f"The records of the retrained model are missing ({folder})" if folder else "No retrained model was measured"
    if folder and ((folder / RECORDS).is_file() or folder.is_file()):
        _sound(read_records(folder), folder)
        try:
            inputs.records[RETRAINED] = read_records(folder, like=inputs.records.get(REFERENCE, ()))
        except RunError as error:  # an earlier version swept beside records of other texts
            gone = f"The records of the retrained model cannot be compared ({error})"
    if RETRAINED not in inputs.records:
        evaluate = f"loramox evaluate --model RETRAINED {rows_flags(inputs, model=True)} --out RETRAINED-RECORDS"
        inputs.missing["retrained"] = Missing(
            f"{gone}: the answers of a model that never knew the forget rows are not shown. To have them, move the sweep's folder away, "
            "and evaluate such a model on the same rows:",
            f"{evaluate}\n{again_command(inputs)} --retrained RETRAINED-RECORDS",
        )


def _sound(records: list[Record], folder: Path) -> list[Record]:
    needed = {"part", "id", "row", "probability", "plain_text", "tokens"}
    # All others are numbers, or null where they are not finite.
    other = {"part", "id", "row", "plain_text", "prompt", "answer", "other_answers", "said"}
    other |= {"wrong_log_p", "variants", "absent"}

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
    base = [inputs.run["base"].get("model", "M")]
    if revision := inputs.run["settings"].get("revision"):
        base += ["--revision", revision]
    adapter = inputs.folder / (COMBINED if inputs.run["settings"].get("tuned_adapter") else SHIPPED)
    command = (
        f"loramox attack --adapter {quoted(adapter)} --model {shlex.join(map(str, base))} "
        f"{rows_flags(inputs, model=True)} --out {quoted(path.parent)}"
    )
    if not path.is_file():
        what = "No attack was made: whether the rows can be recovered is not known."
        inputs.missing["attacks"] = Missing(what, command)
        return
    attacks = _json(path, f"Delete {path.parent} and attack again: {command}")
    if attacks.get("status") != "done":
        what = "The attacks have not finished. Rerun the command to continue them."
        inputs.missing["attacks"] = Missing(what, command)
        return
    if not fits(attacks, ATTACKED):
        raise RunError(f"{path} is damaged: it holds no states. Delete {path.parent} and attack again: {command}")
    inputs.attacks = attacks
    if _other_rows(inputs, attacks.get("data") or {}):
        what = "The attacks are on other forget rows than those that were trained on."
        inputs.missing["same attacked rows"] = Missing(what)


def _read_evaluation(folder: Path) -> dict[str, Any]:
    """The summary of the evaluation of an adapter in the run's folder, if there is one."""
    path = folder / EVALUATION / EVALUATED
    found = _json(path, f"Delete {path.parent} and evaluate again") if path.is_file() else {}
    if found.get("adapter") is None:
        return {}
    if not fits(found, {"adapter": dict, "metrics": {"*": dict}}):
        raise RunError(f"{path} is damaged: it holds no metrics. Delete {path.parent} and evaluate again")
    return found


def sweep_command(inputs: Inputs) -> str:
    folder = inputs.folder
    before = (folder / TRAINED_BY_0_1).is_dir() and not (folder / TRAINED).exists()
    trained = folder / (TRAINED_BY_0_1 if before else TRAINED)
    return f"loramox sweep --trained {quoted(trained)} {rows_flags(inputs)} --out {quoted(folder / SWEEP)}"


def again_command(inputs: Inputs) -> str:
    """The sweep's own command, for the same rows, but with answers and without a retrained model; into this run's folder."""
    command = str(inputs.frontier.get("command", ""))
    try:
        words = shlex.split(command)
    except ValueError:  # a quote has no end
        words = []
    if words[:2] != ["loramox", "sweep"] or "--memorization" in command:  # a flag of 0.1
        return sweep_command(inputs)
    kept, keep = [], True
    for word in words:
        if word.startswith("--"):
            flag = word.removeprefix("--").partition("=")[0].replace("-", "_")
            # The adapter of --ship is there already, and is refused.
            keep = flag not in ("out", "max_new_tokens", "retrained", "ship")
        if keep:
            kept.append(word)
    return shlex.join([*kept, "--out", str(inputs.folder / SWEEP)])


def rows_flags(inputs: Inputs, model: bool = False) -> str:
    """The flags for a command on this run's rows and, with `model`, of how they are tokenised and its model is loaded."""
    settings, data = inputs.run["settings"], inputs.run["data"]
    sources = {part: data.get(part, {}).get("source", part.upper()) for part in ("forget", "retain")}
    if sources["retain"] == AUTO:
        sources["retain"] = inputs.folder / RETAIN_FILE
    flags = [f"--{part} {quoted(source)}" for part, source in sources.items()]
    if settings.get("drop_overlap"):
        flags.append("--drop_overlap true")
    if model:
        defaults = {"long_rows": "refuse", "quantization": "nf4"}
        columns = ("prompt_column", "answer_column", "messages_column", "text_column")
        names = (*columns, "prompt_template", "max_length", *defaults)
        given = {name: settings[name] for name in names if settings.get(name) not in (None, defaults.get(name))}
        flags += [f"--{name} {quoted(value)}" for name, value in given.items()]
    return " ".join(flags)


def quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return read_json(path, dict)
    except RunError as error:
        raise RunError(f"{error}. {remedy}") from error
