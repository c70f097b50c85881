"""The requantizing attack: the adapter merged into 16- or 32-bit weights, which are then made 4- or 8-bit."""

import gc
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from loramox.files import replacing
from loramox.model.config import ModelConfig, read_tokenizer
from loramox.model.load import load_reference
from loramox.model.lora import at_scale


def merge(model: ModelConfig, adapter: str, scale: float, device: torch.device, folder: Path) -> None:
    """Write the model with the adapter merged into its unquantized weights at `scale`, to `folder`."""
    adapted = PeftModel.from_pretrained(load_reference(replace(model, quantization="none"), device), adapter)
    with at_scale(adapted, scale):
        merged = adapted.merge_and_unload(safe_merge=True)
    with replacing(folder) as partial:
        merged.save_pretrained(partial)
        read_tokenizer(model).save_pretrained(partial)
    del adapted, merged
    gc.collect()


def requantized(model: ModelConfig, folder: Path, kind: str, device: torch.device) -> PreTrainedModel:
    """The merged model in `folder`, loaded in the quantization `kind`."""
    return load_reference(replace(model, model=str(folder), revision=None, quantization=kind), device)
