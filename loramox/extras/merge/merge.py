"""A forget adapter merged into 16- or 32-bit weights: W + scale·B·A, from safetensors to safetensors, piece by piece.

A tensor passes through memory a few rows at a time, so that a model of any size merges in the memory that Python takes, the
adapter, and some MB. No model is loaded and no GPU is used.
"""

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from loramox.adapter.card import MOX
from loramox.adapter.factors import read_factors
from loramox.adapter.folder import CARD, PROVENANCE, WEIGHTS
from loramox.adapter.loading import check_whole
from loramox.adapter.merged_card import merged_card
from loramox.adapter.provenance import check_alone, check_asked_base, check_base, check_out, read_provenance
from loramox.adapter.streaming.checkpoint import (
    INDEX,
    Target,
    base_to_merge,
    beside,
    fetch_to_ship,
    place,
    targets,
)
from loramox.adapter.streaming.shards import CODES, FLOATS, Shard
from loramox.adapter.streaming.weights import code_in, size, write_index, write_shards
from loramox.errors import RunError, SettingsError
from loramox.files import disk_may_fill, replacing, sha256_of, write_json
from loramox.model.algebra import scaled
from loramox.model.config import ModelConfig, identify, read_config, skeleton
from loramox.run import command, versions
from loramox.settings import check_choices, setting

KEPT = 0.9  # below this share of ΔW, a warning


@dataclass
class MergeConfig:
    """What is merged into what, and where it is written."""

    adapter: str = setting("Folder of the forget adapter.")
    out: str = setting("Folder to write the merged model to.")
    base: str | None = setting(
        "Folder or hub id of the 16- or 32-bit base model, if it has moved since training. Safetensors only.", None
    )
    scale: float = setting("Scale of the adapter: 1 is as shipped, 0.5 half of it. Not --alpha.", 1.0)
    dtype: str | None = setting(
        "Type of the merged weights. Default: each weight's own in the base.",
        None,
        choices=["float32", "bfloat16", "float16"],
    )
    overwrite: bool = setting("Replace the merged model that is in that folder.", False)
    revision: str | None = setting(
        "Branch, tag or commit, where --base is a copy of the base under another name on the hub.", None
    )
    quantize: str | None = setting(
        "Quantize the merged 16-bit weights: nf4 or int8. Refused where too little of ΔW outlives it.",
        None,
        choices=["nf4", "int8"],
    )
    force: bool = setting("Write the quantized model however little is left of ΔW.", False)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.force and not self.quantize:
            raise SettingsError("--force is for --quantize: without it nothing is refused")
        if self.quantize and self.dtype == "float32":
            raise SettingsError("--dtype float32 and --quantize contradict each other: 16-bit weights are quantized")
        if not math.isfinite(self.scale):
            raise SettingsError(f"--scale {self.scale} is not a finite number. 1 merges the adapter as shipped")
        if self.scale <= 0:
            what = "merges nothing: it is the base model" if self.scale == 0 else "brings the forget rows back"
            raise SettingsError(
                f"--scale {self.scale:g} {what}. Give a number above 0: 1 merges the adapter as shipped"
            )


class CheckedMerge(NamedTuple):
    base: ModelConfig
    config: PretrainedConfig
    outline: PreTrainedModel  # without weights
    folder: Path  # of the base's files
    shards: list[Shard]
    changed: dict[str, Target]
    code: str | None  # dtype of what is written, in the files' words; None: each weight's own
    made: dict[str, Any]  # the provenance, but for what is known after writing


def merge_into_floats(config: MergeConfig, progress: bool = True) -> dict[str, Any]:
    """Write the base with W + scale·B·A in place of each adapted weight W to `config.out`; return its provenance.

    The sum is taken in fp32 and rounded once, to `config.dtype` (by default to W's own). Files, tensors and their order are the
    base's. `survived` in the provenance says how much of ΔW outlived the rounding; below `KEPT` there is a warning. Of a merge
    that fails while it is written, as of a weight that overflows, nothing is left.
    """
    ready = check_merge(config)
    made, out = ready.made, Path(config.out)
    with writing(out, size(ready.shards, ready.code)) as partial:
        made["survived"] = write_shards(ready.shards, ready.changed, ready.code, partial, progress)
        write_index(ready.folder, ready.shards, ready.code, partial)
        write_beside(ready, partial)
        write_json(partial / "config.json", _config_json(ready))
    share = made["survived"]["overall"]
    if share < KEPT:
        warnings.warn(
            f"{out}: only {share:.0%} of ΔW survived the rounding to {', '.join(made['dtypes'])}, so less may be forgotten than with "
            "the adapter on. Give --dtype float32, or serve the adapter unmerged",
            stacklevel=2,
        )
    return made


def check_merge(given: MergeConfig) -> CheckedMerge:
    """The merge, checked: the output folder, the adapter, the base, and that each ΔW has its weight. Raises as the merge does."""
    adapter, out = Path(given.adapter), Path(given.out)
    source = read_provenance(adapter, "forget")
    check_alone(source, adapter)
    model = base_to_merge(source["base"], given.base, given.revision)
    trained_on = model.model == source["base"]["model"]
    if given.revision and (trained_on or Path(model.model).is_dir()):
        raise SettingsError(
            f"--revision {given.revision} is for a --base of another name on the hub. {model.model} is taken as it is"
            f"{', at the revision that was trained on' if trained_on else ''}: leave --revision out"
        )
    _check_apart(out, given.overwrite, {"adapter": adapter, "base": Path(model.model)})
    config = read_config(model, flag="--base")
    made_from = identify(model, config)
    check_base(source, made_from, adapter)
    factors = {name: scaled(each, given.scale) for name, each in read_factors(adapter)[0].items()}
    check_whole(adapter, skeleton(config, model))
    outline = skeleton(config, model)
    wanted = targets(factors, outline, adapter)
    folder, shards, made_from = fetch_to_ship(model, made_from)
    check_asked_base(source, made_from, adapter)  # of a model of the hub, weights are known only now
    changed = place(wanted, shards, outline.base_model_prefix, adapter)
    code = CODES[getattr(torch, given.dtype)] if given.dtype else "BF16" if given.quantize else None
    dtypes = sorted({code_in(e, code) for s in shards for e in s.entries if e.name in changed})
    made: dict[str, Any] = {
        "kind": "merged",
        "scale": given.scale,
        "dtypes": [str(FLOATS[each]).removeprefix("torch.") for each in dtypes],
        "adapter": {
            "path": str(adapter),
            "sha256": sha256_of(adapter / WEIGHTS),
            "alpha": source["alpha"],
            "method": source.get("method", MOX),
            "command": source["command"],
        },
        **{key: source[key] for key in ("momentum", "data", "settings", "generated", "requests") if key in source},
        "base": made_from,
        "command": command(),
        "versions": versions(),
    }
    return CheckedMerge(model, config, outline, folder, shards, changed, code, made)


def _check_apart(out: Path, overwrite: bool, sources: dict[str, Path]) -> None:
    """Nothing but a merged model of loramox is ever overwritten, and what it is made from is never touched."""
    here = out.resolve()
    for what, folder in sources.items():
        there = folder.resolve()
        if folder.exists() and (here == there or there in here.parents or here in there.parents):
            raise RunError(f"--out {out} is in the folder of the {what} or around it ({folder}). Choose another folder")
    if out.is_symlink() or out.is_file():
        raise RunError(f"--out {out} is a file or a link. Give a folder that does not exist yet")
    check_out(out, "merged", overwrite)


@contextmanager
def writing(out: Path, needed: int) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and of which nothing is left otherwise.

    Raises `RunError` when fewer than `needed` bytes are free, or when the disk fills up within the block.
    """
    needed += 64 << 20  # the tokenizer and headers beside
    advice = f"--out {out} needs {needed / 1e6:,.0f} MB in all. Free some, or choose another disk"
    with disk_may_fill(advice), replacing(out, folder=True) as partial:
        if (free := shutil.disk_usage(out.absolute().parent).free) < needed:
            raise RunError(
                f"--out {out}: {free / 1e6:,.0f} MB are free there, and the merged model needs {needed / 1e6:,.0f} MB. Free some, choose "
                "another disk, or merge into 16 bits (--dtype bfloat16)"
            )
        yield partial


def write_beside(ready: CheckedMerge, to: Path) -> None:
    """All but weights and config.json, which comes last: without it, what a kill leaves behind loads nowhere."""
    for path in beside(ready.folder):
        if path.name not in ("config.json", INDEX):
            shutil.copyfile(path, to / path.name)
    write_json(to / PROVENANCE, ready.made)
    (to / CARD).write_text(merged_card(ready.made), encoding="utf-8")


def _config_json(ready: CheckedMerge) -> dict[str, Any]:
    config = json.loads((ready.folder / "config.json").read_text(encoding="utf-8"))
    # Code that comes with a checkpoint is not taken along: transformers' own class loads this one.
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    dtypes = ready.made["dtypes"]
    if len(dtypes) == 1 or not (config.get("torch_dtype") or config.get("dtype")):
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtypes[0]
    return config
