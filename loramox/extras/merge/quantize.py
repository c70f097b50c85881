"""Merge a forget adapter into 16-bit weights, and quantize them; written only if ΔW survives.

Merging into weights that are 4-bit already is not done: they lie on the points of a coarse scale, where a ΔW smaller than
half a step moves nothing. Quantized after the merge, W + ΔW is rounded once, and what is left of ΔW is measured.
"""

import gc
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramox.adapter.merged_card import NOT_LOWERED
from loramox.adapter.streaming.shards import FLOATS, read_rows
from loramox.adapter.streaming.weights import shares_of, size, sums_of, write_index, write_shards
from loramox.errors import RunError
from loramox.extras.merge.merge import CheckedMerge, MergeConfig, write_beside, writing
from loramox.files import remove, write_json
from loramox.model.load import keep_4bit_weights_in_place, quantization

# Half: below it, more of what tells the quantized merged weights from the quantized base is rounding than ΔW. On random
# weights the rounding then moves the logits as much as ΔW does (recipes/bench/results/merge.md).
LEAST_OF_DELTA = 0.5
# Likewise, the smallest share of the forgetting that may be left, where it was measured.
LEAST_OF_FORGETTING = 0.9

SHARD = "5GB"
BYTES = {"nf4": 0.53, "int8": 1.01}  # a weight, scales among them, rounded up

# Given the folder of the merged 16-bit weights: {"share": of the forgetting, …}. It loads what it asks, one model at a time.
Measure = Callable[[Path], dict[str, Any]]


def merge_quantized(
    given: MergeConfig, ready: CheckedMerge, device: torch.device, measure: Measure | None = None, progress: bool = True
) -> dict[str, Any]:
    """Write the merge that `check_merge(given)` returned, quantized as `given.quantize` says; return its provenance.

    In it `merged` is what outlived the rounding to 16 bits, `survived` what outlived the quantization (`survival`), and
    `forgetting` what `measure` returns. Where too little is left, nothing is written, unless `given.force`.
    """
    made = ready.made
    made["quantization"] = given.quantize
    with writing(Path(given.out), size(ready.shards, ready.code) + _quantized_size(ready, given.quantize)) as partial:
        staging = partial / "16-bit"  # without a config.json it loads nowhere by itself
        staging.mkdir()
        made["merged"] = write_shards(ready.shards, ready.changed, ready.code, staging, progress)
        write_index(ready.folder, ready.shards, ready.code, staging)
        model = load_merged(ready, staging, device, given.quantize)
        made["survived"] = survival(model, ready)
        _save_weights(model, partial)
        config = json.loads(model.config.to_json_string())
        del model
        gc.collect()  # modules refer to each other
        if measure:
            made["forgetting"] = measure(staging)
        _refuse_little(given, made)
        remove(staging)
        write_beside(ready, partial)
        write_json(partial / "config.json", {key: value for key, value in config.items() if key != "auto_map"})
    return made


def _quantized_size(ready: CheckedMerge, kind: str) -> int:
    """Bytes of the model quantized: its linear layers in few bits, all else as it is."""
    head = ready.outline.get_output_embeddings()
    layers = [m for m in ready.outline.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    few = sum(m.weight.numel() for m in layers)
    return size(ready.shards, ready.code) - int(few * (FLOATS[ready.code].itemsize - BYTES[kind]))


def load_merged(ready: CheckedMerge, folder: Path, device: torch.device, kind: str | None = None) -> PreTrainedModel:
    """The weights in `folder`, which has nothing else; quantized while they are loaded, NF4 with double quantization or int8."""
    dtype = FLOATS[ready.code]
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=ready.config,
        generation_config=GenerationConfig(),
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization(kind, dtype),
        use_safetensors=True,
    )
    keep_4bit_weights_in_place(model)
    return model


@torch.no_grad()
def survival(model: PreTrainedModel, ready: CheckedMerge) -> dict[str, Any]:
    """How much of ΔW is in the quantized model: {"overall", "share", "rounding", "layers": {layer: the same three}}.

    With Q(W) what W becomes when it is quantized and back, and D = Q(W + ΔW) − Q(W), of all layers together and of each:

    overall   ⟨D, ΔW⟩² / (‖D‖²·‖ΔW‖²)     how much of what the weights changed by is ΔW; the rest is rounding. 0 … 1
    share     ⟨D, ΔW⟩ / ‖ΔW‖²             how much of ΔW arrives on average
    rounding  ‖D − ΔW‖ / ‖ΔW‖             the noise that arrives with it

    The share alone would not tell. Where W lies on Q's grid, small changes are rounded away and it is near 0. But weights
    of 16 bits lie between the grid's points: few of them move, each by a whole step, and ⟨D, ΔW⟩ is right on average
    however small ΔW is, while the rounding grows as √(step/‖ΔW‖). `overall` is small in both cases. It errs on the safe side:
    ΔW is of low rank and rounding is not, so forgetting may outlive more of it; other methods' did not outlive 4 bits
    (arXiv 2410.16454). Whether it does is asked of rows, not of weights.

    Compared with Q(W) and not with W, so that what the base itself loses by quantizing is not taken for a loss of ΔW.
    """
    layers: dict[str, Tensor] = {}
    for shard in ready.shards:
        with shard.path.open("rb") as file:
            for entry in shard.entries:
                if entry.name not in ready.changed:
                    continue
                target = ready.changed[entry.name]
                old = torch.cat([rows.to(FLOATS[ready.code]) for rows in read_rows(file, entry, entry.shape[1])])
                quantized = model.get_submodule(target.layer).weight
                before = dequantized(quantized_like(quantized, old.T.contiguous() if target.transposed else old))
                layers[target.layer] = sums_of(
                    dequantized(quantized) - before, target.factors.delta().to(before.device)
                )
    total = torch.stack(list(layers.values())).sum(0)
    return _told(total) | {"layers": {name: _told(sums) for name, sums in layers.items()}}


def quantized_like(example: nn.Parameter, weight: Tensor) -> nn.Parameter:
    """`weight` [out, in] quantized in the way of another layer's; as it is where that one is not quantized."""
    if isinstance(example, bnb.nn.Params4bit):
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        how = {name: getattr(example, name) for name in names}
        return bnb.nn.Params4bit(weight, requires_grad=False, **how).to(example.device)
    if isinstance(example, bnb.nn.Int8Params):
        return bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(example.device)
    return nn.Parameter(weight.to(example.device), requires_grad=False)


def dequantized(weight: nn.Parameter) -> Tensor:
    """What a quantized weight stands for, [out, in] in fp32."""
    if isinstance(weight, bnb.nn.Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state).float()
    if isinstance(weight, bnb.nn.Int8Params):
        return int8_vectorwise_dequant(weight.data, weight.SCB).float()
    return weight.float()


def _told(sums: Tensor) -> dict[str, float]:
    along, norm, _, changed = sums.tolist()
    overall = along**2 / (norm * changed) if along > 0 else float(norm == 0)
    return {"overall": overall, **shares_of(sums)}


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    """The weights, which are whole before anything beside them could make them load."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, max_shard_size=SHARD)
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)  # safetensors lets no one but the owner read it
    for name in ("config.json", "generation_config.json"):  # the first comes last, the other is the base's
        remove(folder / name)


def _refuse_little(given: MergeConfig, made: dict[str, Any]) -> None:
    """Raises `RunError` where too little outlived the quantization; warns if forced."""
    if (forgetting := made.get("forgetting")) and forgetting["share"] is None:
        warnings.warn(f"{given.adapter}: {NOT_LOWERED}. Here the weights decide", stacklevel=3)
    said = little(made)
    if said and not given.force:
        raise RunError(
            f"--quantize {given.quantize}: {said}. Nothing was written. Serve the adapter unmerged on the quantized base, or merge "
            "into 16 bits (without --quantize); or write it all the same with --force"
        )
    if said:
        warnings.warn(f"{given.out}: {said}. It was written because of --force", stacklevel=3)


def little(made: dict[str, Any]) -> str | None:
    """What is too little in a quantized model's provenance, in words; None if nothing is."""
    share = (made.get("forgetting") or {}).get("share")
    if share is not None:
        return (
            f"only {share:.0%} of the forgetting is left of what the adapter does in 16 bits ({LEAST_OF_FORGETTING:.0%} are asked)"
            if share < LEAST_OF_FORGETTING
            else None
        )
    survived = made["survived"]
    if survived["overall"] >= LEAST_OF_DELTA:
        return None
    remedy = "" if "forgetting" in made else "; whether it is, --forget and --retain measure"
    return (
        f"only {survived['overall']:.0%} of what the quantized weights changed by is ΔW, and the rest is rounding "
        f"({LEAST_OF_DELTA:.0%} are asked): {survived['share']:.0%} of ΔW is there on average, under a noise {survived['rounding']:.1f} "
        f"times as large. What was forgotten may be back{remedy}"
    )
