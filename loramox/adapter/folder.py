"""Write a PEFT adapter folder that every server loads, with its provenance and a card.

Beside PEFT's two files an adapter of loramox has `provenance.json` (where it came from) and `README.md` (the card).
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from loramox.errors import AdapterError, SettingsError
from loramox.files import replacing, sha256_of, write_json
from loramox.model.algebra import Factors, padded, truncate

PROVENANCE = "provenance.json"
CARD = "README.md"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Of a checkpoint: the momentum average of ΔW, and the checksums of its files.
MOMENTUM = "momentum.safetensors"
CHECKSUMS = "checksums.json"

# The ranks that vLLM serves. 16 is also its default limit.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def served_rank(rank: int) -> int:
    """The smallest rank that every server takes and that holds `rank`. Raises `SettingsError` above the largest."""
    for served in SERVED_RANKS:
        if rank <= served:
            return served
    raise SettingsError(
        f"r is {rank}; servers load adapters up to rank {SERVED_RANKS[-1]}. Lower --r, or ship at a lower --rank"
    )


def at_rank(factors: dict[str, Factors], rank: int) -> tuple[dict[str, Factors], float]:
    """Every layer's ΔW at exactly `rank`: truncated or padded. Also returns the error over all layers, as a share of ‖ΔW‖_F."""
    fitted, lost, norm = {}, 0.0, 0.0
    for name, each in factors.items():
        small, error = truncate(each, rank)
        fitted[name] = padded(small, rank)
        lost, norm = lost + error**2, norm + each.norm() ** 2
    return fitted, math.sqrt(lost / norm) if norm else 0.0


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`. Raises `AdapterError` when a value overflows, or one that is not 0 becomes 0."""
    result = tensor.to(dtype)
    if not torch.isfinite(result).all():
        what = "is not finite in float32 already" if not torch.isfinite(tensor).all() else f"overflows in {dtype}"
        raise AdapterError(f"{name} {what}. Ship it with --ship_dtype float32, or at a lower --alpha")
    if ((result == 0) & (tensor != 0)).any():
        raise AdapterError(
            f"{name}: values too small for {dtype} would be lost. Ship it with --ship_dtype float32 or bfloat16"
        )
    return result


def write_adapter(
    folder: Path,
    factors: dict[str, Factors],
    trained: LoraConfig,
    base: dict[str, Any],
    dtype: torch.dtype,
    provenance: dict[str, Any],
    card: str,
) -> dict[str, Any]:
    """Write `factors`, all of one rank, as a PEFT adapter whose own scale is 1, whole or not at all; return its provenance.

    `trained` is the config of the adapter that they came from (which layers, in which orientation); `base` names the model.
    """
    rank = next(iter(factors.values())).rank
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,  # so that the scale is 1, which is also what servers that ignore or round it arrive at
        target_modules=_targets(trained, factors),
        fan_in_fan_out=trained.fan_in_fan_out,
        base_model_name_or_path=base["model"],
        revision=base["revision"],
        inference_mode=True,
    )
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": cast(f"{name}.lora_{part}", tensor, dtype).contiguous()
        for name, each in factors.items()
        for part, tensor in each._asdict().items()
    }
    with replacing(folder, folder=True) as partial:
        config.save_pretrained(partial)
        # PEFT writes the target modules as a set, in another order each time.
        saved = json.loads((partial / CONFIG).read_text(encoding="utf-8"))
        saved["target_modules"] = sorted(config.target_modules)
        write_json(partial / CONFIG, saved)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # safetensors lets no one but the owner read it
        provenance = provenance | {"sha256": sha256_of(partial / WEIGHTS)}
        write_json(partial / PROVENANCE, provenance)
        (partial / CARD).write_text(card, encoding="utf-8")
    return provenance


def _targets(trained: LoraConfig, factors: dict[str, Factors]) -> list[str]:
    """target_modules for the adapted layers: as in training, or each layer's name where that was a pattern or had exceptions."""
    exceptions = trained.exclude_modules or trained.layers_to_transform is not None
    named = isinstance(trained.target_modules, str) or not trained.target_modules or exceptions
    return sorted(factors if named else trained.target_modules)
