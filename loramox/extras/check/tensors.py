"""Compare the tensors of an adapter folder with its config and with the base model's layers."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig

from loramox.adapter.factors import KEY
from loramox.adapter.loading import missed
from loramox.adapter.streaming.shards import FLOATS, read_values
from loramox.adapter.untrusted import shown
from loramox.extras.check.servers import Adapter, Finding, remedy
from loramox.model.config import ModelConfig, skeleton

# Settings under which PEFT makes more of a layer than an adapter's tensors tell.
NEED_BASE = ("target_parameters", "trainable_token_indices", "modules_to_save", "bias", "lora_bias", "use_dora")
LOST = (
    "Get the adapter again from where it was made, or make it again: loramox extrapolate DIR/trained --out NEW_FOLDER"
)


def of_types(read: Adapter) -> Iterator[Finding]:
    """Every tensor must be of floats; PEFT casts others without a word."""
    if odd := [key for key, tensor in read.tensors.items() if tensor.dtype not in FLOATS]:
        of_type = f"of type {shown(read.tensors[odd[0]].dtype)}, which no weights of an adapter are"
        yield Finding("all", "stop", f"{len(odd)} tensors such as {shown(odd[0])} are {of_type}", LOST)


def by_peft(read: Adapter, config: PretrainedConfig | None) -> Iterator[Finding]:
    """What PEFT itself says, of the base without weights or, where there is none, of layers as large as the adapter's."""
    do = "Give the base: loramox ship check ADAPTER --base FOLDER_OR_HUB_ID"
    outline: nn.Module | None = None
    if config is not None:
        try:
            outline = skeleton(config, ModelConfig(model=read.base or ""))
        except Exception as error:  # whatever a model's code raises for sizes that it was not made for
            what = f"shapes are not compared, as no model can be built from the base's config: {shown(error)}"
            yield Finding("all", "note", what, do)
    if outline is None and (
        needs := [name for name in NEED_BASE if read.config.get(name) not in (None, False, [], {}, "none")]
    ):
        yield Finding("all", "stop", f"with {needs[0]}, whether it loads whole cannot be told without the base", do)
    elif problem := missed(lora_config(read.config), read.tensors, outline or _layers_alone(read)):
        what = f"it does not load whole in PEFT: {shown(problem, 300)}"
        yield Finding("all", "stop", what, f"Give the base that it was made for (--base). {LOST}")


def lora_config(settings: dict[str, Any]) -> LoraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraConfig.from_peft_type(**{k: v for k, v in settings.items() if k != "runtime_config"})


def _layers_alone(read: Adapter) -> nn.Module:
    """Linear layers on the meta device where the adapter has tensors, each of the size that its tensors have."""
    sizes: dict[str, dict[str, int]] = {}
    for key, tensor in read.tensors.items():
        if (match := KEY.fullmatch(key)) and len(tensor.shape) == 2:
            sizes.setdefault(match["layer"], {})[match["part"]] = tensor.shape[match["part"] == "A"]
    root = nn.Module()
    with torch.device("meta"):
        for layer, size in sizes.items():
            _put(root, layer, nn.Linear(size.get("A", 1), size.get("B", 1)))
    return root


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for part in parents:
        root = root._modules.setdefault(part, nn.Module())
    root._modules[last] = module


def of_values(read: Adapter, path: Path) -> Iterator[Finding]:
    """NaN and infinity, and an adapter that does nothing."""
    bad, does_something = {}, False
    for key, part in read_values(path):
        if not torch.isfinite(part).all():
            bad[key] = True
        does_something = does_something or ("lora_A" not in key and bool(part.any()))
    if bad:
        yield Finding("all", "stop", f"{len(bad)} tensors have NaN or infinity, such as {shown(next(iter(bad)))}", LOST)
    elif not does_something:
        yield Finding("all", "note", "every lora_B is 0: the model with it is the base model", remedy(read, ""))
