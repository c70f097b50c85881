"""The folder `trained/`: the adapter as it was trained, the momentum average that ships, checkpoints."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loramox.adapter.card import trained_card
from loramox.adapter.folder import PROVENANCE, at_rank, write_adapter
from loramox.errors import RunError
from loramox.model.algebra import Factors
from loramox.model.config import identify
from loramox.model.lora import ADAPTER, ReferenceConfig, current_factors
from loramox.run import command, versions
from loramox.train.config import UnlearnConfig
from loramox.train.momentum import FILE as WHOLE
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
    """The newest checkpoint whose momentum, written last, is there; None to start from the beginning."""
    whole = [c for c in folder.glob("checkpoint-*") if (c / WHOLE).exists()]
    return str(max(whole, key=lambda c: int(c.name.rpartition("-")[2]))) if whole else None


def plan_of(model: PeftModel, args: UnlearnConfig) -> dict[str, Any]:
    """What is known about a run that was put together in Python: everything but where its rows came from."""
    return {
        "command": command(),
        "method": args.title,
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
