"""A PEFT adapter folder: written so that every server loads it, validated, with its provenance and a card.

Beside PEFT's two files an adapter of loramox has `provenance.json` (where it came from) and `README.md` (the card).
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loramox.errors import AdapterError, RunError, SettingsError
from loramox.files import has_files, replacing, sha256_of, write_json
from loramox.model.algebra import Factors, padded, truncate
from loramox.model.lora import variants

PROVENANCE = "provenance.json"
CARD = "README.md"
GIVE = {
    "memorization": "Give the folder 'memorization' in the run's folder",
    "forget": "Give the folder 'forget-adapter' in the run's folder, or what `loramox extrapolate` wrote",
}
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

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
        target_modules=trained.target_modules,
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
    with replacing(folder) as partial:
        partial.mkdir()
        config.save_pretrained(partial)
        # PEFT writes the target modules as a set, in another order each time.
        saved = json.loads((partial / CONFIG).read_text(encoding="utf-8"))
        saved["target_modules"] = (
            config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
        )
        write_json(partial / CONFIG, saved)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # safetensors lets no one but the owner read it
        provenance = provenance | {"sha256": sha256_of(partial / WEIGHTS)}
        write_json(partial / PROVENANCE, provenance)
        (partial / CARD).write_text(card, encoding="utf-8")
    return provenance


def read_factors(folder: Path) -> tuple[dict[str, Factors], LoraConfig]:
    """ΔW of every layer of a plain LoRA adapter folder, scale folded into B, in fp32; and the adapter's config.

    Raises `AdapterError` for a missing or damaged folder, and for a variant whose ΔW is not scale·B·A (DoRA, biases, …).
    """
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise AdapterError(
            f"{folder} is no LoRA adapter that can be read ({error}). Expected {CONFIG} and {WEIGHTS}"
        ) from error
    odd = variants(config)
    if odd:
        raise AdapterError(f"{folder} is not a plain LoRA adapter ({', '.join(odd)}): its ΔW is not lora_alpha/r·B·A")
    names = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for key in tensors
        if key.endswith(".lora_A.weight")
    }
    scale = config.lora_alpha / config.r
    try:
        factors = {
            name: Factors(
                A=tensors[f"base_model.model.{name}.lora_A.weight"].float(),
                B=tensors[f"base_model.model.{name}.lora_B.weight"].float() * scale,
            )
            for name in sorted(names)
        }
    except KeyError as error:
        raise AdapterError(
            f"{folder / WEIGHTS} lacks {error}: every lora_A needs its lora_B. The file is damaged"
        ) from error
    if not factors:
        raise AdapterError(f"{folder / WEIGHTS} has no LoRA weights in it")
    return factors, config


def read_provenance(folder: Path, kind: str) -> dict[str, Any]:
    """The provenance of an adapter that loramox wrote. Raises `AdapterError` when there is none, or it is of another kind."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{folder} has no readable {PROVENANCE}, so it is no {kind} adapter of loramox, or what makes it did not finish. "
            f"{GIVE.get(kind, 'Give a folder that loramox wrote')}; an interrupted run goes on with --resume"
        ) from error
    if provenance.get("kind") != kind:
        raise AdapterError(
            f"{folder} is a {provenance.get('kind')} adapter, not a {kind} adapter. {GIVE.get(kind, 'Give another folder')}. This one came "
            f"from: {provenance.get('command')}"
        )
    missing = {"base", "command", "data", "momentum", "settings"} - provenance.keys()
    if missing:
        raise AdapterError(
            f"{folder / PROVENANCE} lacks {', '.join(sorted(missing))}: it is damaged, or of another version of loramox. "
            "Restore it, or memorize again"
        )
    return provenance


def check_out(out: Path, kind: str, overwrite: bool) -> None:
    """Nothing but a `kind` of loramox (forget, merged) is ever overwritten: no memorization adapter, nor anyone's own files.

    Raises `RunError` when `out` is taken.
    """
    if not (out.is_file() or has_files(out)):
        return
    try:
        read_provenance(out, kind)
    except AdapterError as error:
        raise RunError(f"--out {out} holds other files. Choose another folder") from error
    if not overwrite:
        what = {"forget": "an adapter", "merged": "a merged model"}[kind]
        raise RunError(f"--out {out} holds {what} already. Replace it with --overwrite, or choose another folder")


def check_base(provenance: dict[str, Any], base: dict[str, Any], folder: Path) -> None:
    """Raises `AdapterError` when `base` is not the model that the adapter in `folder` was made for."""
    made_for = provenance["base"]
    found = {"shape": "has another architecture or size", "weights": "has other weights"}
    if made_for["weights"] is None and base["weights"] is None:  # of the hub, where a commit tells weights apart
        found["revision"] = f"is at revision {base['revision']}, not at its {made_for.get('revision')} (--revision)"
    for part, what in found.items():
        if None not in (made_for.get(part), base[part]) and made_for[part] != base[part]:
            raise AdapterError(
                f"{folder} was made for the base {made_for['model']}, and {base['model']} {what}. A forget adapter works on the "
                "model that it was memorized on, and on no other: memorize again on this one"
            )
