"""The reference model θ_ref: frozen, quantized if wanted, with one LoRA adapter on it.

There is never a second copy. The reference is this model with its adapter off; the memorization model is this model
with its adapter on; the forget model is the same with the adapter's strength turned to the other side:

    θ(strength) = θ_ref − strength·ΔW        strength 0: reference, −1: memorization model, α > 0: forget model
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from loramox.algebra import Factors
from loramox.errors import ModelError, SettingsError
from loramox.settings import check_choices

ADAPTER = "default"  # PEFT's own name for a model's first adapter


@dataclass
class ModelConfig:
    """Which model, in how many bits."""

    model: str = field(
        metadata={"help": "Folder or hub id of the 16- or 32-bit causal language model that knows the forget rows."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    quantization: str = field(
        default="nf4",
        metadata={
            "help": "Weights of the frozen reference: nf4 (double quantization), int8, or none.",
            "choices": ["nf4", "int8", "none"],
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of what is not quantized, and of the arithmetic. auto: bfloat16 on a GPU, float32 on a CPU.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})

    def __post_init__(self) -> None:
        check_choices(self)

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


@dataclass
class ReferenceConfig(ModelConfig):
    """The model to start from, and the LoRA adapter to put on it."""

    r: int = field(
        default=16,
        metadata={
            "aliases": ["--lora_r"],
            "help": "Rank of the LoRA adapter, as in PEFT. Under torchrun write --lora_r: it takes --r for its own.",
        },
    )
    lora_alpha: int = field(
        default=16, metadata={"help": "LoRA's own scale is lora_alpha / r, as in PEFT. Not the strength α."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "As in PEFT. Of no use against memorizing, which is the aim."}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt, as in PEFT. Default: all linear layers but the output head."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise SettingsError(f"r is {self.r}; --r needs a rank of at least 1 (16 fits every server's default limit)")
        if self.lora_alpha < 1:
            raise SettingsError(
                f"lora_alpha is {self.lora_alpha}; --lora_alpha needs a positive integer. The strength is --alpha"
            )


def read_config(reference: ModelConfig) -> PretrainedConfig:
    """The model's config, after checking from it alone that the model can serve as the reference.

    Raises `ModelError` for a missing model, one that is not causal, is a mixture of experts, takes images or sound, or
    is quantized already (an adapter must name the 16-bit base that servers load).
    """
    name = reference.model
    try:
        config = AutoConfig.from_pretrained(
            name, revision=reference.revision, trust_remote_code=reference.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {name}: no usable config.json there: {error}") from error
    kind = config.model_type
    architectures = config.architectures or []
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config", "text_config")):
        raise ModelError(
            f"--model {name} is a multimodal model ({kind}). loramox takes text-only causal language models"
        )
    # BERT and its like have a causal class too; a config that does not say which one it is for means their own kind.
    causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures) or (
        not architectures and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    if (
        getattr(config, "is_encoder_decoder", False)
        or not causal
        or not (kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or remote)
    ):
        raise ModelError(
            f"--model {name} is {', '.join(architectures) or kind}, not a causal language model (…ForCausalLM)"
        )
    experts = [
        n for n in ("num_local_experts", "num_experts", "n_routed_experts") if (getattr(config, n, None) or 0) > 1
    ]
    if experts:
        raise ModelError(
            f"--model {name} is a mixture of experts ({kind}, {experts[0]} = {getattr(config, experts[0])}): its experts are not "
            "linear layers that LoRA adapts. loramox takes dense models"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"--model {name} is quantized already. Give the 16-bit model it was made from: the adapter records its base, and "
            "servers load that one. loramox quantizes it while loading (--quantization nf4)"
        )
    return config


def read_tokenizer(reference: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Raises `ModelError` when there is none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(
            reference.model, revision=reference.revision, trust_remote_code=reference.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {reference.model}: its tokenizer cannot be loaded: {error}") from error


def check_device(reference: ModelConfig, use_cpu: bool = False) -> torch.device:
    """The device a run will use. Raises `SettingsError` when it cannot hold weights in the wanted quantization."""
    device = torch.device("cpu") if use_cpu else torch.accelerator.current_accelerator() or torch.device("cpu")
    if reference.quantization != "none" and device.type not in ("cuda", "cpu", "xpu"):
        raise SettingsError(
            f"quantization is {reference.quantization}, which bitsandbytes does not run on {device.type}. "
            "Use --quantization none, or --use_cpu"
        )
    return device


def skeleton(config: PretrainedConfig, reference: ModelConfig) -> PreTrainedModel:
    """The model without weights (on torch's meta device), to find out what an adapter on it is before loading it."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=reference.trust_remote_code)


def load_reference(reference: ModelConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """θ_ref on `device`, frozen, in the wanted quantization, every 4-bit layer safe for training after evaluation."""
    dtype = reference.torch_dtype(torch.device(device))
    model = AutoModelForCausalLM.from_pretrained(
        reference.model,
        config=without_dropout(read_config(reference)),
        revision=reference.revision,
        trust_remote_code=reference.trust_remote_code,
        dtype=dtype,
        device_map={"": device},
        quantization_config=_quantization(reference.quantization, dtype),
    )
    if reference.quantization == "nf4":
        keep_4bit_weights_in_place(model)
    return model.requires_grad_(False)


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The config with every dropout of the base model at 0.

    GPT-2's is 0.1: two passes of a training model would differ, and the KL to the reference would not be 0 at the start.
    """
    for name, value in config.to_dict().items():
        if isinstance(value, float) and (name.endswith(("dropout", "_pdrop", "dropout_prob", "dropout_rate"))):
            setattr(config, name, 0.0)
    return config


def _quantization(kind: str, dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else None


def keep_4bit_weights_in_place(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights, after which frozen layers silently pass no gradient.

    On a CPU with avx512_bf16, one forward pass without gradients in eval mode repacks each weight for inference, in
    place and for good; `from_pretrained` returns a model in eval mode, so "evaluate, then train" would train nothing.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def add_lora(model: PreTrainedModel, reference: ReferenceConfig) -> PeftModel:
    """A fresh fp32 LoRA adapter on the frozen reference: B is 0, so the adapted model is the reference until trained."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=reference.r,
        lora_alpha=reference.lora_alpha,
        lora_dropout=reference.lora_dropout,
        target_modules=reference.target_modules or "all-linear",
        base_model_name_or_path=reference.model,
        revision=reference.revision,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"--target_modules {reference.target_modules}: {error}") from error
    check_frozen_head(adapted)
    return adapted


def check_frozen_head(model: PeftModel) -> None:
    """Raises `ModelError` when the output head is trained or adapted: losses take no gradient of it, nor do servers load one."""
    if any(p.requires_grad for p in model.get_base_model().get_output_embeddings().parameters()):
        raise ModelError(
            "the model's output head is adapted or trained. Leave it out of --target_modules, and freeze it (add_lora does): "
            "a forget adapter changes the layers below it"
        )


def lora_layers(model: nn.Module, adapter: str = ADAPTER) -> Iterator[tuple[str, LoraLayer]]:
    """(name, layer) for each layer that `adapter` changes, the name being that of the base model's module."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            yield name.removeprefix("base_model.model."), layer


@contextmanager
def at_strength(model: nn.Module, strength: float, adapter: str = ADAPTER) -> Iterator[None]:
    """Within it the model is θ_ref − strength·ΔW; after it, the memorization model again.

    A backward pass must end inside: gradient checkpointing reads the strength again when it recomputes a forward pass.
    """
    layers = [layer for _, layer in lora_layers(model, adapter)]
    try:
        for layer in layers:
            layer.set_scale(adapter, -strength)
        yield
    finally:
        for layer in layers:
            layer.set_scale(adapter, 1.0)


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


def identify(reference: ModelConfig, config: PretrainedConfig) -> dict[str, str | None]:
    """What tells this base model from others: its name and revision, its shape, and a sample of its weights.

    The sample is a SHA-256 over each weights file's size, first and last MB: fine-tunings of one model differ in it,
    and it takes no time. It is None for a hub id, whose revision (a commit) says as much.
    """
    shape = {
        k: getattr(config, k, None)
        for k in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    folder = Path(reference.model)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return {
        "model": reference.model,
        "revision": _commit(reference) or reference.revision,
        "shape": ", ".join(f"{k} {v}" for k, v in shape.items()),
        "weights": _sample(files) if files else None,
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
    }


def _commit(reference: ModelConfig) -> str | None:
    """The commit that a hub id stood for when its config was read; None for a folder."""
    if Path(reference.model).is_dir():
        return None
    return extract_commit_hash(cached_file(reference.model, CONFIG_NAME, revision=reference.revision), None)


def _sample(files: list[Path], size: int = 1 << 20) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            length = path.stat().st_size
            digest.update(f"{path.name} {length}\n".encode() + file.read(size))
            file.seek(max(0, length - size))
            digest.update(file.read(size))
    return digest.hexdigest()
