"""The folder `trained/`: the trained adapter, the momentum average that ships, and checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, safe_globals

from loramox.adapter.card import trained_card
from loramox.adapter.folder import CHECKSUMS, PROVENANCE, WEIGHTS, at_rank, write_adapter
from loramox.adapter.folder import MOMENTUM as WHOLE
from loramox.errors import LoramoxError, RunError
from loramox.files import read_json, remove, sha256_of, write_json
from loramox.model.algebra import Factors
from loramox.model.config import identify
from loramox.model.lora import ADAPTER, ReferenceConfig, current_factors
from loramox.run import command, versions
from loramox.train.config import UnlearnConfig
from loramox.train.momentum import Momentum

CHECKED = (TRAINER_STATE_NAME, WEIGHTS, "optimizer.pt", "scheduler.pt")


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

    A checkpoint without momentum, which is written last, was left by a kill and is passed over. Damaged ones are passed over with
    a warning.

    Raises:
        RunError: all checkpoints are damaged.
    """
    written = [c for c in folder.glob("checkpoint-*") if (c / WHOLE).exists()]
    damaged = ""
    for checkpoint in sorted(written, key=_step, reverse=True):
        try:
            _check_whole(checkpoint)
        except LoramoxError as error:
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
    for each in folder.glob("checkpoint-*"):
        if checkpoint is None or _step(each) > _step(Path(checkpoint)):
            remove(each)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def write_checksums(checkpoint: Path) -> None:
    """Keep the checksums of a checkpoint that is whole, so that a byte that changes later is not trained on."""
    # Not the random states of other processes, which may still be writing them.
    held = [checkpoint / name for name in (*CHECKED, "rng_state.pth", WHOLE)]
    write_json(checkpoint / CHECKSUMS, {path.name: sha256_of(path) for path in held if path.is_file()})


def _check_whole(checkpoint: Path) -> None:
    """Raises `LoramoxError` that names a file of the checkpoint that is missing or damaged."""
    checksums = checkpoint / CHECKSUMS
    known = read_json(checksums, dict) if checksums.exists() else {}  # a kill just before they are written leaves none
    random_states = sorted(p.name for p in checkpoint.glob("rng_state*.pth")) or ["rng_state.pth"]
    for name in (*CHECKED, *random_states, WHOLE):
        path = checkpoint / name
        if not path.is_file():
            raise RunError(f"{path} is missing")
        if name in known and known[name] != sha256_of(path):
            raise RunError(f"{path} is damaged: its checksum is not that in {CHECKSUMS}")
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix != ".json":
                with safe_globals():
                    torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and safetensors raise errors of many types for damaged files
            raise RunError(f"{path} is damaged ({type(error).__name__})") from error
    state = checkpoint / TRAINER_STATE_NAME
    if read_json(state, dict).get("global_step") != _step(checkpoint):
        raise RunError(f"{state} is damaged: its global_step is not that of the folder")
    Momentum.load(checkpoint)


def lacks_scores(state: TrainerState, args: UnlearnConfig) -> bool:
    """Whether a checkpoint was written after the last step of an epoch, but before the scores that follow it."""
    scored = any(
        log["step"] == state.global_step and any(name.startswith("eval_") for name in log) for log in state.log_history
    )
    return args.eval_strategy == "epoch" and state.epoch == round(state.epoch or 0) and not scored


def plan_of(model: PeftModel, args: UnlearnConfig) -> dict[str, Any]:
    """What is known about a run that was put together in Python: everything but where its rows came from."""
    return {
        "command": command(),
        "method": args.spec.title,
        "alpha": args.alpha,
        "base": base_of(model),
        "data": {},
        "settings": {"r": model.peft_config[ADAPTER].r} | args.to_dict(),
        "versions": versions(),
    }


def base_of(model: PeftModel) -> dict[str, Any]:
    """What the provenance says of the base model of a run that was put together in Python."""
    lora = model.peft_config[ADAPTER]
    # A model that was built from a config, not loaded, has no name.
    base = ReferenceConfig(model=lora.base_model_name_or_path or "", revision=lora.revision)
    return identify(base, model.get_base_model().config)
