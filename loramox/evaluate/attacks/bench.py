"""Everything that attacks share: the models, one in memory at a time, the rows to score, and the folder of records."""

import functools
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from loramox.adapter.folder import WEIGHTS
from loramox.adapter.loading import put_on
from loramox.data.encode import Tokenisation
from loramox.data.row import Row
from loramox.data.rows import Columns, Data
from loramox.errors import RunError, SettingsError
from loramox.evaluate.asked import HOLDOUT, count_parts, described, disjoint_parts, questions_of, read_sources
from loramox.evaluate.attacks import relearn, requantize
from loramox.evaluate.attacks.attacked import NEVER_KNOWN, AttackedRows, attacked_rows
from loramox.evaluate.attacks.config import ATTACKS, AttackConfig
from loramox.evaluate.measure import Questions, Record, ScoringConfig, check_numbers
from loramox.evaluate.metric import Summary
from loramox.evaluate.records import SUMMARY, read_records, write_records
from loramox.evaluate.subject import check_adapter, check_retrained_model, check_scales, check_sides, model_that_knows
from loramox.evaluate.summary import summarise
from loramox.files import as_json, has_files, read_json, sha256_of, write_json
from loramox.model.config import ModelConfig, check_device, context_of, identify, read_config, skeleton
from loramox.model.load import load_reference
from loramox.model.lora import at_scale
from loramox.run import command, versions

RECORD = "attacks.json"
NO_QUESTIONS = "needs rows with questions, and answers generated to them (--max_new_tokens above 0)"
# Settings that add attacks to those that were made, and change none of them.
ADDED = ("attacks", "retrained_model", "holdout", "relearn_text")

Parts = dict[str, Sequence[Row]]

# Gives the model of a state while it is asked. It is called, and the model loaded, only where the answers are not there yet.
Asking = Callable[[], AbstractContextManager[nn.Module]]


class Bench:
    """One adapted model and its control, the rows that are asked of them in each state, and the folder with the answers."""

    def __init__(
        self,
        config: AttackConfig,
        model: ModelConfig,
        data: Data,
        scoring: ScoringConfig,
        tokenisation: Tokenisation,
        columns: Columns,
    ) -> None:
        self.model, self.scoring, self.tokenisation = model, scoring, tokenisation
        if config.relearn_all_weights and model.quantization != "none":
            raise SettingsError(
                f"--relearn_all_weights trains weights that are not quantized: say --quantization none, not {model.quantization}"
            )
        self.out = Path(config.out)
        self.held = read_json(self.out / RECORD, dict) if (self.out / RECORD).exists() else None
        self.config = config = _with_held(config, self.held) if self.held else config
        self.device = check_device(model, scoring.use_cpu)
        if config.relearn_all_weights and model.torch_dtype(self.device) == torch.float16:
            # AdamW's eps is 0 in float16, so that its first step already gives NaN.
            raise SettingsError(
                "--relearn_all_weights cannot train weights in float16: say --dtype float32 or bfloat16"
            )
        sources, read, rows = _read_rows(config, data, columns)
        base_config = read_config(model, weights=True)
        self.context = context_of(base_config)
        base = identify(model, base_config)
        given = config.retrained_model
        knows = model_that_knows(Path(config.adapter), base)
        self.retrained, control = check_retrained_model(given, model, base, knows) if given else (None, None)
        made_by = check_adapter(Path(config.adapter), base, skeleton(base_config, model))
        check_scales(Path(config.adapter), "attack")
        if "requantize" in config.attacks:
            self.merging = requantize.plan(model, Path(config.adapter), config.scale, self.device)
        check_sides(made_by, rows, config.adapter)
        self.retain = rows["retain"]
        tokenise = functools.partial(questions_of, model=model, config=base_config, how=tokenisation, scoring=scoring)
        training = {name: tokenise({"known": rows[part]}) for name, part in relearn.OTHERS.items() if part in rows}
        text = rows.get(relearn.TEXT)
        if text and all(row.prompt is None for row in text):
            # In blocks of the longest forget row: an attack with text has no more tokens in a step than one with rows.
            longest = max(len(each["input_ids"]) for each in tokenise({"known": rows["forget"]}).parts[0].answers)
            training[relearn.TEXT] = tokenise({"known": text}, how=replace(tokenisation, max_length=longest))
        self.forget = attacked_rows(rows["forget"], self.retain, training, config, tokenise)
        self.never: AttackedRows | None = None
        if config.holdout:
            self.never = attacked_rows(rows[HOLDOUT], (), training, config, tokenise, NEVER_KNOWN)
        every = [each for some in (self.forget, self.never) if some for each in (some.every, *some.training.values())]
        self.counts = count_parts(read, rows, *every)
        self.plan = {
            "base": base,
            "control": control,
            "adapter": {"folder": config.adapter, "scale": config.scale, "made_by": made_by}
            | {"weights": sha256_of(Path(config.adapter) / WEIGHTS)},
            "dtype": str(model.torch_dtype(self.device)).removeprefix("torch."),  # for --dtype auto it depends on the machine
            "data": described(sources, rows),
            "rows": _counted(self.forget) | ({NEVER_KNOWN: _counted(self.never)} if self.never else {}),
            "settings": {k: v for each in (config, model, scoring, tokenisation) for k, v in asdict(each).items() if k != "out"},
        }  # fmt: skip
        self.in_memory: tuple[Any, nn.Module] | None = None  # the arguments of `load`, and what it loaded
        self.states: list[dict[str, Any]] = []
        self.absent: dict[str, str] = {}
        self.reused = 0

    def open(self) -> None:
        if self.held is None and has_files(self.out):
            raise RunError(
                f"--out {self.out} has files in it that are no attacks; they are left alone. Choose another folder"
            )
        plan = json.loads(json.dumps(self.plan))
        if other := _differences(plan, self.held or {}):
            raise RunError(
                f"--out {self.out} holds attacks that were made otherwise: {'; '.join(other)}. Give what was given before, or choose "
                "another folder. Only attacks, a control (--retrained_model, --holdout) and a text (--relearn_text) can be added"
            )
        if self.held is None or plan != {name: self.held.get(name) for name in plan}:
            write_json(self.out / RECORD, {"status": "running", **plan})

    def load(self, model: ModelConfig, adapted: bool, gguf: str | None = None) -> nn.Module:
        """The model, `adapted` or not, or the weights of a GGUF file in its folder. The one before is freed first."""
        key = model, adapted, gguf
        if self.in_memory is None or self.in_memory[0] != key:
            self.in_memory = None
            gc.collect()  # modules refer to each other, and the next one must find room
            loaded = load_reference(model, self.device, gguf)
            self.in_memory = key, put_on(loaded, self.config.adapter) if adapted else loaded
        return self.in_memory[1]

    @contextmanager
    def adapted(self, model: ModelConfig, scale: float) -> Iterator[PeftModel]:
        """A model with the adapter on it at a scale. On the retrained model it is at 0, and changes nothing."""
        loaded = self.load(model, adapted=True)
        with at_scale(loaded, scale):
            yield loaded

    def to_answer(self, attack: str, rows: AttackedRows) -> Questions | None:
        """The questions of an attack that has the model answer; None where it is not wanted, or absent for want of questions."""
        if attack not in self.config.attacks:
            return None
        if rows.open_questions is None:
            self.absent[rows.named(attack)] = NO_QUESTIONS
        return rows.open_questions

    def folder(self, attack: str, state: str) -> Path:
        return self.out / "-".join(f"{attack} {state}".replace(",", "").split())

    def has(self, attack: str, state: str) -> bool:
        return (self.folder(attack, state) / SUMMARY).exists()

    def measured(self, attack: str, state: str, questions: Questions) -> list[Record] | None:
        if not self.has(attack, state):
            return None
        self.reused += 1
        return read_records(self.folder(attack, state), like=questions.identities())

    def ask(self, attack: str, state: str, model: Asking, rows: AttackedRows | None = None) -> list[Record]:
        """Ask the model in this state, or read what it answered. `rows`: the forget rows by default."""
        rows = rows or self.forget
        questions = rows.true_answers if attack.startswith("relearn") else rows.questions
        records = self.measured(attack, state, questions)
        if records is None:
            with model() as asked:
                records = questions.ask(asked, f"{attack}, {state}: ")
            if attack.startswith(("none", "relearn")):
                check_numbers(records)
        self.keep(attack, state, records, summarise(records))
        return records

    def keep(self, attack: str, state: str, records: list[Record], summary: Summary, **more: Any) -> None:
        """Write the records of a state, unless they are there; its metrics, and what `more` is known of it, go to the states."""
        folder = self.folder(attack, state)
        if not self.has(attack, state):
            write_records(folder, records, summary, {"attack": attack, "state": state})
        kept: dict[str, Any] = {"attack": attack, "state": state, "folder": folder.name}
        kept["metrics"] = {name: metric.value for name, metric in summary.metrics.items()}
        if intervals := {name: list(metric.interval) for name, metric in summary.metrics.items() if metric.interval}:
            kept["intervals"] = intervals
        self.states.append(kept | more)

    def close(self) -> dict[str, Any]:
        record = {
            "status": "done",
            **self.plan,
            "row_counts": self.counts,
            "states": self.states,
            "absent": self.absent,
            "steps_saved": relearn.saved(self.states),
            "reused": self.reused,  # states that an earlier run of this attack had measured
            "device": str(self.device),
            "command": command(),
            "versions": versions(),
        }
        write_json(self.out / RECORD, record)
        return record


def _read_rows(config: AttackConfig, data: Data, columns: Columns) -> tuple[dict[str, str], Parts, Parts]:
    """Where each part is from, its rows, and those of them that are used: none of these is in a part that it may not be in."""
    sources = {"forget": data.forget, "retain": data.retain} | ({HOLDOUT: config.holdout} if config.holdout else {})
    read = read_sources(sources, columns)
    if config.relearn_text:
        sources[relearn.TEXT], read[relearn.TEXT] = config.relearn_text, relearn.read_text(config.relearn_text)
    return sources, read, disjoint_parts(read, data.drop_overlap)


def _counted(rows: AttackedRows) -> dict[str, int]:
    return {"attacker's": len(rows.known), "asked": len(rows.asked)}


def _with_held(config: AttackConfig, held: dict[str, Any]) -> AttackConfig:
    """The settings, and what the attacks in the folder have that these do not give: a record has all attacks of its folder."""
    settings = held.get("settings") if isinstance(held.get("settings"), dict) else {}
    made = settings.get("attacks") or ()
    return replace(
        config,
        attacks=[name for name in ATTACKS if name in (*made, *config.attacks)],
        **{name: getattr(config, name) or settings.get(name) for name in ADDED if name != "attacks"},
    )


def _differences(plan: dict[str, Any], held: dict[str, Any]) -> list[str]:
    """What the plan has otherwise than the held one, with both values; what is only added to it is no difference."""
    found = []
    for part, before in held.items():
        now = plan.get(part)
        if part not in plan or before is None or now == before:
            continue
        if not (isinstance(now, dict) and isinstance(before, dict)):
            found.append(_difference(part, now, before))
            continue
        flags = part == "settings"
        for name, was in before.items():
            if now.get(name) != was and not (flags and name in ADDED):
                found.append(_difference(f"--{name}" if flags else f"{part}, {name}", now.get(name), was))
    return found


def _difference(name: str, now: Any, was: Any) -> str:
    if isinstance(now, dict) and isinstance(was, dict):
        differing = [key for key in {**was, **now} if now.get(key) != was.get(key)]
        now, was = ({key: each.get(key) for key in differing} for each in (now, was))
    return f"{name} is {as_json(now)[:100]}, and was {as_json(was)[:100]}"
