"""A PEFT adapter folder: written so that every server loads it, validated, with its provenance and a card.

Beside PEFT's two files an adapter of loramox has `provenance.json` (where it came from) and `README.md` (the card).
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
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
    "trained": "Give the folder 'trained' in the run's folder",
    "forget": "Give the folder 'forget-adapter' in the run's folder, or what `loramox extrapolate` wrote",
}
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")

# Settings that change a layer's rank or scale, which `read_factors` folds into B.
FOLDED = ("use_rslora", "rank_pattern", "alpha_pattern")

# Why adapters with these settings cannot be written as scale·B·A of the base model.
WHY = {
    "use_dora": "DoRA also rescales the weights themselves",
    "bias": "biases were trained too",
    "lora_bias": "biases were trained too",
    "modules_to_save": "whole layers were trained too",
    "trainable_token_indices": "embeddings were trained too",
    "target_parameters": "it changes parameters outside linear layers",
    "layer_replication": "it adds layers that the base model does not have",
    "alora_invocation_tokens": "it is on only from its invocation tokens on",
    "init_lora_weights": "it started by changing the weights of the base model, so that its B·A belongs to another base",
}
CONVERT = "Convert it when saving: save_pretrained with path_initial_model_for_weight_conversion"

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
    with replacing(folder) as partial:
        partial.mkdir()
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


def read_factors(folder: Path) -> tuple[dict[str, Factors], LoraConfig]:
    """Read ΔW of every layer of a plain LoRA adapter, in fp32 with the scale folded into B.

    The scale is lora_alpha/r, or lora_alpha/√r for rsLoRA. Both may differ from layer to layer (rank_pattern, alpha_pattern).

    Returns:
        ΔW by the layer's name in the base model, and the adapter's config.

    Raises:
        AdapterError: a missing or damaged folder, or a variant whose ΔW is not scale·B·A (DoRA, biases, …).
    """
    config, tensors = _read_config(folder), _read_weights(folder)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{folder} is not a plain LoRA adapter: {key} is more than the A and B of a linear layer. Train it again with "
                "neither embeddings nor lm_head in target_modules, and without resizing the embeddings"
            )
        layers.setdefault(match["layer"], {})[match["part"]] = tensor.float()
    if not layers:
        raise AdapterError(f"{folder / WEIGHTS} has no LoRA weights in it. Save the adapter again")
    factors = {}
    for name, parts in sorted(layers.items()):
        if len(parts) < 2:
            raise AdapterError(
                f"{folder / WEIGHTS} lacks a half of {name}: every lora_A needs its lora_B. The file is damaged: save it again"
            )
        rank, scale = _rank_and_scale(config, name)
        A, B = parts["A"], parts["B"]
        if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == rank:
            raise AdapterError(
                f"{folder / WEIGHTS}: A {list(A.shape)} and B {list(B.shape)} of {name} are no factors of rank {rank}, which "
                f"{CONFIG} gives it. The two files do not belong together: save the adapter again"
            )
        factors[name] = Factors(A, B * scale)
    return factors, config


def _read_config(folder: Path) -> LoraConfig:
    """The config of a plain LoRA adapter whose scale PEFT can tell for every layer. Raises `AdapterError` for any other."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = settings["peft_type"]
        config = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise AdapterError(
            f"{folder} is no LoRA adapter that can be read ({error!r}). Expected {CONFIG} and {WEIGHTS}, as PEFT writes them"
        ) from error
    if config is None:
        raise AdapterError(
            f"{folder} is a {kind} adapter (peft_type), not a LoRA adapter. Only LoRA's change is a product B·A that can be scaled "
            "and negated: train it again with LoraConfig"
        )
    # PEFT leaves out what it does not know, and warns.
    newer = [name for name, value in settings.items() if value and not hasattr(config, name)]
    if newer:
        raise AdapterError(
            f"{folder} has settings that this version of PEFT does not know ({', '.join(newer)}), so that its ΔW is not known either. "
            "Update peft"
        )
    _check_scales(config, folder)
    odd = variants(config, FOLDED)
    if odd:
        raise AdapterError(
            f"{folder} is not a plain LoRA adapter ({', '.join(odd)}): {WHY.get(odd[0], 'its ΔW may not be scale·B·A')}. "
            f"{CONVERT if odd == ['init_lora_weights'] else 'Train it again without ' + ' and '.join(odd)}"
        )
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        raise AdapterError(
            f"{folder} has {PICKLED}, a pickle, which runs code when it is loaded, and no {WEIGHTS}. If you trust it, load it with "
            "PeftModel.from_pretrained and save it again with save_pretrained, which writes safetensors"
        )
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{folder / WEIGHTS} cannot be read ({error}). It is missing or damaged: save the adapter again"
        ) from error


def _check_scales(config: LoraConfig, folder: Path) -> None:
    try:
        ranks = [config.r, *config.rank_pattern.values()]
        alphas = [config.lora_alpha, *config.alpha_pattern.values()]
        sound = all(type(rank) is int and rank > 0 for rank in ranks) and all(math.isfinite(alpha) for alpha in alphas)
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
    except (AttributeError, TypeError, re.error):
        sound = False
    if not sound:
        raise AdapterError(
            f"{folder / CONFIG}: r, lora_alpha, rank_pattern or alpha_pattern is damaged, so that the scale of its layers is not "
            "known. Save the adapter again"
        )


def _rank_and_scale(config: LoraConfig, layer: str) -> tuple[int, float]:
    """The rank of a layer and the scale of its B·A, with patterns matched to its name as PEFT does when it loads the adapter.

    PEFT takes the first pattern that matches and sorts them when it saves: where two match, training may have taken the other.
    """
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
    return rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def read_provenance(folder: Path, kind: str) -> dict[str, Any]:
    """The provenance of an adapter that loramox wrote. Raises `AdapterError` when there is none, or it is of another kind."""
    try:
        provenance = as_now(json.loads((folder / PROVENANCE).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{folder} has no readable {PROVENANCE}, so it is no {kind} adapter of loramox, or what makes it did not finish. "
            f"{GIVE.get(kind, 'Give a folder that loramox wrote')}; an interrupted run goes on with --resume"
        ) from error
    if provenance.get("kind") != kind:
        finished = "It is finished: load it as it is. " if provenance.get("kind") == "forget" else ""
        raise AdapterError(
            f"{folder} is a {provenance.get('kind')} adapter, not a {kind} adapter. {finished}{GIVE.get(kind, 'Give another folder')}. "
            f"This one came from: {provenance.get('command')}"
        )
    missing = {"base", "command", "data", "momentum", "settings"} - provenance.keys()
    if missing:
        raise AdapterError(
            f"{folder / PROVENANCE} lacks {', '.join(sorted(missing))}: it is damaged, or of another version of loramox. "
            "Restore it, or train again"
        )
    return provenance


def as_now(provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance or run record that loramox 0.1 wrote, as this version writes it; a newer one as it is.

    0.1 called alpha `strength`, with −1 for methods that have none, and had one method `mox` with two objectives.
    """
    settings = provenance.get("settings") or {}
    if "strength" not in settings:
        return provenance
    strength, objective = settings["strength"], settings.get("objective")
    alpha = strength if strength > 0 else None
    method = settings.get("method", "mox")
    if method == "mox":
        method = "npo_mean" if objective == "npo" else "mox_static"
    now = provenance | {"settings": settings | {"alpha": alpha, "method": method}, "alpha": alpha}
    if provenance.get("kind") == "memorization":
        return now | {"kind": "trained"}
    if "strength" in provenance:  # a forget adapter's own
        now["alpha"] = provenance["strength"] if provenance["strength"] > 0 else None
    return now


def check_alone(provenance: dict[str, Any], folder: Path) -> None:
    """Raises `AdapterError` for an adapter that means nothing without the user's own, beside which it was trained."""
    if "tuned_adapter" in provenance and not provenance.get("combined"):
        raise AdapterError(
            f"{folder} was trained beside the adapter {provenance['tuned_adapter']['path']}, and does nothing useful without it. Give the folder "
            "combined-adapter of the run, which holds both"
        )


def check_out(out: Path, kind: str, overwrite: bool) -> None:
    """Nothing but a `kind` of loramox (forget, merged) is ever overwritten: no trained adapter, nor anyone's own files.

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
                "model that it was trained on, and on no other: train again on this one"
            )
