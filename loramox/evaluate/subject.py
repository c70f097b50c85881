"""The adapter to evaluate and the retrained model to compare with: checked before any weights are loaded."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from transformers import PreTrainedModel

from loramox.adapter.folder import CONFIG, PROVENANCE, WEIGHTS
from loramox.adapter.loading import check_whole
from loramox.adapter.provenance import check_alone, check_asked_base, read_any
from loramox.data.row import Row, fingerprint
from loramox.errors import AdapterError, RowsError, SettingsError
from loramox.evaluate.ability import RETAIN_TEST
from loramox.model.config import ModelConfig, identify, read_config, read_tokenizer
from loramox.settings import refuse, setting


@dataclass
class Subject:
    """The adapter to evaluate, and where to write."""

    out: str = setting("Folder to write records.jsonl and summary.json to.")
    adapter: str | None = setting("Adapter folder to put on the model. Default: none, the model as it is.", None)
    scale: float = setting("Scale of the adapter: 1 is as shipped, 0.5 half of it, 0 off. Not --alpha.", 1.0)
    overwrite: bool = setting("Replace the evaluation in --out.", False)

    def __post_init__(self) -> None:
        refuse("scale", self.scale, self.scale >= 0, "a number of 0 or more, 1 being as shipped")
        if self.scale != 1 and self.adapter is None:
            raise SettingsError(f"scale is {self.scale:g}, but there is no adapter: --scale needs --adapter")


def check_adapter(adapter: Path, base: dict[str, Any], outline: PreTrainedModel) -> dict[str, Any] | None:
    """The adapter's provenance, if it is one of loramox. Raises `AdapterError` when it is none, would not load whole in PEFT, or
    was made for another base; `outline` is the base without weights.
    """
    for name in (WEIGHTS, CONFIG):
        if not (adapter / name).exists():
            raise AdapterError(
                f"--adapter {adapter} is no adapter: it has no {name}. Give the folder forget-adapter of a run"
            )
    provenance = read_any(adapter) if (adapter / PROVENANCE).exists() else None
    if provenance:
        check_asked_base(provenance, base, adapter)
        check_alone(provenance, adapter)
    check_whole(adapter, outline)
    if provenance is None:
        return None
    # Methods without an alpha train the forget model itself.
    if provenance.get("kind") == "trained" and provenance.get("alpha") is not None:
        warnings.warn(
            f"{adapter} is the trained adapter, θ_ref + ΔW, with which the model forgets nothing. It is not what ships: the forget adapter, "
            "θ_ref − alpha·ΔW, is in the folder forget-adapter of the run, or made by loramox extrapolate",
            stacklevel=2,
        )
    return {key: provenance.get(key) for key in ("kind", "alpha", "scale", "rank", "command", "data", "requests")}


def model_that_knows(adapter: Path, base: dict[str, Any]) -> dict[str, Any] | None:
    """The base, which knows the forget rows; None for a combined adapter, where the user's own adapter in it knows them."""
    provenance = read_any(adapter) if (adapter / PROVENANCE).exists() else {}
    return None if provenance.get("combined") else base


def check_scales(adapter: Path, needed_by: str) -> None:
    """Raises `AdapterError` unless a scale multiplies everything that the adapter changes, as it does for plain LoRA alone."""
    config = LoraConfig.from_pretrained(str(adapter))
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        kept = [name for name in file.keys() if ".lora_A." not in name and ".lora_B." not in name]  # noqa: SIM118 (a file, not a dict)
    if kept or config.use_dora:
        what = "use_dora" if config.use_dora else f"it also has {kept[0]}"
        raise AdapterError(
            f"{needed_by}: --adapter {adapter} is no plain LoRA adapter ({what}), and a scale would change only a part of it. It can be evaluated "
            "as it is, without --scale"
        )


def check_sides(made_by: dict[str, Any] | None, rows: dict[str, Sequence[Row]], adapter: str | None) -> None:
    """Raises `RowsError` when the adapter's own forget rows are given as retain rows, or its retain rows as other ones."""
    if made_by is None or made_by.get("requests"):  # a ledger's, whose data are named after its requests
        return
    learned = made_by.get("data") or {}
    for part, other in (("forget", "retain"), ("retain", "forget"), (RETAIN_TEST, "retain")):
        its = (learned.get(other) or {}).get("sha256")
        if part in rows and its is not None and fingerprint(rows[part]) == its:
            meant = "It takes others" if part == RETAIN_TEST else "Are --forget and --retain swapped?"
            raise RowsError(f"--{part} is the very rows that were the {other} rows when {adapter} was trained. {meant}")


def weights_of(identity: dict[str, Any]) -> Any:
    """What tells a model's weights from others, of what `identify` gives: on the hub, whose files are not sampled, its commit."""
    return identity.get("weights") or (identity.get("model"), identity.get("revision"))


def check_retrained_model(
    given: str, model: ModelConfig, base: dict[str, Any], knows: dict[str, Any] | None
) -> tuple[ModelConfig, dict[str, str | None]]:
    """How to load a model trained without the forget rows, and what identifies it.

    Raises `SettingsError` if it is the one that `knows` the rows, or has another tokenizer than `model` or another shape than
    its identity `base`.
    """
    retrained = replace(model, model=given, revision=None)
    identity = identify(retrained, read_config(retrained, weights=True))
    if knows and weights_of(identity) == weights_of(knows):
        raise SettingsError(
            f"--retrained_model {given} is the model that knows the forget rows. Give one that was trained without them"
        )
    if read_tokenizer(retrained).get_vocab() != read_tokenizer(model).get_vocab():
        raise SettingsError(
            f"--retrained_model {given} has another tokenizer than --model, so that their answers are not comparable. Give the "
            "same model, trained without the forget rows"
        )
    if identity["shape"] != base["shape"]:
        raise SettingsError(
            f"--retrained_model {given} has another shape ({identity['shape']}) than --model ({base['shape']}). Give the same "
            "model, trained without the forget rows"
        )
    return retrained, identity
