"""Weights besides ΔW during training: frozen adapters, or an earlier checkpoint.

    θ_now = θ_ref − Σ α_i·ΔW_i        earlier requests, which stay on and stay forgotten; θ_for = θ_now − α·ΔW
    θ_ref = θ_base + ΔW_tuned         --tuned_adapter: the model that knows the rows is a base with the user's own adapter
    θ_mem = θ_earlier + ΔW            --memorize_at: ΔW is memorized at a checkpoint that never saw the rows (arXiv 2506.20941)

In the first two, a second PEFT adapter is on the model. θ_ref is without the earlier requests and with the tuned adapter.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft import LoraConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from loramox.adapter.factors import read_factors
from loramox.adapter.source import check_layers, tuned_source
from loramox.data.encode import Example
from loramox.data.row import Row
from loramox.errors import ModelError, SettingsError
from loramox.model.algebra import Factors, padded
from loramox.model.config import identify, read_config, read_tokenizer, skeleton
from loramox.model.lora import ADAPTER, ReferenceConfig, lora_layers, what_trains_as_before

if TYPE_CHECKING:
    from loramox.train.config import UnlearnConfig

EARLIER = "earlier"
TUNED = "tuned"


class Earlier(NamedTuple):
    """What is forgotten already."""

    rows: Sequence[Row]
    templates: Sequence[str | None]  # the text around each row's question when it was forgotten; None: a chat template
    change: dict[str, Factors]  # −Σ α_i·ΔW_i of every adapted layer


class Tuned(NamedTuple):
    """The user's own fine-tune of the base."""

    change: dict[str, Factors]  # ΔW of every layer that it adapts
    source: dict[str, Any]  # as the provenance has it: path, sha256, scales


def put_on(model: PeftModel, change: dict[str, Factors], name: str = EARLIER) -> None:
    """Put `change` beside the adapter that trains, as a frozen adapter of this name, on the layers that it has."""
    rank = max(factors.rank for factors in change.values())
    fan_in_fan_out = model.peft_config[ADAPTER].fan_in_fan_out
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(change), fan_in_fan_out=fan_in_fan_out)
    with what_trains_as_before(model):
        model.add_adapter(name, lora)
    for layer_name, layer in lora_layers(model, name):
        A, B = padded(change[layer_name], rank)
        layer.lora_A[name].weight.data.copy_(A)
        layer.lora_B[name].weight.data.copy_(B)
    switch_on(model)


def switch_on(model: PeftModel) -> None:
    """Make every adapter active, and only ours train, as much of it as before."""
    with what_trains_as_before(model):
        model.base_model.set_adapter(list(model.peft_config))
    for name in model.peft_config.keys() - {ADAPTER}:
        for _, layer in lora_layers(model, name):
            for part in (layer.lora_A, layer.lora_B):
                part[name].requires_grad_(False)


def read_tuned(reference: ReferenceConfig, base: PreTrainedModel) -> Tuned:
    """Read `--tuned_adapter`; warn when it names another base. `base` is the model that `reference` names, also without weights.

    Raises `AdapterError` for what is no plain LoRA adapter, or does not fit `base`.
    """
    folder = Path(reference.tuned_adapter)
    change, config = read_factors(folder)
    check_layers(change, base, folder, reference.model, "--model")
    named = config.base_model_name_or_path
    if named and Path(named).is_dir():
        with suppress(ModelError):  # a quantized copy, as a rule, whose weights cannot be compared
            weights = {identify(each, read_config(each))["weights"] for each in (ReferenceConfig(named), reference)}
            if len(weights - {None}) == 2:
                warnings.warn(
                    f"{folder} was trained on {named}, whose weights differ from those of --model {reference.model}. On another base it does "
                    "something else",
                    stacklevel=2,
                )
    return Tuned(change, tuned_source(folder, config))


def is_at_checkpoint(reference: ReferenceConfig) -> bool:
    """Whether the model in memory is the checkpoint of `--memorize_at`, which is not the model that ships."""
    return reference.memorize_at is not None and reference.tuned_adapter is None


def to_load(reference: ReferenceConfig) -> ReferenceConfig:
    """The model to load for training: `--model`, or the checkpoint of `--memorize_at`."""
    if not is_at_checkpoint(reference):
        return reference
    return replace(reference, model=reference.memorize_at, revision=None, memorize_at=None)


def check_memorize_at(reference: ReferenceConfig, args: "UnlearnConfig", wanted: bool) -> None:
    """Raises `SettingsError` for `--memorize_at` with settings that have no use for it. `wanted`: such answers are taught."""
    if reference.memorize_at is None:
        return
    given = f"--memorize_at {reference.memorize_at}"
    if not args.spec.static:
        raise SettingsError(
            f"{given}: --method {args.method} does not memorize at θ_ref + ΔW. Give --method mox_static or task_vector, or leave out "
            "--memorize_at"
        )
    if is_at_checkpoint(reference):
        needed = {"kl_at": "memorization"} | ({"targeted": "ascent"} if wanted else {})
        for flag, fine in needed.items():
            if getattr(args, flag) not in (None, fine):
                raise SettingsError(
                    f"{given}: --{flag} {getattr(args, flag)} trains the model that ships, θ_ref − alpha·ΔW, which is not in memory: θ_earlier "
                    f"is. Give --{flag} {fine}"
                )


def check_checkpoint(
    reference: ReferenceConfig,
    config: PretrainedConfig,
    encoded: Callable[[PreTrainedTokenizerBase], list[Example]],
    forget: list[Example],
) -> dict[str, Any]:
    """What identifies the checkpoint of `--memorize_at`, after comparing its config and tokenizer with those of `--model`.

    `encoded` makes tokens of the forget rows with another tokenizer; `config` and `forget`, the rows' tokens, are of `--model`.
    Raises `ModelError` if it cannot be read, is of another shape or tokenizer, or is `--model` itself.
    """
    earlier = to_load(reference)
    its_config, tokenizer = read_config(earlier, flag="--memorize_at"), read_tokenizer(earlier, flag="--memorize_at")
    found, base = identify(earlier, its_config), identify(reference, config)
    both = f"--memorize_at {earlier.model} and --model {reference.model}"
    if found["shape"] != base["shape"] or _sizes(its_config, earlier) != _sizes(config, reference):
        raise ModelError(
            f"{both} are of different shapes ({found['shape']}; {base['shape']}), and ΔW of one does not fit the other. Give a checkpoint of "
            "the same model that never saw the forget rows"
        )
    if (found["weights"] or (found["model"], found["revision"])) == (
        base["weights"] or (base["model"], base["revision"])
    ):
        raise ModelError(
            f"{both} are the same weights. Give a checkpoint that never saw the forget rows, or leave out --memorize_at"
        )
    if encoded(tokenizer) != forget:
        raise ModelError(
            f"{both} make different tokens of the forget rows. Give a checkpoint with the same tokenizer and chat template, or "
            "--prompt_template"
        )
    return found


def _sizes(config: PretrainedConfig, reference: ReferenceConfig) -> dict[str, tuple[int, ...]]:
    """The size of every weight."""
    return {name: tuple(weight.shape) for name, weight in skeleton(config, reference).named_parameters()}
