"""Load the frozen reference model, quantized if wanted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub.utils as hub
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from loramox.errors import ModelError
from loramox.model.config import ModelConfig, attention_of, read_config

log = logging.getLogger(__name__)


def load_reference(
    reference: ModelConfig, device: torch.device | str = "cpu", gguf: str | None = None
) -> PreTrainedModel:
    """θ_ref on `device`, frozen, in the wanted quantization, every 4-bit layer safe for training after evaluation.

    With `reference.shard` it is on the CPU, for `loramox.model.sharding.shard` to cut it up when it has its adapters. With `gguf`
    (a file in the model's folder) the weights are those of that file, no longer quantized.

    Raises:
        ModelError: what `read_config` refuses, or weights that are missing or misshapen: transformers would draw them at random,
            new ones each time.
    """
    config = without_dropout(read_config(reference, weights=True))
    dtype = reference.torch_dtype(torch.device(device))
    log.info("Loading the model: %s", reference.model)
    with attention_of(reference), _without_bar():
        model, found = AutoModelForCausalLM.from_pretrained(
            reference.model,
            config=config,
            revision=reference.revision,
            attn_implementation=reference.attn_implementation,
            trust_remote_code=reference.trust_remote_code,
            dtype=dtype,
            device_map={"": "cpu" if reference.shard else device},
            quantization_config=quantization(reference.quantization, dtype, reference.shard),
            gguf_file=gguf,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused here, by name
        )
    _check_loaded(reference, model, found)
    if reference.quantization == "nf4":
        keep_4bit_weights_in_place(model)
    return model.requires_grad_(False)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Within it loading weights leaves no bar on the terminal; downloads show theirs."""
    hides = hub.are_progress_bars_disabled()
    disable_progress_bar()
    if not hides:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bar()
        if hides:
            hub.disable_progress_bars()


def _check_loaded(reference: ModelConfig, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raises `ModelError` unless each weight was loaded, and nothing else."""
    absent, misfits = sorted(found["missing_keys"]), sorted(str(key) for key, *_ in found["mismatched_keys"])
    if absent or misfits:
        first = absent[0] if absent else f"{misfits[0]}, of another shape"
        raise ModelError(
            f"--model {reference.model} lacks {len(absent) + len(misfits)} of its weights (first: {first}), which would be random numbers. The "
            "checkpoint is incomplete, or its config.json is of another model: download it again, or save it again with save_pretrained"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"--model {reference.model} has an adapter in its repository, which transformers has put on the model. Give the plain base, or "
            "merge the adapter first"
        )


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The config with every dropout of the base model at 0.

    GPT-2's is 0.1: two passes of a training model would differ, and the KL to the reference would not be 0 at the start.
    """
    for name, value in config.to_dict().items():
        if isinstance(value, float) and (name.endswith(("dropout", "_pdrop", "dropout_prob", "dropout_rate"))):
            setattr(config, name, 0.0)
    return config


def quantization(kind: str | None, dtype: torch.dtype, shard: bool = False) -> BitsAndBytesConfig | None:
    """How bitsandbytes quantizes weights while they are loaded: nf4 (with double quantization) or int8; None for others."""
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # What is cut over processes must be of a type that torch takes for a parameter, which bytes are not.
            bnb_4bit_quant_storage=dtype if shard else torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else None


def keep_4bit_weights_in_place(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights, after which frozen layers silently pass no gradient.

    On a CPU with avx512_bf16, one forward pass without gradients in eval mode repacks each weight for inference, in
    place and for good; `from_pretrained` returns a model in eval mode, so "evaluate, then train" would train nothing.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
