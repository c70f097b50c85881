"""A pico model of each family that `ship gguf` writes for, of random weights, with no part of it at 0 or at 1."""

from pathlib import Path

import torch
from conftest import SMALL
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "head_dim": 32},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": 128},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
}


def write_base(kind: str, folder: Path) -> Path:
    """A model of the family in `folder`: 2 layers, 4 heads, 2 of them for keys and values."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **SMALL, **FAMILIES[kind], intermediate_size=128, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start at 1 and 0
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
