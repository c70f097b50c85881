"""θ_mem → θ_for: the memorization adapter turned round, at a strength.

    θ_for = (1 + α)·θ_ref − α·θ_mem = θ_ref − α·ΔW        (arXiv 2602.06441)

With ΔW = B·A this is the reference plus the adapter (−α·B)·A, so no weight of the model is touched, nothing is trained,
and any other α is another few seconds.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loramox.adapter.card import MOX, forget_card
from loramox.adapter.folder import (
    at_rank,
    check_base,
    check_out,
    read_factors,
    read_provenance,
    served_rank,
    write_adapter,
)
from loramox.errors import ModelError, SettingsError
from loramox.model.algebra import Factors, scaled
from loramox.model.config import identify, read_config
from loramox.model.lora import AS_TRAINED, ReferenceConfig
from loramox.run import command, versions
from loramox.settings import check_choices


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


def negate(delta: dict[str, Factors], strength: float) -> dict[str, Factors]:
    """−α·ΔW for every layer: what the forget adapter adds to the reference."""
    return {name: scaled(factors, -strength) for name, factors in delta.items()}


def check_strength(strength: float, memorization: Path) -> None:
    """Raises `SettingsError` unless strength is finite and above 0, saying where the model is that was asked for instead."""
    if not math.isfinite(strength):
        raise SettingsError(
            f"--alpha {strength} is not a finite number. Expected a strength above 0, 0.5 to 16 as a rule"
        )
    if strength == 0:
        raise SettingsError(
            "--alpha 0 is the reference model itself: an adapter that does nothing. Switch the adapter off instead"
        )
    if strength < 0:
        model = (
            "the memorization model itself"
            if strength == -1
            else "on the memorization model's side of the reference, where nothing is forgotten"
        )
        raise SettingsError(
            f"--alpha {strength:g} is {model}. That adapter is in {memorization}; for forgetting, give a strength above 0"
        )


def check_as_trained(strength: float, source: dict[str, Any]) -> None:
    """Raises `SettingsError` for another strength than that of an adapter that was trained to forget, and ships as it is."""
    if strength != AS_TRAINED:
        raise SettingsError(
            f"--alpha {strength:g}: {source['method']} trains the forget model itself, θ_ref + ΔW, and holds retain rows there alone. "
            "Leave out --alpha; PEFT's set_scale turns a shipped adapter down, and memorizing (--method mox) gives one that can be dialled"
        )


def extrapolate(
    memorization: str | Path,
    out: str | Path,
    strength: float | None = None,
    shipping: ShippingConfig | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the forget adapter θ_ref − α·ΔW, made from the memorization adapter in a folder, to `out`; return its provenance.

    `strength` is α, by default the one that it was memorized for. ΔW of another method than MOX was trained to forget: it is
    written as it is, α = −1, and at no other strength.
    ΔW is the momentum average where there is one. It is truncated to the shipped rank, and the error of that is in the
    provenance as `truncation_error`, a share of ‖ΔW‖_F. −α and every other scale are folded into lora_B in fp32.

    Raises `SettingsError` for a strength that is not finite and above 0, or not the only one, `AdapterError` for a folder that
    is no memorization adapter, for another base, and for values that do not survive the cast, `RunError` when `out` exists.
    """
    shipping = shipping or ShippingConfig()
    memorization, out = Path(memorization), Path(out)
    source = read_provenance(memorization, "memorization")
    strength = source["settings"]["strength"] if strength is None else strength
    if source["settings"]["strength"] == AS_TRAINED:
        check_as_trained(strength, source)
    else:
        check_strength(strength, memorization)
    check_out(out, "forget", overwrite)
    base = served_base(source, shipping.base, memorization)
    rank = shipping.rank or served_rank(source["settings"]["r"])
    delta, trained = read_factors(memorization / "momentum")
    fitted, error = at_rank(negate(delta, strength), rank)
    dtype = shipped_dtype(shipping.ship_dtype, base["dtype"])
    provenance = {
        "kind": "forget",
        "strength": strength,
        "rank": rank,
        "truncation_error": error,
        "dtype": str(dtype).removeprefix("torch."),
        **{key: source[key] for key in ("momentum", "data", "settings")},
        "method": source.get("method", MOX),
        "base": base,
        "memorization_command": source["command"],
        "command": command(),
        "versions": versions(),
    }
    return write_adapter(out, fitted, trained, base, dtype, provenance, forget_card(provenance))


def shipped_dtype(wanted: str, of_base: str) -> torch.dtype:
    """The type of the shipped weights, from `ShippingConfig.ship_dtype` and the base model's."""
    if wanted == "auto":
        # float16 would round weights below 6e-8 to 0, which some of a large adapter's are.
        wanted = "bfloat16" if of_base == "float16" else of_base
    return getattr(torch, wanted)


def check_shipping(shipping: ShippingConfig, reference: ReferenceConfig, out: Path) -> None:
    """What can be known before memorizing about shipping afterwards. Raises what `extrapolate` would raise: for a rank that
    servers do not take, and for a base that is another model.
    """
    if shipping.rank is None:
        served_rank(reference.r)
    if shipping.base is not None:
        served_base({"base": identify(reference, read_config(reference))}, shipping.base, out)


def served_base(source: dict[str, Any], name: str | None, memorization: Path) -> dict[str, Any]:
    """The base model as the adapter will name it. Under another name it must be the same model."""
    if name is None:
        return source["base"]
    reference = ReferenceConfig(model=name)
    try:
        base = identify(reference, read_config(reference))
    except ModelError as error:
        raise ModelError(str(error).replace("--model", "--base", 1)) from error
    check_base(source, base, memorization)
    return base
