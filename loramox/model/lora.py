"""The LoRA adapter on the frozen reference: added, switched off, scaled, read and exchanged.

There is never a second copy of the model. The reference is this model with its adapter off; every other model is

    θ_ref + scale·ΔW        scale 0: the reference; 1: as trained; −alpha: the forget model of MOX
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from loramox.errors import ModelError, SettingsError
from loramox.model.algebra import Factors
from loramox.model.config import ModelConfig, identify
from loramox.settings import refuse, setting

ADAPTER = "default"  # PEFT's own name for a model's first adapter

# Settings of LoraConfig that do not change what ΔW is: where it is, how large, how it was named, started and trained.
HARMLESS = frozenset(
    ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
     "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_alpha", "lora_dropout", "fan_in_fan_out",
     "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core",
     "runtime_config", "ensure_weight_tying")
)  # fmt: skip

# Values of init_lora_weights under which PEFT leaves the base's weights as they are; others, such as PiSSA's, change them.
KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclass
class ReferenceConfig(ModelConfig):
    """The model to start from, and the LoRA adapter to put on it."""

    r: int = setting(
        "Rank of the LoRA adapter, as in PEFT. Under torchrun write --lora_r, since torchrun takes --r as its own flag.",
        16,
        aliases=["--lora_r"],
    )
    lora_alpha: int | None = setting(
        "LoRA's own scale is lora_alpha / r, as in PEFT. Not --alpha. Default: r, or 8·r for npo_mean.", None
    )
    lora_dropout: float = setting("As in PEFT. Dropout works against memorizing, which is the aim.", 0.0)
    target_modules: list[str] | None = setting(
        "Names of the layers to adapt, as in PEFT. Default: all linear layers except the output head.", None
    )
    shared_subspace: bool = setting(
        "Freeze A at random values that depend on the base model alone and train only B: adapters of one base then "
        "add up without growing, and each forgets less.",
        False,
    )
    tuned_adapter: str | None = setting(
        "Folder of your own LoRA fine-tune of --model, written by PEFT, if that fine-tune knows the forget rows. It stays on, "
        "frozen. The run writes a forget adapter to load beside it, and one adapter that combines both.",
        None,
    )
    memorize_at: str | None = setting(
        "mox_static, task_vector: folder or hub id of a checkpoint of --model that never saw the forget rows. ΔW is memorized "
        "there and subtracted from --model. With --tuned_adapter: base, which is --model without that adapter.",
        None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuned_adapter is not None and self.memorize_at is not None:
            if self.memorize_at != "base" and Path(self.memorize_at) != Path(self.model):
                raise SettingsError(
                    f"--memorize_at {self.memorize_at}: with --tuned_adapter, one copy of --model {self.model} is in memory. Say --memorize_at "
                    "base, which memorizes without the tuned adapter, or leave it out"
                )
            self.memorize_at = "base"
        elif self.memorize_at == "base":
            raise SettingsError(
                "--memorize_at base is --model without its --tuned_adapter, and none is given. Give that adapter, or the folder or hub id of "
                "a checkpoint that never saw the forget rows"
            )
        refuse("r", self.r, self.r >= 1, "a rank of at least 1 (16 fits every server's default limit)")
        expected = "a positive integer. How far to extrapolate is --alpha"
        refuse("lora_alpha", self.lora_alpha, self.lora_alpha is None or self.lora_alpha >= 1, expected)


def add_lora(model: PreTrainedModel, reference: ReferenceConfig) -> PeftModel:
    """A fresh fp32 LoRA adapter on the frozen reference: B is 0, so the adapted model is the reference until trained."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=reference.r,
        lora_alpha=reference.lora_alpha or reference.r,
        lora_dropout=reference.lora_dropout,
        target_modules=reference.target_modules or "all-linear",
        base_model_name_or_path=reference.model,
        revision=reference.revision,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"--target_modules {reference.target_modules}: {str(error).rstrip('.')}. Give names of layers, such as q_proj, or leave --target_modules out: all "
            "linear layers but the output head"
        ) from error
    if reference.shared_subspace:
        freeze_subspace(adapted, reference)
    check_trained(adapted)
    return adapted


def freeze_subspace(model: PeftModel, reference: ReferenceConfig) -> None:
    """Give every layer's A [r, in] values that depend on the base model and the layer's name alone, and freeze it.

    Uniform in ±1/√in, as PEFT draws A, from a generator seeded by SHA-256(base model, layer): every adapter of this base and
    rank has the same A, so ΔW₁ + ΔW₂ = (B₁ + B₂)·A.
    """
    base = identify(reference, model.get_base_model().config)
    # A folder may move, and its weights tell it from others; a hub id has none here, and its name and commit do.
    known_by = [base["shape"], base["weights"] or (base["model"], base["revision"])]
    for name, layer in lora_layers(model):
        A = layer.lora_A[ADAPTER].weight
        seed = hashlib.sha256(json.dumps([*known_by, name]).encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big", signed=True))
        bound = A.shape[1] ** -0.5
        A.data.copy_(torch.empty(A.shape, device="cpu").uniform_(-bound, bound, generator=generator))
        A.requires_grad_(False)


def check_trained(model: PeftModel) -> None:
    """Raises `ModelError` unless all that is trained is ΔW = lora_alpha/r·B·A of layers below the output head.

    Nothing else can be scaled, averaged and shipped as a plain LoRA adapter.
    """
    if any(p.requires_grad for p in model.get_base_model().get_output_embeddings().parameters()):
        raise ModelError(
            "the model's output head is adapted or trained. Leave it out of --target_modules, and freeze it (add_lora does): "
            "a forget adapter changes the layers below it"
        )
    odd = variants(model.peft_config[ADAPTER])
    if odd:
        raise ModelError(
            f"the adapter is not a plain LoRA adapter ({', '.join(odd)}): its ΔW is not lora_alpha/r·B·A. Use loramox.add_lora, or PEFT's "
            "LoraConfig without them"
        )
    factors = {id(f[ADAPTER].weight) for _, layer in lora_layers(model) for f in (layer.lora_A, layer.lora_B)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    if others:
        raise ModelError(
            f"{len(others)} weights are trained that are no LoRA factors of a linear layer (first: {others[0]}). They would be neither "
            "extrapolated nor shipped: leave embeddings out of --target_modules, and freeze everything else"
        )


def variants(config: LoraConfig, allowed: Collection[str] = ()) -> list[str]:
    """The settings, except those `allowed`, for which ΔW is not lora_alpha/r·B·A of the base that the config names.

    A setting that is not known to leave ΔW alone counts as one that does not, as PEFT adds new variants.
    """
    plain = LoraConfig()
    names = [each.name for each in fields(config) if each.name not in (*HARMLESS, *allowed)]
    odd = [name for name in names if (getattr(config, name) or None) != (getattr(plain, name, None) or None)]
    return odd + (["init_lora_weights"] if config.init_lora_weights not in KEEP_THE_BASE else [])


def lora_layers(model: nn.Module, adapter: str = ADAPTER) -> Iterator[tuple[str, LoraLayer]]:
    """(name, layer) for each layer that `adapter` changes, the name being that of the base model's module."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            yield name.removeprefix("base_model.model."), layer


@contextmanager
def what_trains_as_before(model: nn.Module) -> Iterator[None]:
    """After it the weights train that trained before: PEFT marks those of all adapters that it switches on as trainable."""
    trains = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in trains:
            parameter.requires_grad_(flag)


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Within it the model is the base, with every adapter off."""
    with what_trains_as_before(model), model.disable_adapter():
        yield


@contextmanager
def at_scale(model: nn.Module, scale: float, adapter: str = ADAPTER) -> Iterator[None]:
    """Within it the model is θ_ref + scale·ΔW; after it, what it was before.

    A backward pass must end inside: gradient checkpointing reads the scale again when it recomputes a forward pass.
    """
    before = [(layer, layer.scaling[adapter]) for _, layer in lora_layers(model, adapter)]
    try:
        for layer, _ in before:
            layer.set_scale(adapter, scale)
        yield
    finally:
        for layer, own in before:
            layer.scaling[adapter] = own


def current_factors(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Factors]:
    """ΔW of every adapted layer as it stands, scale folded into B, in fp32 and detached from training."""
    return {
        name: Factors(
            A=layer.lora_A[adapter].weight.detach().float().clone(),
            B=layer.lora_B[adapter].weight.detach().float() * (layer.lora_alpha[adapter] / layer.r[adapter]),
        )
        for name, layer in lora_layers(model, adapter)
    }


@contextmanager
def with_factors(model: nn.Module, factors: dict[str, Factors], adapter: str = ADAPTER) -> Iterator[None]:
    """Within it the adapter's ΔW is the one given, of any rank; its own weights are back afterwards. For evaluation."""
    own = []
    try:
        for name, layer in lora_layers(model, adapter):
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            own.append((A, A.data, B, B.data))
            A.data = factors[name].A.to(A)
            B.data = (factors[name].B / (layer.lora_alpha[adapter] / layer.r[adapter])).to(B)
        yield
    finally:
        for A, a, B, b in own:
            A.data, B.data = a, b
