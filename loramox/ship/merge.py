"""A forget adapter merged into 16- or 32-bit weights: W + strength·B·A, from safetensors to safetensors, piece by piece.

A tensor passes through memory a few rows at a time, so that a model of any size merges in the memory that Python takes, the
adapter, and some MB. No model is loaded and no GPU is used.
"""

import hashlib
import json
import math
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loramox.adapter import CARD, PROVENANCE, WEIGHTS, check_base, read_factors, read_provenance
from loramox.algebra import Factors, scaled
from loramox.card import merged_card
from loramox.errors import AdapterError, RunError, SettingsError
from loramox.files import replacing, write_json
from loramox.model import ModelConfig, identify, skeleton
from loramox.run import command, versions
from loramox.settings import check_choices
from loramox.ship.checkpoint import BESIDE, INDEX, SINGLE, base_config, fetch, place, read_shards, targets
from loramox.ship.shards import CODES, FLOATS, Shard
from loramox.ship.weights import code_in, size, write_shards

KEPT = 0.9  # below this share of ΔW, a warning


@dataclass
class MergeConfig:
    """What is merged into what, and where it is written."""

    adapter: str = field(metadata={"help": "Folder of the forget adapter."})
    out: str = field(metadata={"help": "Folder to write the merged model to."})
    base: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub id of the 16- or 32-bit base model, when it is not where it was in training. Safetensors only."
        },
    )
    strength: float = field(
        default=1.0, metadata={"help": "How much of the adapter: 1 is as shipped, 0.5 half of it. Not the strength α."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the merged weights. Default: each weight's own in the base.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the merged model that is in that folder."})

    def __post_init__(self) -> None:
        check_choices(self)
        if not math.isfinite(self.strength):
            raise SettingsError(f"--strength {self.strength} is not a finite number. 1 merges the adapter as shipped")
        if self.strength <= 0:
            what = "merges nothing: it is the base model" if self.strength == 0 else "brings the forget rows back"
            raise SettingsError(
                f"--strength {self.strength:g} {what}. Give a number above 0: 1 merges the adapter as shipped"
            )


def merge(
    adapter: str | Path,
    out: str | Path,
    base: str | None = None,
    strength: float = 1.0,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the base with W + strength·B·A in place of each adapted weight W to the folder `out`; return its provenance.

    The sum is taken in fp32 and rounded once, to `dtype` (by default to W's own). Files, tensors and their order are the
    base's. `survived` in the provenance says how much of ΔW outlived the rounding; below 0.9 there is a warning.

    Raises, before anything is written: `SettingsError` for a strength that is not finite and above 0; `AdapterError` for
    another base, an adapter that is no plain forget adapter of loramox, and a layer that does not fit the weights;
    `ModelError` for a base that is quantized or has no safetensors; `RunError` when `out` is taken or the disk too small.
    While writing: `ModelError` for a weight that overflows in `dtype`, and then nothing is left of the output.
    """
    MergeConfig(str(adapter), str(out), base, strength, dtype, overwrite)  # refuses wrong values
    adapter, out = Path(adapter), Path(out)
    source = _forget_provenance(adapter)
    # A base of that name is taken at the revision that it was memorized on.
    named = base is None or base == source["base"]["model"]
    model = ModelConfig(base or source["base"]["model"], source["base"]["revision"] if named else None, "none")
    _check_out(out, overwrite, [("adapter", adapter), ("base", Path(model.model))])
    config = base_config(model)
    made_from = identify(model, config)
    check_base(source, made_from, adapter)
    outline = skeleton(config, model)
    wanted = targets(_factors(adapter, strength), outline, adapter)
    folder = fetch(model)
    made_from = _as_fetched(made_from, folder)
    check_base(source, made_from, adapter)
    shards = read_shards(folder)
    changed = place(wanted, shards, outline.base_model_prefix, adapter)
    code = CODES[getattr(torch, dtype)] if dtype else None
    dtypes = sorted({code_in(e, code) for s in shards for e in s.entries if e.name in changed})
    made: dict[str, Any] = {
        "kind": "merged",
        "strength": strength,
        "dtypes": [str(FLOATS[each]).removeprefix("torch.") for each in dtypes],
        "adapter": _fingerprint(adapter, source),
        **{key: source[key] for key in ("momentum", "data", "settings")},
        "base": made_from,
        "command": command(),
        "versions": versions(),
    }
    with replacing(out) as partial:
        _check_disk(out, shards, code)
        partial.mkdir()
        made["survived"] = write_shards(shards, changed, code, partial, progress)
        _write_rest(folder, partial, shards, code, made)
    _warn_of_little(made, out)
    return made


def _warn_of_little(made: dict[str, Any], out: Path) -> None:
    share = made["survived"]["overall"]
    if share < KEPT:
        warnings.warn(
            f"{out}: only {share:.0%} of ΔW survived the rounding to {', '.join(made['dtypes'])}, so less may be forgotten than with "
            "the adapter on. Give --dtype float32, or serve the adapter unmerged",
            stacklevel=3,
        )


def _forget_provenance(adapter: Path) -> dict[str, Any]:
    if not (adapter / PROVENANCE).exists():
        raise AdapterError(
            f"{adapter} has no {PROVENANCE}, so it is no forget adapter of loramox, and the base that it was made for is not known. "
            "Give the folder forget-adapter of a run"
        )
    return read_provenance(adapter, "forget")


def _factors(adapter: Path, strength: float) -> dict[str, Factors]:
    """strength·ΔW of every layer. Raises `AdapterError` for tensors that are no plain LoRA's, do not fit, or are not finite."""
    factors, _ = read_factors(adapter)
    known = {f"base_model.model.{name}.lora_{part}.weight" for name in factors for part in "AB"}
    with safe_open(adapter / WEIGHTS, "pt") as file:
        odd = sorted(set(file.keys()) - known)
    if odd:
        raise AdapterError(
            f"{adapter} is not a plain LoRA adapter: {odd[0]} is more than the A and B of a linear layer"
        )
    for name, (A, B) in factors.items():
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"{adapter}: A {list(A.shape)} and B {list(B.shape)} of {name} do not make a product B·A"
            )
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise AdapterError(
                f"{adapter}: {name} has values that are not finite. The adapter is damaged; ship it again"
            )
    return {name: scaled(each, strength) for name, each in factors.items()}


def _as_fetched(base: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `identify` says of the base. Of one of the hub, its commit and its weights can be told once it is here."""
    if folder == Path(base["model"]):
        return base
    here = ModelConfig(str(folder), quantization="none")
    return base | {"revision": folder.name, "weights": identify(here, base_config(here))["weights"]}


def _fingerprint(adapter: Path, source: dict[str, Any]) -> dict[str, Any]:
    with (adapter / WEIGHTS).open("rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 20):
            digest.update(part)
    return {
        "path": str(adapter),
        "sha256": digest.hexdigest(),
        "strength": source["strength"],
        "command": source["command"],
    }


def _check_out(out: Path, overwrite: bool, sources: list[tuple[str, Path]]) -> None:
    """Nothing but a merged model of loramox is ever overwritten, and what it is made from is never touched."""
    here = out.resolve()
    for what, folder in sources:
        there = folder.resolve()
        if folder.exists() and (here == there or there in here.parents or here in there.parents):
            raise RunError(f"--out {out} is in the folder of the {what} or around it ({folder}). Choose another folder")
    if out.is_symlink() or out.is_file():
        raise RunError(f"--out {out} is a file or a link. Give a folder that does not exist yet")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        read_provenance(out, "merged")
    except AdapterError as error:
        raise RunError(f"--out {out} holds other files. Choose another folder") from error
    if not overwrite:
        raise RunError(
            f"--out {out} holds a merged model already. Replace it with --overwrite, or choose another folder"
        )


def _check_disk(out: Path, shards: list[Shard], code: str | None) -> None:
    needed = size(shards, code) + (64 << 20)  # the tokenizer and headers beside
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise RunError(
            f"--out {out}: {free / 1e6:,.0f} MB are free there, and the merged model needs {needed / 1e6:,.0f} MB. Free some, choose "
            "another disk, or merge into 16 bits (--dtype bfloat16)"
        )


def _write_rest(folder: Path, partial: Path, shards: list[Shard], code: str | None, made: dict[str, Any]) -> None:
    """All but the weights. config.json comes last: without it, what a kill leaves behind loads nowhere."""
    for pattern in BESIDE:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, partial / path.name)
    if shards[0].path.name != SINGLE:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = (index.get("metadata") or {}) | {"total_size": size(shards, code)}
        write_json(partial / INDEX, index)
    write_json(partial / PROVENANCE, made)
    (partial / CARD).write_text(merged_card(made), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Code that comes with a checkpoint is not taken along: transformers' own class loads this one.
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    if len(made["dtypes"]) == 1 or not (config.get("torch_dtype") or config.get("dtype")):
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = made["dtypes"][0]
    write_json(partial / "config.json", config)
