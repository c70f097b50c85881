"""The tensors of an adapter folder against its config and against the base model's layers."""

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from loramox.adapter.folder import CONFIG
from loramox.adapter.layers import Layers
from loramox.adapter.loading import missed
from loramox.adapter.untrusted import Stored, shown, values
from loramox.extras.check.servers import Adapter, Finding, remedy
from loramox.model.config import ModelConfig, skeleton

FLOATS = ("F16", "BF16", "F32", "F64")
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
VARIANTS = {"use_dora": r"lora_magnitude_vector", "lora_bias": r"lora_B\.bias$"}  # by the setting that asks for them
EMPTY = (None, False, [], {})
NEED_BASE = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
    "bias",
    "lora_bias",
    "use_dora",
)
MOST_PROBLEMS = 10  # to be told of one adapter
LOST = (
    "Get the adapter again from where it was made, or make it again: loramox extrapolate DIR/trained --out NEW_FOLDER"
)


def of_keys(read: Adapter) -> Iterator[Finding]:
    """Every tensor must be a float lora_A or lora_B of a layer that PEFT will look for, of the rank that the config says."""
    modules: dict[str, set[str]] = {}
    problems: dict[str, list[str]] = {}
    layers = Layers(lora_config(read.config), Path(read.folder))
    for key, tensor in read.tensors.items():
        match = KEY.fullmatch(key)
        if tensor.dtype not in FLOATS:
            problems.setdefault(f"of type {shown(tensor.dtype)}, which no weights of an adapter are", []).append(key)
        if match:
            modules.setdefault(match["module"], set()).add(match["part"])
        if problem := _problem(layers, tensor, match) if match else _stranger(read, key):
            problems.setdefault(problem, []).append(key)
    if halves := [name for name, parts in modules.items() if len(parts) < 2]:
        problems["without its other half (lora_A or lora_B)"] = halves
    for what, keys in list(problems.items())[:MOST_PROBLEMS]:
        yield Finding("all", "stop", f"{len(keys)} tensors such as {shown(keys[0])} are {what}", LOST)
    if not modules and not problems:
        yield Finding("all", "stop", "there are no LoRA weights", LOST)


def _problem(layers: Layers, tensor: Stored, match: re.Match[str]) -> str | None:
    if len(tensor.shape) != 2:
        return "not a matrix"
    if not layers.named(match["module"]):
        return "not among target_modules, or excluded from them, so that PEFT leaves them out in silence"
    expected, _ = layers.rank_and_alpha(match["module"])
    rank = tensor.shape[0 if match["part"] == "A" else 1]
    return None if rank == expected else f"of rank {rank}, where {CONFIG} says {shown(expected)}"


def _stranger(read: Adapter, key: str) -> str | None:
    """Of a tensor that is no lora_A or lora_B: None where a setting asks for it."""
    if read.config.get("modules_to_save") or read.config.get("bias", "none") != "none" or "lora_embedding_" in key:
        return None
    if any(read.config.get(setting) and re.search(pattern, key) for setting, pattern in VARIANTS.items()):
        return None
    return "no LoRA weights as PEFT names them (base_model.model.….lora_A.weight)"


def _targeted(module: str, targets: Collection[str]) -> bool:
    """As PEFT matches a list: the name, or its last parts."""
    return any(name in targets for name in _suffixes(module))


def _suffixes(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def of_shapes(read: Adapter, config: PretrainedConfig) -> Iterator[Finding]:
    """Every layer must be one of the base's, of its size; and every layer of the base that is targeted must be there."""
    try:
        base = dict(skeleton(config, ModelConfig(model=read.base or "")).named_modules())
    except Exception as error:  # whatever a model's code raises for sizes that it was not made for
        what = f"shapes are not compared, as no model can be built from the base's config: {shown(error)}"
        yield Finding("all", "note", what, "Give another base: loramox ship check ADAPTER --base FOLDER_OR_HUB_ID")
        return
    wrong, strangers = [], []
    for key, tensor in read.tensors.items():
        if (match := KEY.fullmatch(key)) is None or len(tensor.shape) != 2:
            continue
        size = _size(base.get(match["module"]))
        if size is None:
            strangers.append(match["module"])
        elif (tensor.shape[-1] if match["part"] == "A" else tensor.shape[0]) != size[match["part"] == "B"]:
            wrong.append(f"{shown(key)}: {list(tensor.shape)} on a layer of {size[0]} to {size[1]}")
    do = "Give the base that it was made for (--base), or train on this one"
    if strangers:
        what = f"the base has no linear layers {shown(', '.join(sorted(set(strangers))[:3]))} ({len(set(strangers))} in all)"
        yield Finding("all", "stop", what, do)
    if wrong:
        yield Finding("all", "stop", f"{len(wrong)} tensors do not fit the base, such as {wrong[0]}", do)
    if any(read.config.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return  # these take layers out again, some of them by a pattern
    targets, saved = read.targets, tuple(read.config.get("modules_to_save") or ())
    wanted = [f"{n}.lora_{part}.weight" for n, m in base.items() if _targeted(n, targets) and _size(m) for part in "AB"]
    wanted += [f"{n}.{p}" for n, m in base.items() if saved and n.endswith(saved) for p, _ in m.named_parameters()]
    missing = [name for name in wanted if f"base_model.model.{name}" not in read.tensors]
    if missing:
        what = f"{len(missing)} tensors of target_modules or modules_to_save are not there, such as {missing[0]}"
        yield Finding("all", "stop", what, LOST)


def by_peft(read: Adapter, config: PretrainedConfig | None) -> Iterator[Finding]:
    """What PEFT itself says, of the base without weights or, where there is none, of layers as large as the adapter's."""
    outline: nn.Module | None = None
    if config is not None:
        with suppress(Exception):  # whatever a model's code raises, of which `of_shapes` tells
            outline = skeleton(config, ModelConfig(model=read.base or ""))
    if outline is None and (needs := [name for name in NEED_BASE if read.config.get(name) not in (*EMPTY, "none")]):
        do = "Give the base: loramox ship check ADAPTER --base FOLDER_OR_HUB_ID"
        yield Finding("all", "stop", f"with {needs[0]}, whether it loads whole cannot be told without the base", do)
        return
    if problem := missed(lora_config(read.config), read.tensors, _layers_alone(read) if outline is None else outline):
        yield Finding("all", "stop", f"it does not load whole in PEFT: {shown(problem, 300)}", LOST)


def lora_config(settings: dict[str, Any]) -> LoraConfig:
    """The settings as PEFT reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraConfig.from_peft_type(**{k: v for k, v in settings.items() if k != "runtime_config"})


def _layers_alone(read: Adapter) -> nn.Module:
    """Linear layers on the meta device where the adapter has tensors, each of the size that its tensors have."""
    root = nn.Module()
    with torch.device("meta"):
        for key, tensor in read.tensors.items():
            match = KEY.fullmatch(key)
            if match and match["part"] == "B":
                other = read.tensors[key.replace(".lora_B.", ".lora_A.")]
                _put(root, match["module"], nn.Linear(other.shape[1], tensor.shape[0]))
    return root


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)


def _size(module: nn.Module | None) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else None


def of_values(read: Adapter, path: Path) -> Iterator[Finding]:
    """NaN and infinity, and an adapter that does nothing."""
    bad, does_something = {}, False
    for key, part in values(path, {k: tensor for k, tensor in read.tensors.items() if len(tensor.shape) == 2}):
        if not torch.isfinite(part).all():
            bad[key] = True
        does_something = does_something or ("lora_A" not in key and bool(part.any()))
    if bad:
        yield Finding("all", "stop", f"{len(bad)} tensors have NaN or infinity, such as {shown(next(iter(bad)))}", LOST)
    elif not does_something:
        yield Finding("all", "note", "every lora_B is 0: the model with it is the base model", remedy(read, ""))
