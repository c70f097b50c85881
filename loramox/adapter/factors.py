"""Read ΔW from an untrusted adapter folder: everything is checked before it is used, and nothing is run."""

import re
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from loramox.adapter.folder import CONFIG, PROVENANCE, WEIGHTS
from loramox.adapter.layers import Layers
from loramox.adapter.streaming.shards import FLOATS, Entry
from loramox.adapter.untrusted import Refused, read_header, read_object
from loramox.errors import AdapterError
from loramox.files import sha256_of
from loramox.model.algebra import Factors
from loramox.model.lora import variants

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

PICKLED = "adapter_model.bin"
KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")


def read_factors(folder: Path) -> tuple[dict[str, Factors], LoraConfig]:
    """ΔW of every layer of a plain LoRA adapter, in fp32 with the scale folded into B, by the layer's name; and its config.

    The scale is lora_alpha/r, or lora_alpha/√r for rsLoRA. Both may differ from layer to layer (rank_pattern, alpha_pattern).

    Raises `AdapterError` for a missing or damaged folder, weights that are not those that its provenance was written for, or a
    variant whose ΔW is not scale·B·A (DoRA, biases, …).
    """
    named = read_layers(folder)
    read_stored(folder)  # it is whole, and all of floats
    layers = _by_layer(load_file(folder / WEIGHTS), folder)
    named.check_named(layers)
    factors = {}
    for name, parts in sorted(layers.items()):
        if len(parts) < 2:
            raise AdapterError(
                f"{folder / WEIGHTS} lacks a half of {name}: every lora_A needs its lora_B. The file is damaged: save it again"
            )
        rank, alpha = named.rank_and_alpha(name)
        A, B = parts["A"], parts["B"]
        if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == rank:
            raise AdapterError(
                f"{folder / WEIGHTS}: A {list(A.shape)} and B {list(B.shape)} of {name} are no factors of rank {rank}, which "
                f"{CONFIG} gives it. The two files do not belong together: save the adapter again"
            )
        factors[name] = Factors(A, B * (alpha / (rank**0.5 if named.config.use_rslora else rank)))
    return factors, named.config


def _by_layer(tensors: dict[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """A and B of each layer, in fp32."""
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
    return layers


def read_layers(folder: Path, also: tuple[str, ...] = ()) -> Layers:
    """The layers that the config of a LoRA adapter names, if all its settings are known to leave ΔW what B·A says, or are
    among those in `also`.

    Raises `AdapterError` for any other, naming the settings.
    """
    settings = _settings(folder)
    try:
        config = LoraConfig.from_peft_type(**settings)
    except Exception as error:  # whatever comes of values of wrong types
        raise AdapterError(
            f"{folder} is no LoRA adapter that can be read: PEFT refuses its {CONFIG} ({error!r}). Save the adapter again"
        ) from error
    # PEFT leaves out what it does not know, and warns.
    newer = [name for name, value in settings.items() if value and not hasattr(config, name)]
    if newer:
        raise AdapterError(
            f"{folder} has settings that this version of PEFT does not know ({', '.join(newer)}), so that its ΔW is not known either. "
            "Update peft"
        )
    if odd := variants(config, (*FOLDED, *also)):
        raise AdapterError(
            f"{folder} is not a plain LoRA adapter ({', '.join(odd)}): {WHY.get(odd[0], 'its ΔW may not be scale·B·A')}. "
            f"{CONVERT if odd == ['init_lora_weights'] else 'Merge it with PEFT itself (merge_and_unload), or train it again without ' + ' and '.join(odd)}"
        )
    return Layers(config, folder)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = read_object(folder / CONFIG)
    except (Refused, OSError) as error:
        raise AdapterError(
            f"{folder} is no LoRA adapter that can be read ({error}). Expected {CONFIG} and {WEIGHTS}, as PEFT writes them"
        ) from error
    kind = settings.get("peft_type")
    if kind is None:
        raise AdapterError(f"{folder} is no LoRA adapter that can be read: its {CONFIG} names no peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{folder} is a {kind} adapter (peft_type), not a LoRA adapter. Only LoRA's change is a product B·A that can be scaled "
            "and negated: train it again with LoraConfig"
        )
    return {name: value for name, value in settings.items() if name != "runtime_config"}


def read_stored(folder: Path) -> dict[str, Entry]:
    """An adapter's tensors by name, without their values, from a file that is whole and is the one that its provenance is of.

    Raises `AdapterError` for anything else, a pickle among them.
    """
    if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        raise AdapterError(
            f"{folder} has {PICKLED}, a pickle, which runs code when it is loaded, and no {WEIGHTS}. If you trust it, load it with "
            "PeftModel.from_pretrained and save it again with save_pretrained, which writes safetensors"
        )
    try:
        stored = read_header(folder / WEIGHTS)
    except (Refused, OSError) as error:
        raise AdapterError(
            f"{folder / WEIGHTS} cannot be read ({error}). It is missing or damaged: save the adapter again"
        ) from error
    if odd := next((key for key, tensor in stored.items() if tensor.dtype not in FLOATS), None):
        raise AdapterError(
            f"{folder / WEIGHTS}: {odd} is of type {stored[odd].dtype}, and adapters are of floats. Save the adapter again"
        )
    _check_digest(folder)
    return stored


def _check_digest(folder: Path) -> None:
    """Raises `AdapterError` when the weights are not those that provenance.json, if there is one, was written for."""
    if not (folder / PROVENANCE).exists():
        return
    digest = read_object(folder / PROVENANCE).get("sha256")
    if digest is not None and digest != sha256_of(folder / WEIGHTS):
        raise AdapterError(
            f"{folder / WEIGHTS} is not the file that {PROVENANCE} was written for: it was changed or damaged afterwards. Get the adapter "
            "again from where it was made, or make it again: loramox extrapolate"
        )
