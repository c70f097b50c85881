"""Load an adapter folder onto a model with PEFT, after a trial on a model without weights."""

import re
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramox.adapter.factors import read_layers, read_stored
from loramox.adapter.folder import CONFIG, WEIGHTS
from loramox.adapter.layers import ALL, Layers
from loramox.adapter.streaming.shards import Entry, read_values
from loramox.errors import AdapterError

# Settings that PEFT loads as they were trained, though ΔW is more than B·A: such an adapter can be used, and nothing else.
USABLE = ("use_dora", "bias", "lora_bias", "modules_to_save", "trainable_token_indices")
OF_LAYER = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(embedding_)?[AB](\.weight)?")
PLAIN = re.compile(r"[\w.-]{1,200}")


def put_on(model: nn.Module, folder: Path | str) -> PeftModel:
    """`model` with the adapter of the folder on it, as `PeftModel.from_pretrained` does it, but for the adapter's patterns: PEFT
    gets the names of the layers instead.

    Raises `AdapterError` for a folder that is damaged, or has settings that are not known to be harmless.
    """
    named, layers, _ = _read(Path(folder))
    device = str(next(model.parameters()).device)  # else PEFT reads the file to a GPU that is there, with --use_cpu too
    return PeftModel.from_pretrained(model, str(folder), config=named.pinned(layers), torch_device=device)


def check_whole(folder: Path, outline: PreTrainedModel) -> None:
    """Raises `AdapterError` unless PEFT would load every tensor of the adapter, and would find every one that it looks for.

    Args:
        folder: the adapter's.
        outline: the base model without weights. It is of no further use afterwards.
    """
    named, adapted, stored = _read(folder)
    pinned = named.pinned(adapted)
    modules = {name: module for name, module in outline.named_modules() if name}
    if str(named.config.target_modules).lower() == ALL:
        head = outline.get_output_embeddings()
        modules = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    for name in modules:
        if name not in adapted and named.named(name):
            raise AdapterError(
                f"{folder}: by its {CONFIG} PEFT adapts {name}, of which there are no tensors in {WEIGHTS}. The two files do not belong "
                "together, or to this base: save the adapter again"
            )
    for key, part in read_values(folder / WEIGHTS):
        if not torch.isfinite(part).all():
            raise AdapterError(f"{folder / WEIGHTS}: {key} has NaN or infinity. The adapter is damaged: make it again")
    if problem := missed(pinned, stored, outline):
        raise AdapterError(
            f"{folder} would not load whole in PEFT: {problem}. Give the base that it was made for, or save it again"
        )


def missed(config: LoraConfig, stored: dict[str, Entry], outline: PreTrainedModel) -> str | None:
    """What stands in the way of PEFT's loading all tensors, in words; None if nothing does.

    PEFT itself leaves out tensors that it has no place for, in silence, and draws at random those that it does not find.
    """
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            adapted = PeftModel(outline, config, low_cpu_mem_usage=True)
            wanted, taken = (
                {k: tuple(t.shape) for k, t in get_peft_model_state_dict(adapted, save_embedding_layers=each).items()}
                for each in (False, True)
            )
    except Exception as error:  # whatever comes of a stranger's settings
        return f"it refuses the adapter ({type(error).__name__}: {error})"
    if extra := sorted(stored.keys() - taken.keys()):
        return f"it leaves out {len(extra)} tensors such as {extra[0]}"
    if gone := sorted(wanted.keys() - stored.keys()):
        return f"{len(gone)} tensors that it looks for are not there, such as {gone[0]}"
    if wrong := next((key for key, each in stored.items() if each.shape != taken[key]), None):
        return f"{wrong} is {list(stored[wrong].shape)}, and it expects {list(taken[wrong])}"
    return None


def _read(folder: Path) -> tuple[Layers, list[str], dict[str, Entry]]:
    """What the adapter's config names, the layers that it has, and its tensors."""
    named, stored = read_layers(folder, USABLE), read_stored(folder)
    saved = named.config.modules_to_save or ()
    if not isinstance(saved, list | tuple | set) or not all(isinstance(n, str) and PLAIN.fullmatch(n) for n in saved):
        raise AdapterError(
            f"{folder}: modules_to_save of its {CONFIG} is no list of layers' names. Save the adapter again"
        )
    matches = (OF_LAYER.fullmatch(key) for key in stored)
    layers = sorted({match["layer"] for match in matches if match})
    if not layers:
        raise AdapterError(f"{folder / WEIGHTS} has no LoRA weights in it. Save the adapter again")
    named.check_named(layers)
    return named, layers, stored
