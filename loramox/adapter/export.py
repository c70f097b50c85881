"""ΔW → the shipped adapter: scaled, truncated to a rank that servers accept, cast, written as a PEFT folder.

    θ_for = θ_ref − alpha·ΔW        methods that memorize (MOX, arXiv 2602.06441): alpha > 0 is free after training
    θ_for = θ_ref + ΔW              methods that train the forget model itself; at a scale, θ_ref + scale·ΔW

With ΔW = B·A the first is the reference plus the adapter (−alpha·B)·A: no weight of the model is touched, nothing is trained.
This is the only place where a sign is changed.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from loramox.adapter.card import combined_card, forget_card
from loramox.adapter.factors import read_factors
from loramox.adapter.folder import at_rank, served_rank, write_adapter
from loramox.adapter.provenance import check_out
from loramox.adapter.source import read_source, served_base, tuned_factors
from loramox.errors import SettingsError
from loramox.model.algebra import Factors, concatenate, scaled
from loramox.model.config import identify, read_config
from loramox.model.lora import ReferenceConfig
from loramox.run import command, versions
from loramox.settings import check_choices, refuse, setting

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
    "checkpoint",
    "base",
)


@dataclass
class ShippingConfig:
    """The form in which a forget adapter is written."""

    rank: int | None = setting("Rank to ship at. Default: the adapter's, rounded up to one that servers accept.", None)
    ship_dtype: str = setting(
        "Type of the shipped weights. auto: the base model's, or bfloat16 for float16, which loses small values.",
        "auto",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    base: str | None = setting(
        "Folder or hub id of the base model on the server, if it differs from the one in training.", None
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


def alpha_of(given: float | None, source: dict[str, Any]) -> float | None:
    """The alpha to ship at: the one given, or that of training; None for a method that has none.

    Raises `SettingsError` for one that is not finite and above 0, or given for a method that has none.
    """
    if source["alpha"] is None and given is not None:
        raise SettingsError(
            f"--alpha {given:g}: {source['method']} has no alpha. It trains the forget model itself, θ_ref + ΔW. Leave out --alpha, or give "
            "--scale, a multiple of ΔW; a shipped adapter is turned down by its scale (PEFT's set_scale, ForgetSwitch)"
        )
    alpha = source["alpha"] if given is None else given
    if alpha is not None and not 0 < alpha < math.inf:
        raise SettingsError(
            f"--alpha {alpha:g}: at 0 the model is the reference, and below it is on the memorizing side. Expected a finite number above 0, "
            "0.5 to 16 as a rule"
        )
    return alpha


def check_scale(scale: float, source: dict[str, Any]) -> None:
    """Raises `SettingsError` unless the scale is 1 or, of a method without alpha, finite and above 0."""
    refuse("scale", scale, scale > 0, "a finite number above 0, and 1 is as trained")
    if scale != 1 and source["alpha"] is not None:
        raise SettingsError(
            f"scale is {scale:g}, and {source['method']} has an alpha, which says how far the adapter goes. Give --alpha alone"
        )


def extrapolate(
    trained: str | Path,
    out: str | Path,
    alpha: float | None = None,
    shipping: ShippingConfig | None = None,
    overwrite: bool = False,
    scale: float = 1.0,
    combined: str | Path | None = None,
    chosen_by: str | None = None,
) -> dict[str, Any]:
    """Write the forget adapter θ_ref − alpha·ΔW, made from the adapter in the folder `trained`, to `out`.

    ΔW is the momentum average; of an adapter that PEFT wrote, it is the adapter itself. It is truncated to the shipped rank,
    and the error of that is in the provenance as `truncation_error`, a share of ‖ΔW‖_F. −alpha and every other scale are
    folded into lora_B in fp32. Of a run with a tuned adapter, a second adapter is written that has both, for servers that load
    only one; the provenance names it under `combined_adapter`.

    Args:
        trained: the folder `trained` of a run, a checkpoint in it, or any plain LoRA adapter that PEFT wrote, which is negated.
        alpha: default: the one of training. For a method without one, scale·ΔW is written. Must be given for PEFT's adapters.
        scale: for a method without alpha, a multiple of ΔW to fold in; 1 is as trained.
        combined: where to write the adapter that has both. Default: `out` with -combined behind its name.
        chosen_by: the rule that chose alpha or scale, for the provenance and the card.

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
    source, delta, config = read_source(trained, alpha, shipping.base)
    combined, tuned = Path(combined or f"{out}-combined"), None
    if "tuned_adapter" in source:
        check_out(combined, "forget", overwrite)
        tuned = tuned_factors(source)
    alpha = alpha_of(alpha, source)
    check_scale(scale, source)
    rank = shipping.rank or served_rank(source["settings"]["r"])
    fitted, error = at_rank(forget_change(delta, alpha, scale), rank)
    dtype = shipped_dtype(shipping.ship_dtype, source["base"]["dtype"])
    provenance = {
        "kind": "forget",
        "alpha": alpha,
        "rank": rank,
        "truncation_error": error,
        "dtype": str(dtype).removeprefix("torch."),
        **({"scale": scale} if scale != 1 else {}),
        **({"chosen_by": chosen_by} if chosen_by else {}),
        **{key: source[key] for key in CARRIED if key in source},
        "training_command": source["command"],
        "command": command(),
        "versions": versions(),
    }
    if tuned:
        used = min(rank, max(factors.rank for factors in delta.values()))  # the rest of it is padding
        made = _write_combined(combined, tuned, fitted, used, config, dtype, provenance)
        provenance["combined_adapter"] = {"path": str(combined), "rank": made["rank"], "sha256": made["sha256"]}
    return write_adapter(out, fitted, config, source["base"], dtype, provenance, forget_card(provenance))


def _write_combined(
    folder: Path,
    tuned: dict[str, Factors],
    fitted: dict[str, Factors],
    used: int,
    config: LoraConfig,
    dtype: torch.dtype,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Write ΔW_tuned + the forget adapter's change, the first `used` ranks of `fitted`, as one adapter, exactly; return its
    provenance."""
    change = {name: Factors(A[:used], B[:, :used]) for name, (A, B) in fitted.items()}
    both = {
        name: concatenate(*(each[name] for each in (tuned, change) if name in each))
        for name in tuned.keys() | change.keys()
    }
    rank = served_rank(max(factors.rank for factors in both.values()))
    fitted, _ = at_rank(both, rank)
    trained = config if both.keys() == change.keys() else LoraConfig(fan_in_fan_out=config.fan_in_fan_out)
    provenance = provenance | {"rank": rank, "combined": True}
    return write_adapter(folder, fitted, trained, provenance["base"], dtype, provenance, combined_card(provenance))


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
