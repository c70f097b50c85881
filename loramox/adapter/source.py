"""The source of a forget adapter: a run's trained adapter, a checkpoint of a run, or an adapter written by PEFT."""

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramox.adapter.factors import FOLDED, read_factors, read_layers
from loramox.adapter.folder import CHECKSUMS, CONFIG, MOMENTUM, PROVENANCE, WEIGHTS
from loramox.adapter.provenance import check_base, read_provenance
from loramox.errors import AdapterError, SettingsError
from loramox.files import read_json, sha256_of
from loramox.model.algebra import Factors
from loramox.model.config import identify, read_config, skeleton
from loramox.model.lora import ReferenceConfig
from loramox.run import RECORD, read_record

Source = tuple[dict[str, Any], dict[str, Factors], LoraConfig]  # provenance, ΔW, and the config of the adapter


def read_source(folder: Path, alpha: float | None, base: str | None) -> Source:
    """What a forget adapter is made of, from any folder; the provenance names the base as served. Raises as `extrapolate`."""
    if written_by_peft(folder):
        return read_peft(folder, alpha, base)
    if (folder / MOMENTUM).is_file():
        source, delta, config = _read_checkpoint(folder)
    else:
        source = read_provenance(folder, "trained")
        delta, config = read_factors(folder / "momentum")
    return source | {"base": served_base(source, base, folder)}, delta, config


def _read_checkpoint(folder: Path) -> Source:
    """A checkpoint; its ΔW is the momentum average so far or, before its first update, that of the adapter itself.

    Raises `AdapterError` when it is damaged, or its run is not known.
    """
    checksums = folder / CHECKSUMS
    digest = read_json(checksums, dict).get(MOMENTUM) if checksums.exists() else None
    if digest not in (None, sha256_of(folder / MOMENTUM)):
        raise AdapterError(
            f"{folder / MOMENTUM} is damaged: its checksum is not that in {CHECKSUMS}. Take another checkpoint"
        )
    trained, run = folder.parent, folder.parent.parent
    if (trained / PROVENANCE).exists():
        source = read_provenance(trained, "trained")
    elif (run / RECORD).exists():  # it has not finished
        source = read_record(run)
    else:
        raise AdapterError(
            f"{folder} is a checkpoint, and neither {trained / PROVENANCE} nor {run / RECORD} is there to say of which run. Leave it in the "
            "folder of its run"
        )
    try:
        tensors = load_file(folder / MOMENTUM)
        names = sorted({key.rpartition(".")[0] for key in tensors})
        delta = {name: Factors(tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
    except Exception as error:  # safetensors raises errors of many types for damaged files
        raise AdapterError(f"{folder / MOMENTUM} is damaged ({error!r}). Take another checkpoint") from error
    of_checkpoint = {"checkpoint": folder.name, "momentum": {"eta": source["settings"]["momentum"]}}
    return source | of_checkpoint, delta or read_factors(folder)[0], read_layers(folder).config


def tuned_source(folder: Path, config: LoraConfig) -> dict[str, Any]:
    """What the provenance says of `--tuned_adapter`: where it is, and what tells whether it is still the same."""
    return {"path": str(folder.absolute())} | _peft_source(folder, config)


def tuned_factors(source: dict[str, Any]) -> dict[str, Factors]:
    """ΔW of the tuned adapter that a run was trained with, from the provenance of the run.

    Raises `AdapterError` when it is no longer where it was, or no longer the same.
    """
    folder = Path(source["tuned_adapter"]["path"])
    factors, config = read_factors(folder)
    if json.loads(json.dumps(tuned_source(folder, config))) != source["tuned_adapter"]:
        raise AdapterError(f"{folder} has changed since the run that was trained with it (--tuned_adapter). Restore it")
    return factors


def _peft_source(folder: Path, config: LoraConfig) -> dict[str, Any]:
    """The digest and the scales of an adapter that PEFT wrote."""
    return {"sha256": sha256_of(folder / WEIGHTS)} | {n: getattr(config, n) for n in ("r", "lora_alpha", *FOLDED)}


def written_by_peft(folder: Path) -> bool:
    """Whether the folder is an adapter without loramox's provenance, and no part of an unfinished run of loramox."""
    return (folder / CONFIG).exists() and not (folder / PROVENANCE).exists() and not any(folder.glob("momentum*"))


def read_peft(folder: Path, alpha: float | None, base: str | None) -> Source:
    """A plain LoRA adapter that PEFT wrote: its provenance as far as it is known, ΔW, its config. Raises as `extrapolate`."""
    if alpha is None:
        raise SettingsError(
            f"--alpha is missing: {folder} is an adapter that PEFT wrote, which does not say how far to negate it. With --alpha 1 the "
            "model goes as far from its base as the adapter goes, the other way"
        )
    delta, config = read_factors(folder)
    source = {
        "method": "negated PEFT adapter",
        "alpha": alpha,
        "base": _base_of(folder, delta, config, base),
        "momentum": None,
        "data": {},
        "settings": {"r": max(factors.rank for factors in delta.values())},
        "command": None,
        "negated": {"adapter": str(folder)} | _peft_source(folder, config),
    }
    return source, delta, config


def _base_of(folder: Path, delta: dict[str, Factors], config: LoraConfig, given: str | None) -> dict[str, Any]:
    """The base model of an adapter that PEFT wrote, after comparing the adapter's layers with the model's."""
    named = config.base_model_name_or_path
    name = given or named
    if not name:
        raise AdapterError(f"{folder} does not name its base model. Give the model's folder or hub id with --base")
    reference = ReferenceConfig(model=name, revision=config.revision if name == named else None)
    flag = "--base" if given else f"{folder} names its base model (give another with --base):"
    model_config = read_config(reference, flag=flag)
    check_layers(delta, skeleton(model_config, reference), folder, name)
    return identify(reference, model_config)


def check_layers(
    delta: dict[str, Factors], model: PreTrainedModel, folder: Path, base: str, flag: str = "--base"
) -> None:
    """Raises `AdapterError` unless every ΔW is of a linear layer of the base model, below its output head, and of its size.

    Args:
        model: the base model, whose weights may be on torch's meta device.
        flag: the one that names the base.
    """
    layers, head = dict(model.named_modules()), model.get_output_embeddings()
    for name, (A, B) in delta.items():
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear | Conv1D):
            raise AdapterError(
                f"{folder} changes {name}, and {base} has no such linear layer. Give the base that the adapter was trained on with {flag}"
            )
        if layer is head:
            raise AdapterError(
                f"{folder} changes the output head {name}, which servers do not load. Train it again without {name} in target_modules"
            )
        shape = tuple(layer.weight.shape) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)[::-1]
        if (B.shape[0], A.shape[1]) != shape:
            raise AdapterError(
                f"{folder} changes {name} by a ΔW of {B.shape[0]} × {A.shape[1]}, and {base} has {shape[0]} × {shape[1]} there. Give the "
                f"base that the adapter was trained on with {flag}"
            )


def served_base(source: dict[str, Any], name: str | None, trained: Path) -> dict[str, Any]:
    """The base model as the adapter will name it. Under another name it must be the same model."""
    if name is None:
        return source["base"]
    reference = ReferenceConfig(model=name)
    base = identify(reference, read_config(reference, flag="--base"))
    check_base(source, base, trained)
    return base
