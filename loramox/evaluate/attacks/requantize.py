"""The requantizing attack: the adapter merged into 16- or 32-bit weights, which are then made 4- or 8-bit.

The merge passes through the files piece by piece, on the CPU: no model is loaded for it, of whatever size.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from loramox.adapter.factors import read_factors
from loramox.adapter.streaming.checkpoint import Target, base_config, fetch, place, read_shards, targets
from loramox.adapter.streaming.shards import CODES, Shard
from loramox.adapter.streaming.weights import write_index, write_shards
from loramox.errors import AdapterError, ModelError
from loramox.files import replacing
from loramox.model.algebra import scaled
from loramox.model.config import ModelConfig, read_tokenizer, skeleton
from loramox.model.load import load_reference


class Merge(NamedTuple):
    """A merge of which everything was checked and nothing is written yet."""

    model: ModelConfig
    config: PretrainedConfig
    folder: Path  # of the model's files
    shards: list[Shard]
    changed: dict[str, Target]
    code: str  # type of what is written, in the words of safetensors


def plan(model: ModelConfig, adapter: Path, scale: float, device: torch.device) -> Merge:
    """Raises `AdapterError` or `ModelError` where the adapter cannot be merged into the files of the model."""
    try:
        config = base_config(model)
        outline = skeleton(config, model)
        factors = {name: scaled(each, scale) for name, each in read_factors(adapter)[0].items()}
        wanted = targets(factors, outline, adapter)
        folder = fetch(model)
        shards = read_shards(folder)
        changed = place(wanted, shards, outline.base_model_prefix, adapter)
    except (AdapterError, ModelError) as error:
        why = str(error).replace("--base", "--model")
        raise type(error)(f"{why}. Or leave requantize out of --attacks") from error
    return Merge(model, config, folder, shards, changed, CODES[model.torch_dtype(device)])


def merge(planned: Merge, folder: Path) -> None:
    """Write the model with the adapter merged into its unquantized weights to `folder`."""
    with replacing(folder, folder=True) as partial:
        write_shards(planned.shards, planned.changed, planned.code, partial, progress=False)
        write_index(planned.folder, planned.shards, planned.code, partial)
        planned.config.save_pretrained(partial)
        read_tokenizer(planned.model).save_pretrained(partial)


def requantized(model: ModelConfig, folder: Path, kind: str, device: torch.device) -> PreTrainedModel:
    """The merged model in `folder`, loaded in the quantization `kind`."""
    return load_reference(replace(model, model=str(folder), revision=None, quantization=kind), device)
