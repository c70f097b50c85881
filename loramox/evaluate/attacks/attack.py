"""Attacking as one job: what comes back of the forget rows when somebody tries. Records as in evaluating, before and after."""

import functools
import gc
import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn

from loramox.adapter.loading import put_on
from loramox.data.encode import Tokenisation, served_otherwise
from loramox.data.rows import Columns, Data, Row
from loramox.errors import RunError, SettingsError
from loramox.evaluate.attacks import relearn, requantize
from loramox.evaluate.attacks.prompts import PREFIX_WORDS, as_served, given_away, paraphrased_questions
from loramox.evaluate.evaluate import (
    check_adapter,
    check_scales,
    check_sides,
    count_parts,
    described,
    disjoint_parts,
    questions_of,
    read_sources,
)
from loramox.evaluate.measure import Questions, ScoringConfig, check_numbers
from loramox.evaluate.records import SUMMARY, read_records, write_records
from loramox.evaluate.summary import summarise
from loramox.files import has_files, read_json, remove, write_json
from loramox.model.config import ModelConfig, check_device, identify, read_config, skeleton
from loramox.model.load import load_reference
from loramox.model.lora import at_scale
from loramox.run import command, one_writer, versions

log = logging.getLogger(__name__)

ATTACKS = ("relearn", "requantize", "ask")
RECORD = "attacks.json"


@dataclass
class AttackConfig:
    """The adapter to attack, and how."""

    adapter: str = field(metadata={"help": "Folder of the forget adapter."})
    out: str = field(metadata={"help": "Folder to write. Attacks that are done in it are not made again."})
    attacks: list[str] = field(
        default_factory=lambda: list(ATTACKS),
        metadata={
            "help": "relearn (train on some forget rows, and on retain rows), requantize (merge, then 4 and 8 bits), ask "
            "(paraphrased questions, the answer's first words given away, and a server's prompt where training has another)."
        },
    )
    scale: float = field(default=1.0, metadata={"help": "Scale of the adapter: 1 is as shipped. Not --alpha."})
    relearn_steps: list[int] = field(
        default_factory=lambda: [1, 2, 5, 10, 20], metadata={"help": "Steps of relearning after which to ask."}
    )
    relearn_share: float = field(
        default=0.2, metadata={"help": "Share of the forget rows that the attacker has; the others are asked."}
    )
    relearn_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of relearning, AdamW on a fresh LoRA adapter."}
    )
    relearn_rank: int = field(default=16, metadata={"help": "Rank of that adapter."})
    relearn_batch: int = field(default=8, metadata={"help": "Rows a step of relearning."})
    seed: int = field(default=0, metadata={"help": "Seed of which rows the attacker has, and of the training."})

    def __post_init__(self) -> None:
        unknown = set(self.attacks) - set(ATTACKS)
        if unknown or not self.attacks:
            raise SettingsError(f"attacks are {self.attacks}; --attacks takes {', '.join(ATTACKS)}")
        if not 0 < self.relearn_share < 1:
            raise SettingsError(f"relearn_share is {self.relearn_share}; --relearn_share needs a share between 0 and 1")
        for name in ("relearn_rate", "relearn_rank", "relearn_batch", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} is {getattr(self, name)}; --{name} needs a number above 0")
        if not self.relearn_steps or min(self.relearn_steps) < 1:
            raise SettingsError(f"relearn_steps are {self.relearn_steps}; --relearn_steps needs numbers of 1 or more")


@one_writer
def attack(
    config: AttackConfig,
    model: ModelConfig,
    data: Data,
    scoring: ScoringConfig | None = None,
    tokenisation: Tokenisation | None = None,
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Attack the forget model with everything in `config.attacks`; write `config.out`, return what attacks.json holds.

    Each state of the model (before, after so many steps, in so many bits) has its own folder of records. Forget rows that
    the attacker trains on are not among those asked, before or after. Raises a `LoramoxError` before the model is loaded.
    """
    if PartialState().num_processes > 1:
        raise SettingsError("attacks are made in one process: run it without torchrun or accelerate launch")
    tokenisation, columns = tokenisation or Tokenisation(), columns or Columns()
    bench = _Bench(config, model, data, scoring or ScoringConfig(), tokenisation, columns)
    bench.open()
    with bench:
        bench.before_and_asked()
        if "relearn" in config.attacks:
            bench.relearn()
        if "requantize" in config.attacks:
            bench.requantize()
    return bench.close()


class _Bench:
    """One adapted model, the rows that are asked of it in each state, and the folder with the answers."""

    def __init__(self, config: AttackConfig, model: ModelConfig, data: Data, scoring, tokenisation, columns) -> None:
        self.config, self.model, self.scoring = config, model, scoring
        self.out = Path(config.out)
        self.device = check_device(model, scoring.use_cpu)
        sources = {"forget": data.forget, "retain": data.retain}
        read = read_sources(sources, columns)
        rows = disjoint_parts(read, data.drop_overlap)
        base_config = read_config(model, weights=True)
        base = identify(model, base_config)
        made_by = check_adapter(Path(config.adapter), base, skeleton(base_config, model))
        check_scales(Path(config.adapter), "attack")
        if "requantize" in config.attacks:
            self.merging = requantize.plan(model, Path(config.adapter), config.scale, self.device)
        check_sides(made_by, rows, config.adapter)
        self.known, self.asked = self._split(rows["forget"])
        self.retain = rows["retain"]

        def questions(parts: dict[str, Sequence[Row]]) -> Questions:
            return questions_of(parts, model, base_config, tokenisation, scoring)

        self.questions = questions({"forget": self.asked, "retain": self.retain})
        self.otherwise = self._otherwise(questions, tokenisation) if "ask" in config.attacks else {}
        self.training = {
            "forget rows": questions({"known": self.known}),
            "retain rows": questions({"known": self.retain}),
        }
        count_parts(read, rows, self.questions, *self.training.values())
        self.plan = {
            "base": base,
            "adapter": {"folder": config.adapter, "scale": config.scale, "made_by": made_by},
            "data": described(sources, rows),
            "rows": {"attacker's": len(self.known), "asked": len(self.asked)},
            "settings": {k: v for each in (config, scoring, tokenisation) for k, v in asdict(each).items() if k not in ("attacks", "out")},
        }  # fmt: skip
        self.states: list[dict[str, Any]] = []
        self.reused = 0

    def _split(self, forget: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        count = round(len(forget) * self.config.relearn_share)
        if not 0 < count < len(forget):
            raise SettingsError(
                f"--relearn_share {self.config.relearn_share} of {len(forget)} forget rows is {count}: the attacker needs some, and "
                "some must be left to ask"
            )
        chosen = set(random.Random(self.config.seed).sample(range(len(forget)), count))
        return [r for i, r in enumerate(forget) if i in chosen], [r for i, r in enumerate(forget) if i not in chosen]

    def _otherwise(self, questions, tokenisation: Tokenisation) -> dict[str, Questions]:
        ways = {"paraphrased questions": paraphrased_questions(self.asked)}
        ways |= {f"first {'word' if n == 1 else f'{n} words'} given": given_away(self.asked, n) for n in PREFIX_WORDS}
        if served_otherwise(self.asked, self.questions.tokenizer, tokenisation):
            ways["as served"] = as_served(self.asked)
        return {name: questions({"forget": rows}) for name, rows in ways.items() if rows}

    def open(self) -> None:
        """Start, or go on with the same attack in the folder."""
        path = self.out / RECORD
        if path.exists():
            held = read_json(path, dict)
            other = [k for k, v in json.loads(json.dumps(self.plan)).items() if held.get(k) != v]
            if other:
                raise RunError(
                    f"--out {self.out} holds other attacks ({', '.join(other)} differ). Choose another folder"
                )
        elif has_files(self.out):
            raise RunError(
                f"--out {self.out} has files in it that are no attacks; they are left alone. Choose another folder"
            )
        else:
            write_json(path, {"status": "running", **self.plan})

    def __enter__(self) -> "_Bench":
        self.adapted: PeftModel | None = None
        return self

    def __exit__(self, *error: object) -> None:
        self.adapted = None
        remove(self.out / "merged")

    def forget_model(self) -> PeftModel:
        if self.adapted is None:
            self.adapted = put_on(load_reference(self.model, self.device), self.config.adapter)
        return self.adapted

    def folder(self, attack: str, state: str) -> Path:
        return self.out / "-".join(f"{attack} {state}".replace(",", "").split())

    def asked_already(self, attack: str, *states: str) -> bool:
        """Whether the answers in all these states are there, so that no model is needed for them."""
        return all((self.folder(attack, state) / SUMMARY).exists() for state in states)

    def ask(self, attack: str, state: str, model: nn.Module | None, questions: Questions | None = None) -> None:
        """Ask the model in this state, or read what it answered; without a model, only the latter."""
        questions = questions or self.questions
        folder = self.folder(attack, state)
        if self.asked_already(attack, state):
            records = read_records(folder, like=questions.identities())
            self.reused += 1
        else:
            records = questions.ask(model, f"{attack}, {state}: ")
            if attack == "none":
                check_numbers(records)
            write_records(folder, records, summarise(records), {"attack": attack, "state": state})
        metrics = {name: m.value for name, m in summarise(records).metrics.items()}
        self.states.append({"attack": attack, "state": state, "folder": folder.name, "metrics": metrics})

    def before_and_asked(self) -> None:
        for state, scale in (("reference model", 0.0), ("forget model", self.config.scale)):
            ways = {f"{way}, {state}": questions for way, questions in self.otherwise.items()}
            there = self.asked_already("none", state) and self.asked_already("ask otherwise", *ways)
            model = None if there else self.forget_model()
            with at_scale(model, scale) if model else nullcontext():
                self.ask("none", state, model)
                for way, questions in ways.items():
                    self.ask("ask otherwise", way, model, questions)

    def relearn(self) -> None:
        config = self.config
        for what, questions in self.training.items():
            attack, states = f"relearn {what}", [f"step {step}" for step in config.relearn_steps]
            if self.asked_already(attack, *states):
                for state in states:
                    self.ask(attack, state, None)
                continue
            model = self.forget_model()
            examples = [example for part in questions.parts for example in part.answers]
            pad = questions.tokenizer.pad_token_id or 0
            # Beside a forget model: what the same training does to it tells nothing without its start, which is step 0.
            with at_scale(model, config.scale), relearn.attacker(model, config.relearn_rank, config.seed):
                steps = relearn.train(
                    model, examples, config.relearn_steps, config.relearn_rate, config.relearn_batch, pad, config.seed
                )
                for step in steps:
                    self.ask(attack, f"step {step}", model)

    def requantize(self) -> None:
        config, merged = self.config, self.out / "merged"
        self.adapted = None  # one model at a time
        after_merging = {"nf4": "nf4, merged first", "int8": "int8, merged first"}
        if self.model.quantization == "none":
            after_merging = {"none": "not quantized, merged"} | after_merging
        else:  # a device that holds the model quantized may not hold it otherwise
            log.info("The merged model is not asked before it is quantized. With --quantization none it is")
        if not self.asked_already("requantize", *after_merging.values()):
            requantize.merge(self.merging, merged)
        for kind, state in after_merging.items():
            if kind != "none":
                self._ask_loaded(f"{kind}, not merged", functools.partial(self._unmerged, kind), config.scale)
            self._ask_loaded(state, functools.partial(requantize.requantized, self.model, merged, kind, self.device))

    def _ask_loaded(self, state: str, load: Callable[[], nn.Module], scale: float = 1.0) -> None:
        """Score a state whose model is loaded for it alone, unless it is scored already; an adapter on it is at `scale`."""
        model = None if self.asked_already("requantize", state) else load()
        with at_scale(model, scale) if model else nullcontext():
            self.ask("requantize", state, model)
        del model
        gc.collect()  # modules refer to each other, and the next one must find room

    def _unmerged(self, kind: str) -> nn.Module:
        """The adapter on the base model quantized as `kind`."""
        base = load_reference(replace(self.model, quantization=kind), self.device)
        return put_on(base, self.config.adapter)

    def close(self) -> dict[str, Any]:
        record = {
            "status": "done",
            **self.plan,
            "states": self.states,
            "reused": self.reused,  # states that an earlier run of this attack had measured
            "device": str(self.device),
            "torch": torch.__version__,
            "command": command(),
            "versions": versions(),
        }
        write_json(self.out / RECORD, record)
        return record
