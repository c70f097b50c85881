"""ΔW → the adapter that ships: scaled, truncated to a rank that servers take, cast, written as a PEFT folder.

    θ_for = θ_ref − alpha·ΔW        methods that memorize (MOX, arXiv 2602.06441): alpha > 0 is free after training
    θ_for = θ_ref + ΔW              methods that train the forget model itself; at a scale, θ_ref + scale·ΔW

With ΔW = B·A the first is the reference plus the adapter (−alpha·B)·A: no weight of the model is touched, nothing is trained.
This is the only place where a sign is changed.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramox.adapter.card import combined_card, forget_card
from loramox.adapter.factors import FOLDED, read_factors
from loramox.adapter.folder import CONFIG, PROVENANCE, WEIGHTS, at_rank, served_rank, write_adapter
from loramox.adapter.provenance import check_base, check_out, read_provenance
from loramox.errors import AdapterError, ModelError, SettingsError
from loramox.files import sha256_of
from loramox.model.algebra import Factors, concatenate, scaled
from loramox.model.config import identify, read_config, skeleton
from loramox.model.lora import ReferenceConfig
from loramox.run import command, versions
from loramox.settings import check_choices

# What a shipped adapter's provenance has from that of its training.
CARRIED = (
    "momentum",
    "data",
    "settings",
    "method",
    "negated",
    "tuned_adapter",
    "memorize_at",
    "served_otherwise",
    "generated",
)


@dataclass
class ShippingConfig:
    """The form in which a forget adapter is written."""

    rank: int | None = field(
        default=None, metadata={"help": "Rank to ship at. Default: the adapter's, rounded up to one that servers take."}
    )
    ship_dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the shipped weights. auto: the base model's, or bfloat16 for float16, which loses small values.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub id under which servers find the base model, when it is not where it was in training."
        },
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.rank is not None and served_rank(max(self.rank, 1)) != self.rank:
            raise SettingsError(
                f"--rank {self.rank} is not a rank that every server takes; the next one is {served_rank(max(self.rank, 1))}"
            )


def forget_change(delta: dict[str, Factors], alpha: float | None, scale: float = 1.0) -> dict[str, Factors]:
    """What the forget adapter adds to each layer of the reference: −alpha·ΔW, or scale·ΔW where alpha is None."""
    return {name: scaled(factors, scale if alpha is None else -alpha) for name, factors in delta.items()}


def check_alpha(alpha: float) -> None:
    """Raises `SettingsError` unless alpha is finite and above 0."""
    if not math.isfinite(alpha):
        raise SettingsError(f"--alpha {alpha} is not a finite number. Expected a number above 0, 0.5 to 16 as a rule")
    if alpha == 0:
        raise SettingsError(
            "--alpha 0 is the reference model itself: an adapter that does nothing. Switch the adapter off instead"
        )
    if alpha < 0:
        raise SettingsError(
            f"--alpha {alpha:g} is on the memorizing side of the reference, where nothing is forgotten. Give a number above 0"
        )


def alpha_of(given: float | None, source: dict[str, Any]) -> float | None:
    """The alpha to ship at: the one given, or that of training; None for a method that has none.

    Raises `SettingsError` for one that is not finite and above 0, or given for a method that has none.
    """
    if source["alpha"] is None and given is not None:
        raise SettingsError(
            f"--alpha {given:g}: {source['method']} has no alpha. It trains the forget model itself, θ_ref + ΔW. Leave out --alpha; a shipped "
            "adapter is turned down by its scale (PEFT's set_scale, ForgetSwitch)"
        )
    alpha = source["alpha"] if given is None else given
    if alpha is not None:
        check_alpha(alpha)
    return alpha


def check_scale(scale: float, source: dict[str, Any]) -> None:
    """Raises `SettingsError` unless the scale is 1 or, of a method without alpha, finite and above 0."""
    if not math.isfinite(scale) or scale <= 0:
        raise SettingsError(f"scale is {scale}. Expected a finite number above 0; 1 is as trained")
    if scale != 1 and source["alpha"] is not None:
        raise SettingsError(
            f"scale is {scale:g}, and {source['method']} has an alpha, which says how far the adapter goes. Give alpha alone"
        )


def extrapolate(
    trained: str | Path,
    out: str | Path,
    alpha: float | None = None,
    shipping: ShippingConfig | None = None,
    overwrite: bool = False,
    scale: float = 1.0,
    combined: str | Path | None = None,
) -> dict[str, Any]:
    """Write the forget adapter θ_ref − alpha·ΔW, made from the adapter in the folder `trained`, to `out`.

    ΔW is the momentum average; of an adapter that PEFT wrote, it is the adapter itself. It is truncated to the shipped rank,
    and the error of that is in the provenance as `truncation_error`, a share of ‖ΔW‖_F. −alpha and every other scale are
    folded into lora_B in fp32. Of a run with a tuned adapter, a second adapter is written that has both, for servers that load
    only one; the provenance names it under `combined_adapter`.

    Args:
        trained: the folder `trained` of a run, or any plain LoRA adapter that PEFT wrote, which is negated as it is.
        alpha: default: the one of training. For a method without one, scale·ΔW is written. Must be given for PEFT's adapters.
        scale: for a method without alpha, a multiple of ΔW to fold in; 1 is as trained.
        combined: where to write the adapter that has both. Default: `out` with -combined behind its name.

    Returns:
        The provenance of the forget adapter.

    Raises:
        SettingsError: an alpha or a scale that is not finite and above 0, or that the method does not have; no alpha for an
            adapter that PEFT wrote.
        AdapterError: no trained or plain LoRA adapter, another base, or values that do not survive the cast.
        ModelError: the base model's config cannot be read, or the model is of a kind that loramox does not take.
        RunError: `out` exists.
    """
    shipping = shipping or ShippingConfig()
    trained, out = Path(trained), Path(out)
    check_out(out, "forget", overwrite)
    if written_by_peft(trained):
        source, delta, config = read_peft(trained, alpha, shipping.base)
        base = source["base"]
    else:
        source = read_provenance(trained, "trained")
        base = served_base(source, shipping.base, trained)
        delta, config = read_factors(trained / "momentum")
    combined, tuned = Path(combined or f"{out}-combined"), None
    if "tuned_adapter" in source:
        check_out(combined, "forget", overwrite)
        tuned = tuned_factors(source)
    alpha = alpha_of(alpha, source)
    check_scale(scale, source)
    rank = shipping.rank or served_rank(source["settings"]["r"])
    fitted, error = at_rank(forget_change(delta, alpha, scale), rank)
    dtype = shipped_dtype(shipping.ship_dtype, base["dtype"])
    provenance = {
        "kind": "forget",
        "alpha": alpha,
        **({"scale": scale} if scale != 1 else {}),
        "rank": rank,
        "truncation_error": error,
        "dtype": str(dtype).removeprefix("torch."),
        **{key: source[key] for key in CARRIED if key in source},
        "base": base,
        "training_command": source["command"],
        "command": command(),
        "versions": versions(),
    }
    if tuned:
        used = min(rank, max(factors.rank for factors in delta.values()))  # the rest of it is padding
        change = {name: Factors(A[:used], B[:, :used]) for name, (A, B) in fitted.items()}
        made = _write_combined(combined, tuned, change, config, dtype, provenance)
        provenance["combined_adapter"] = {"path": str(combined), "rank": made["rank"], "sha256": made["sha256"]}
    return write_adapter(out, fitted, config, base, dtype, provenance, forget_card(provenance))


def _write_combined(
    folder: Path,
    tuned: dict[str, Factors],
    change: dict[str, Factors],
    config: LoraConfig,
    dtype: torch.dtype,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Write ΔW_tuned + the forget adapter's change as one adapter, exactly; return its provenance."""
    both = {
        name: concatenate(*(each[name] for each in (tuned, change) if name in each))
        for name in tuned.keys() | change.keys()
    }
    rank = served_rank(max(factors.rank for factors in both.values()))
    fitted, _ = at_rank(both, rank)
    trained = config if both.keys() == change.keys() else LoraConfig(fan_in_fan_out=config.fan_in_fan_out)
    provenance = provenance | {"rank": rank, "combined": True}
    return write_adapter(folder, fitted, trained, provenance["base"], dtype, provenance, combined_card(provenance))


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


def read_peft(
    folder: Path, alpha: float | None, base: str | None
) -> tuple[dict[str, Any], dict[str, Factors], LoraConfig]:
    """Read a plain LoRA adapter that PEFT wrote: its provenance as far as it is known, ΔW, and its config.

    Args:
        alpha: how far to negate it. Nothing in the folder says.
        base: folder or hub id of the base model. Default: the one that the adapter names.

    Raises what `extrapolate` raises.
    """
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
    try:
        model_config = read_config(reference)
    except ModelError as error:
        if given:
            raise ModelError(str(error).replace("--model", "--base", 1)) from error
        why = " ".join(str(error).removeprefix("--model ").split()).rstrip(".")
        raise ModelError(
            f"{folder} names its base model {name}, which cannot be used here: {why}. Give the base model's folder or hub id with --base"
        ) from error
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


def shipped_dtype(wanted: str, of_base: str) -> torch.dtype:
    """The type of the shipped weights, from `ShippingConfig.ship_dtype` and the base model's."""
    if wanted == "auto":
        # float16 would round weights below 6e-8 to 0, which some of a large adapter's are.
        wanted = "bfloat16" if of_base == "float16" else of_base
    return getattr(torch, wanted)


def check_shipping(shipping: ShippingConfig, reference: ReferenceConfig, out: Path) -> None:
    """What can be known before training about shipping afterwards. Raises what `extrapolate` would raise: for a rank that
    servers do not take, and for a base that is another model.
    """
    rank = shipping.rank or served_rank(reference.r)
    if reference.tuned_adapter is not None:
        tuned, _ = read_factors(Path(reference.tuned_adapter))
        served_rank(rank + max(factors.rank for factors in tuned.values()))
    if shipping.base is not None:
        served_base({"base": identify(reference, read_config(reference))}, shipping.base, out)


def served_base(source: dict[str, Any], name: str | None, trained: Path) -> dict[str, Any]:
    """The base model as the adapter will name it. Under another name it must be the same model."""
    if name is None:
        return source["base"]
    reference = ReferenceConfig(model=name)
    try:
        base = identify(reference, read_config(reference))
    except ModelError as error:
        raise ModelError(str(error).replace("--model", "--base", 1)) from error
    check_base(source, base, trained)
    return base
