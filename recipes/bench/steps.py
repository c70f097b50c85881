"""One whole step of each contender: forward and backward over the same forget and retain rows, clipped gradients, and the
optimiser's step. Each is a function that can be called repeatedly, on a model of its own.
"""

import copy
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from loramox import ReferenceConfig, UnlearnConfig, UnlearnTrainer, add_lora, load_reference
from loramox.data.pairs import Collator
from loramox.model.config import read_tokenizer

from .open_unlearning import trainers
from .shapes import RETAIN_PER_FORGET, Example

Step = Callable[[], Any]
CLIP = 1.0
MICRO_BATCHES = 4


class Case(SimpleNamespace):
    """A folder with the model, rows of which the first `forget` are forget rows, and the trainers' settings."""

    model: ReferenceConfig
    rows: list[Example]
    forget: int
    device: str
    settings: dict[str, Any]
    openunlearning: Path | None


def ours(case: Case, method: str = "mox", cached: bool = True, micro_batches: int = 1) -> tuple[UnlearnTrainer, Step]:
    """A method of loramox; `cached`: with the reference's states of the rows on disk, as from a row's second time on."""
    model = add_lora(load_reference(case.model, case.device), case.model)
    folder = case.model.model
    args = UnlearnConfig(
        method=method, output_dir=folder, retain_per_forget=RETAIN_PER_FORGET, use_cpu=case.device == "cpu", report_to="none",
        **case.settings,
    )  # fmt: skip
    forget, retain = case.rows[: case.forget], case.rows[case.forget :]
    trainer = UnlearnTrainer(model, args, forget, retain, read_tokenizer(case.model))
    if cached:
        trainer.reference.remember(case.rows, trainer.data_collator, Path(folder), 1e12)
    size = case.forget // micro_batches
    batches = [
        trainer.data_collator([trainer.train_dataset[i] for i in range(start, start + size)])
        for start in range(0, case.forget, size)
    ]

    def passes(model: nn.Module) -> None:
        for number, batch in enumerate(batches, 1):
            # As Trainer has it: mox waits for the last micro-batch of a step.
            trainer.accelerator.gradient_state._set_sync_gradients(number == len(batches))
            trainer.training_step(model, dict(batch))

    return trainer, _whole(trainer, passes, micro_batches)


def plain(case: Case) -> tuple[Trainer, Step]:
    """A PEFT step by transformers' Trainer: cross-entropy of all rows in one padded batch, by `model(..., labels=...)`."""
    trainer = _trainer(case, add_lora(load_reference(case.model, case.device), case.model))
    batch = _padded(case.rows, case.device)
    return trainer, _whole(trainer, lambda model: _pass(trainer, lambda: model(**batch).loss))


def trl(case: Case) -> tuple[Trainer, Step]:
    """TRL's `SFTTrainer` on the same rows, with its defaults except checkpointing and 16 bits, which are as in loramox."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    same = {"gradient_checkpointing": False, "bf16": False} | case.settings
    args = SFTConfig(case.model.model, max_length=None, use_cpu=case.device == "cpu", report_to="none", **same)
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in case.rows]
    model = add_lora(load_reference(case.model, case.device), case.model)
    trainer = SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=read_tokenizer(case.model)
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    return trainer, _whole(trainer, lambda model: trainer.training_step(model, dict(batch)))


def open_unlearning(case: Case) -> tuple[Trainer, Step]:
    """OpenUnlearning's GradDiff with retain loss KL, its own code: all weights trained, the reference a deep copy."""
    GradDiff = trainers(case.openunlearning)["graddiff"]
    model = load_reference(case.model, case.device).requires_grad_(True)
    trainer = _trainer(case, model)
    itself = SimpleNamespace(
        gamma=1.0, alpha=1.0, retain_loss_type="KL", model=model, ref_model=copy.deepcopy(model).requires_grad_(False).eval()
    )  # fmt: skip
    itself.compute_retain_loss = lambda model, retain_inputs: GradDiff.compute_retain_loss(itself, model, retain_inputs)
    parts = {"forget": case.rows[: case.forget], "retain": case.rows[case.forget :]}
    batch = {part: _padded(rows, case.device) for part, rows in parts.items()}
    return trainer, _whole(trainer, lambda model: _pass(trainer, lambda: GradDiff.compute_loss(itself, model, batch)))


def _trainer(case: Case, model: nn.Module) -> Trainer:
    args = TrainingArguments(case.model.model, use_cpu=case.device == "cpu", report_to="none", **case.settings)
    return Trainer(model, args, processing_class=read_tokenizer(case.model))


def _pass(trainer: Trainer, loss_of: Callable[[], Tensor]) -> None:
    with trainer.compute_loss_context_manager():
        loss = loss_of()
    loss.backward()
    loss.item()  # as a log has it


def _padded(rows: list[Example], device: str) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in Collator(0)(rows).items() if isinstance(v, Tensor)}


def _whole(trainer: Trainer, passes: Callable[[nn.Module], Any], micro_batches: int = 1) -> Step:
    trainer.current_gradient_accumulation_steps = micro_batches
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable(**(trainer.args.activation_checkpointing_kwargs or {}))
    optimizer = trainer.create_optimizer()
    model = trainer.accelerator.prepare(trainer.model)
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        passes(model)
        torch.nn.utils.clip_grad_norm_(learned, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(step: Step) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine(device: str) -> str:
    """The device, in words."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


CONTENDERS: dict[str, Callable[[Case], tuple[Trainer, Step]]] = {
    "mox": ours,
    "mox, reference not cached": lambda case: ours(case, cached=False),
    "mox, in micro-batches": lambda case: ours(case, micro_batches=MICRO_BATCHES),
    "npo_mean": lambda case: ours(case, "npo_mean"),
    "plain PEFT": plain,
    "TRL": trl,
    "OpenUnlearning": open_unlearning,
}
