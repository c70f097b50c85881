"""Training and asking on one world: what every job is made of. Nothing but the final adapter is written."""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from loramox import (
    BaselineConfig,
    BaselineTrainer,
    Columns,
    Data,
    MemorizeTrainer,
    ReferenceConfig,
    Tokenisation,
    add_lora,
    encode,
    load_reference,
    read_rows,
)
from loramox.adapter.folder import PROVENANCE, at_rank, read_factors, served_rank
from loramox.data.pairs import Collator
from loramox.evaluate.measure import Questions, Record, ScoringConfig
from loramox.evaluate.summary import summarise
from loramox.model.algebra import Factors
from loramox.model.config import check_device, read_config, read_tokenizer
from loramox.model.lora import at_scale, current_factors, with_factors
from loramox.unlearning import prepare

from .methods import STANDARD
from .runs import Run, Runs
from .world import WANTED, Split, World

Delta = dict[str, Factors]  # ΔW of each adapted layer
SHOWN = {  # metrics that are kept of a model
    "forget_probability", "retain_probability", "kept_probability", "forget_quality", "forget_probability_quality",
    "forget_truth_ratio", "forget_exact_memorization", "forget_rouge_l", "retain_rouge_l",
}  # fmt: skip
OURS = {
    "models",
    "split",
    "epochs",
    "batch",
    "r",
    "asked",
    "new_tokens",
    "refine",
    "quantization",
    "wanted",
    "reinforced_temperature",
    "retrain",
}
QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}


@dataclass
class Trained:
    """An adapted model after training, and what ΔW was on the way."""

    model: PeftModel
    delta: Delta  # what ships: the momentum average where there is one
    strength: float  # that it ships at; 1 for methods that train the forget model itself
    sign: float  # of θ_ref − sign·s·ΔW at strength s
    snapshots: list[tuple[int, Delta]] = field(default_factory=list)  # (step, ΔW)

    @contextmanager
    def at(self, strength: float, delta: Delta | None = None) -> Iterator[PeftModel]:
        """Within it the model is the forget model at this strength."""
        with with_factors(self.model, delta or self.delta), at_scale(self.model, -self.sign * strength):
            yield self.model


class Snapshots(TrainerCallback):
    """ΔW after every epoch, in main memory."""

    def __init__(self, steps: int) -> None:
        self.steps, self.taken = steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            factors = current_factors(kwargs["model"]).items()
            self.taken.append((state.global_step, {name: Factors(f.A.cpu(), f.B.cpu()) for name, f in factors}))


class Bench:
    """Trains and asks the models of one world."""

    tokenisation = Tokenisation()  # of what is trained on

    def __init__(self, world: World, runs: Runs) -> None:
        self.world, self.runs = world, runs
        self._questions: dict[tuple[Any, ...], Questions] = {}

    def of(self, run: Run) -> dict[str, Any]:
        """All settings of a run."""
        return STANDARD | dict(run.settings)

    def split(self, run: Run) -> Split:
        return self.world.split(self.of(run)["split"], self.of(run)["asked"])

    def reference(self, run: Run) -> ReferenceConfig:
        of = self.of(run)
        name = str(self.world.path / "reference")
        return ReferenceConfig(name, quantization=of["quantization"], r=of["r"], lora_alpha=of["r"])

    def config(self, run: Run) -> BaselineConfig:
        """loramox's own settings of the run."""
        of = self.of(run)
        more = {name: value for name, value in of.items() if name not in OURS}
        if run.method in ("dpo", "po"):
            more["refusals"] = str(self.world.refusals)
        if run.method == "rmu":  # the paper's 7th of 32, but one that has another below
            layers = read_config(self.reference(run)).num_hidden_layers
            more.setdefault("rmu_layer", min(layers, max(2, round(layers * 7 / 32))))
        if run.method == "whp":
            more["reinforced"] = str(self._reinforced(run))
        return BaselineConfig(
            method=run.method, seed=run.seed, output_dir=str(self.runs.work(run) / "training"), eval_strategy="no",
            eval_on_start=False, num_train_epochs=of["epochs"], per_device_train_batch_size=of["batch"], **more, **QUIET,
        )  # fmt: skip

    def coefficients(self, run: Run) -> dict[str, Any]:
        """What another method's loss was weighted with, given or its paper's."""
        config = self.config(run)
        names = [
            name for name in config.ONLY_OTHERS if name not in ("refusals", "reinforced")
        ]  # folders of this machine
        return {name: value for name in names if (value := getattr(config, name)) is not None}

    def train(self, run: Run, snapshots: bool = False) -> Trained:
        """What `loramox memorize` does, with the model kept. Raises what it raises."""
        args, reference, split, wanted = (
            self.config(run),
            self.reference(run),
            self.split(run),
            self.of(run).get("wanted"),
        )
        columns = Columns(wanted_column=WANTED if wanted or run.method == "altpo" else None)
        data = Data(str(split.forget), str(split.retain))
        prepared = prepare(reference, data, args, columns, self.tokenisation)
        set_seed(args.seed)
        model = add_lora(load_reference(reference, args.device), reference)
        trainer = (BaselineTrainer if args.is_baseline else MemorizeTrainer)(
            model, args, **prepared.datasets, processing_class=prepared.tokenizer, plan=prepared.plan
        )
        taken = Snapshots(math.ceil(len(prepared.datasets["forget_dataset"]) / args.per_device_train_batch_size))
        trainer.remove_callback(PrinterCallback)
        if snapshots:
            trainer.add_callback(taken)
        trainer.train()
        trainer.save_model()
        model.eval()

        return self._trained(run, model, args, taken.taken)

    def _trained(self, run: Run, model: PeftModel, args: BaselineConfig, taken: list) -> Trained:
        own = args.is_baseline
        delta, _ = read_factors(Path(args.output_dir) / "momentum")
        delta, _ = at_rank(delta, served_rank(self.of(run)["r"]))
        return Trained(model, delta, 1.0 if own else args.strength, -1.0 if own else 1.0, taken)

    def trained(self, run: Run) -> Trained:
        """As `train`, from the adapter that it left, where that is still there."""
        args, reference = self.config(run), self.reference(run)
        if not (Path(args.output_dir) / PROVENANCE).exists():
            return self.train(run)
        model = add_lora(load_reference(reference, args.device), reference).eval()
        return self._trained(run, model, args, [])

    def _reinforced(self, run: Run) -> Path:
        """WHP's model trained further on the forget rows, made where it is not there."""
        of = self.of(run)
        same = {name: of[name] for name in ("split", "epochs", "batch", "learning_rate", "r", "quantization")}
        more = {
            "objective": "cross_entropy",
            "temperature": of["reinforced_temperature"],
            "kl_weight": 0.0,
            "momentum": 1.0,
        }
        one = Run.of("reinforced", "mox", same | more, run.seed)
        folder = self.runs.work(one) / "training"
        with self.runs.claim(one):
            if not (folder / PROVENANCE).exists():
                self.train(one)
        return folder

    def questions(self, run: Run, parts: Mapping[str, Path] | None = None) -> Questions:
        """What is asked in this run, tokenised once a process."""
        of = self.of(run)
        files = parts or self.split(run).asked
        key = (of["new_tokens"], *files.items())
        if key not in self._questions:
            reference = self.reference(run)
            rows = {part: read_rows(str(file)) for part, file in files.items()}
            context = getattr(read_config(reference), "max_position_embeddings", None) or 2048
            scoring = ScoringConfig(max_new_tokens=of["new_tokens"])
            self._questions[key] = Questions(rows, read_tokenizer(reference), Tokenisation(), context, scoring)
        return self._questions[key]

    def ask(
        self, run: Run, model: torch.nn.Module, gold: list[Record] = (), questions: Questions | None = None
    ) -> dict[str, float]:
        """The metrics of the model as it is now; forget quality only beside the retrained model's truth ratios."""
        records = asked_quietly(questions or self.questions(run), model)
        return {name: m.value for name, m in summarise(records, gold).metrics.items() if name in SHOWN}

    def plain(self, run: Run, folder: Path) -> dict[str, Any]:
        """The metrics of a model without adapter, and the forget rows' truth ratios that others are compared to."""
        config = ReferenceConfig(str(folder), quantization=self.of(run)["quantization"])
        records = asked_quietly(self.questions(run), load_reference(config, check_device(config)))
        metrics = {name: m.value for name, m in summarise(records).metrics.items() if name in SHOWN}
        kept = [
            {"part": r["part"], "plain_text": False} | {name: r[name] for name in ("truth_ratio", "log_p")}
            for r in records
            if "truth_ratio" in r
        ]
        return metrics | {"truth_ratios": [r for r in kept if r["part"] == "forget"]}

    def from_scratch(self, run: Run, epochs: int) -> Path:
        """A model of the reference's config that learns what is to stay in this split, and nothing else."""
        folder = self.runs.work(run) / "model"
        if (folder / "config.json").exists():
            return folder
        reference = self.reference(run)
        config, tokenizer = AutoConfig.from_pretrained(reference.model), read_tokenizer(reference)
        rows = encode(read_rows(str(self.split(run).retain)), tokenizer, Tokenisation(), config.max_position_embeddings)
        torch.manual_seed(run.seed)
        args = TrainingArguments(
            str(folder), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=2e-3,
            lr_scheduler_type="cosine", warmup_steps=50, remove_unused_columns=False, seed=42 + run.seed, **QUIET,
        )  # fmt: skip
        pad = Collator(tokenizer.pad_token_id or 0)
        trainer = Trainer(
            AutoModelForCausalLM.from_config(config), args, train_dataset=rows,
            data_collator=lambda some: {k: v for k, v in pad(some).items() if k != "rows"},
        )  # fmt: skip
        trainer.train()
        tokenizer.save_pretrained(folder)
        trainer.model.save_pretrained(folder)
        return folder


def asked_quietly(questions: Questions, model: torch.nn.Module) -> list[Record]:
    """The records, without progress bars: a run asks a dozen times."""
    with contextlib.redirect_stderr(io.StringIO()):
        return questions.ask(model)


def norm(delta: Delta) -> float:
    """‖ΔW‖_F over all layers."""
    return math.sqrt(sum(f.norm() ** 2 for f in delta.values()))
