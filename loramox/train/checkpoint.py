"""The folder `trained/`: the trained adapter, the momentum average that ships, and checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerState

from loramox.adapter.card import trained_card
from loramox.adapter.folder import CHECKSUMS, MOMENTUM, PROVENANCE, at_rank, write_adapter
from loramox.errors import RunError
from loramox.files import read_json, remove, sha256_of, write_json
from loramox.model.algebra import Factors
from loramox.model.config import identify
from loramox.model.lora import ADAPTER, ReferenceConfig, current_factors
from loramox.run import command, versions
from loramox.train.config import UnlearnConfig
from loramox.train.momentum import Momentum


def write_trained(folder: Path, model: PeftModel, momentum: Momentum, plan: dict[str, Any]) -> None:
    """Write ΔW to `folder` and its momentum average to `folder`/momentum, both as plain PEFT adapters in fp32.

    The provenance of `folder` is written last: a folder that has it is whole. Raises `RunError` before any training.
    """
    if not momentum.average:
        raise RunError(f"nothing has been trained yet, so there is nothing to write to {folder}. Call train() first")
    provenance = {"kind": "trained", **plan, "momentum": momentum.summary()}
    largest = max(factors.rank for factors in momentum.average.values())
    partial = folder / ".trained"
    for place, delta in (
        (folder / "momentum", at_rank(momentum.average, largest)[0]),
        (partial, current_factors(model)),
    ):
        on_cpu = {name: Factors(factors.A.cpu(), factors.B.cpu()) for name, factors in delta.items()}
        card = trained_card(provenance)
        write_adapter(place, on_cpu, model.peft_config[ADAPTER], plan["base"], torch.float32, provenance, card)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == PROVENANCE):
        file.replace(folder / file.name)
    partial.rmdir()


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint from which training can go on; None to start from the beginning.

    A checkpoint without its momentum or its checksums, which are written last, was left by a kill and is passed over. Damaged
    ones are passed over with a warning. Raises `RunError` where all are damaged.
    """
    written = [c for c in _checkpoints(folder) if (c / MOMENTUM).exists() and (c / CHECKSUMS).exists()]
    damaged = ""
    for checkpoint in sorted(written, key=_step, reverse=True):
        try:
            _check_whole(checkpoint)
        except RunError as error:
            damaged = str(error)
            continue
        if damaged:
            warnings.warn(f"{damaged}. Training goes on from {checkpoint.name} instead", stacklevel=2)
        return str(checkpoint)
    if damaged:
        raise RunError(f"{damaged}, and no older checkpoint is whole. Restore it, or start anew with --overwrite")
    return None


def drop_newer(folder: Path, checkpoint: str | None) -> None:
    """Delete the checkpoints, damaged or half-written, after the one that training goes on from: it writes them again."""
    for each in _checkpoints(folder):
        if checkpoint is None or _step(each) > _step(Path(checkpoint)):
            remove(each)


def _checkpoints(folder: Path) -> list[Path]:
    """Those that Trainer wrote; a copy that the user made, such as checkpoint-best, is none."""
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def write_checksums(checkpoint: Path) -> None:
    """Keep the checksum of every file of a complete checkpoint, so that a byte that changes later is not trained on."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    write_json(checkpoint / CHECKSUMS, {str(path.relative_to(checkpoint)): sha256_of(path) for path in files})


def _check_whole(checkpoint: Path) -> None:
    """Raises `RunError` that names a file of the checkpoint that is missing or damaged."""
    for name, checksum in read_json(checkpoint / CHECKSUMS, dict).items():
        path = checkpoint / name
        if not path.is_file():
            raise RunError(f"{path} is missing")
        if sha256_of(path) != checksum:
            raise RunError(f"{path} is damaged: its checksum is not that in {CHECKSUMS}")


def lacks_scores(state: TrainerState, args: UnlearnConfig) -> bool:
    """Whether a checkpoint was written after the last step of an epoch, but before the scores that follow it."""
    scored = any(
        log["step"] == state.global_step and any(name.startswith("eval_") for name in log) for log in state.log_history
    )
    return args.eval_strategy == "epoch" and state.epoch == round(state.epoch or 0) and not scored


def plan_of(
    args: UnlearnConfig, base: dict[str, Any], data: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The description of a run, in its record and in the provenance of what it writes."""
    return {
        "command": command(),
        "method": args.spec.title,
        "alpha": args.alpha,
        "base": base,
        "data": data,
        "settings": settings,
        "versions": versions(),
    }


def base_of(model: PeftModel) -> dict[str, Any]:
    """What the provenance says of the base model of a run that was put together in Python."""
    lora = model.peft_config[ADAPTER]
    # A model that was built from a config, not loaded, has no name.
    base = ReferenceConfig(model=lora.base_model_name_or_path or "", revision=lora.revision)
    return identify(base, model.get_base_model().config)
