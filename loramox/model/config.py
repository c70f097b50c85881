"""The base model in a folder or on the hub: its identity, and whether it can serve as the reference.

Nothing here loads weights. What it says of a model holds for all commands: each reads the config here.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import ADAPTER_CONFIG_NAME as ADAPTER_CONFIG
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from loramox.errors import ModelError, RunError, SettingsError
from loramox.files import read_json
from loramox.model.precision import half_precision, warn_of_emulation
from loramox.model.stored import AGAIN, check_weights
from loramox.settings import check_choices, setting

MOST_LAYERS = 1_000  # the largest models have some 100; a damaged number would be built for ever


@dataclass
class ModelConfig:
    """Which model, in how many bits."""

    model: str = setting("Folder or hub id of the 16- or 32-bit causal language model that knows the forget rows.")
    revision: str | None = setting("Branch, tag or commit on the hub.", None)
    quantization: str = setting(
        "Weights of the frozen reference: nf4 (double quantization), int8, or none.",
        "nf4",
        choices=["nf4", "int8", "none"],
    )
    dtype: str = setting(
        "Type of the weights that are not quantized, and of the arithmetic. auto: bfloat16 on a GPU (float16 on one without it), float32 on a CPU.",
        "auto",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    attn_implementation: str | None = setting(
        "How attention is computed, as in transformers: sdpa, eager, flash_attention_2, … Default: the model's, usually sdpa.",
        None,
    )
    shard: bool = setting(
        "Split the frozen layers among the processes of torchrun or accelerate launch, for a model that one device cannot hold.",
        False,
    )
    trust_remote_code: bool = setting("Run model code that comes with the checkpoint.", False)

    def __post_init__(self) -> None:
        check_choices(self)

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """The type of the arithmetic on `device`. Warns where a GPU has no bfloat16, and where the device emulates it."""
        if self.dtype == "auto":
            return half_precision(device) if device.type == "cuda" else torch.float32
        if self.dtype == "bfloat16":
            warn_of_emulation(device, "--dtype bfloat16")
        return getattr(torch, self.dtype)


def read_config(reference: ModelConfig, weights: bool = False, flag: str = "--model") -> PretrainedConfig:
    """The model's config, after checking from it alone that the model can serve as the reference.

    With `weights`, the files of weights in its folder are checked as well, by their headers, and what they are loaded with.
    Messages call the model `flag`. Raises `ModelError`, also for one that is quantized already: an adapter must name the 16-bit
    base that servers load.
    """
    name = reference.model
    _refuse_adapter(Path(name), flag)
    try:
        config = AutoConfig.from_pretrained(
            name, revision=reference.revision, trust_remote_code=reference.trust_remote_code
        )
    except Exception as error:  # transformers raises errors of many types for a damaged file
        if not Path(name).exists() and (Path(name).is_absolute() or name.count("/") != 1):
            raise ModelError(
                f"{flag} {name}: there is no such folder. Expected a model's folder, or a hub id owner/name"
            ) from error
        why = str(error) or type(error).__name__
        raise ModelError(f"{flag} {name}: no usable config.json there: {why}") from error
    kind = config.model_type
    architectures = config.architectures or []
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(architectures, list) or (isinstance(layers, int) and layers > MOST_LAYERS):
        raise ModelError(f"{flag} {name}: its config.json is damaged (architectures, num_hidden_layers). {AGAIN}")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config", "text_config")):
        raise ModelError(
            f"{flag} {name} is a multimodal model ({kind}). loramox takes text-only causal language models"
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
            f"{flag} {name} is {', '.join(architectures) or kind}, not a causal language model (…ForCausalLM)"
        )
    for count in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(config, count, None) not in (None, 0, 1):
            raise ModelError(
                f"{flag} {name} is a mixture of experts ({kind}, {count} = {getattr(config, count)}): its experts are not "
                "linear layers that LoRA adapts. loramox takes dense models"
            )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{flag} {name} is quantized already. Give the 16-bit model it was made from: the adapter records its base, and "
            "servers load that one. loramox quantizes it while loading (--quantization nf4), or after a merge (--quantize nf4)"
        )
    if weights:
        check_weights(name)
        _check_generation(Path(name) / GENERATION_CONFIG_NAME)
    return config


def _check_generation(path: Path) -> None:
    """Raises `ModelError` for a generation_config.json that is damaged, before transformers meets it with the weights."""
    if path.exists():
        try:
            read_json(path, dict)
        except RunError as error:
            raise ModelError(f"{error}. {AGAIN}") from error


def _refuse_adapter(folder: Path, flag: str) -> None:
    """Raises `ModelError` for a folder with an adapter in it."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    if (folder / CONFIG_NAME).is_file():
        raise ModelError(
            f"{flag} {folder} has an {ADAPTER_CONFIG}: transformers puts that adapter on the model, which is then not the base that it "
            "seems to be. Give a folder without it (move the adapter's files out), or merge the adapter first: loramox ship merge"
        )
    raise ModelError(
        f"{flag} {folder} is an adapter, not a model. Give the base model that it was trained on; to score the two together, add "
        f"--adapter {folder}"
    )


def read_tokenizer(reference: ModelConfig, flag: str = "--model") -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a pad token that the model has.

    Raises:
        ModelError: there is no tokenizer that can be loaded, or a token that every row needs has no embedding in the model.
    """
    name = {
        "pretrained_model_name_or_path": reference.model,
        "revision": reference.revision,
        "trust_remote_code": reference.trust_remote_code,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**name)
        words = getattr(AutoConfig.from_pretrained(**name), "vocab_size", None)
    except Exception as error:  # as of a damaged config
        why = str(error) or type(error).__name__
        raise ModelError(f"{flag} {reference.model}: its tokenizer cannot be loaded: {why}") from error
    beyond = {token: id_ for token, id_ in tokenizer.get_added_vocab().items() if words and id_ >= words}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    needed = [token for token in beyond if token in (tokenizer.eos_token, tokenizer.bos_token) or token in template]
    if needed:
        raise ModelError(
            f"{flag} {reference.model}: its tokenizer puts {needed[0]} (token {beyond[needed[0]]}) into every row, and the model has "
            f"embeddings for {words} tokens only. Give the tokenizer that the model was trained with, or resize the model's embeddings"
        )
    if tokenizer.pad_token in beyond:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token that the model has will do
    return tokenizer


def context_of(config: PretrainedConfig) -> int:
    """The longest row in tokens that the model takes; 2,048 where its config does not say."""
    return getattr(config, "max_position_embeddings", None) or 2048


def check_device(reference: ModelConfig, use_cpu: bool = False) -> torch.device:
    """The device a run will use.

    Raises `SettingsError` when it cannot hold weights in the wanted quantization, or these cannot be cut over processes.
    """
    # With check_available: without it, the ordinary wheel of torch names a GPU on machines that have none.
    device = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    device = device or torch.device("cpu")
    if reference.quantization != "none" and device.type not in ("cuda", "cpu", "xpu"):
        raise SettingsError(
            f"quantization is {reference.quantization}, which bitsandbytes does not run on {device.type}. "
            "Use --quantization none, or --use_cpu"
        )
    if reference.shard and reference.quantization == "int8":
        raise SettingsError("--shard: 8-bit weights cannot be cut over processes. Use --quantization nf4 or none")
    if reference.shard and not several_processes():
        raise SettingsError(
            "--shard cuts the frozen layers over several processes, and this is one. Start unlearn, train, evaluate or sweep with "
            "torchrun --nproc_per_node N -m loramox, or say --shard false"
        )
    return device


def several_processes() -> bool:
    """Whether torchrun or accelerate launch has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def skeleton(config: PretrainedConfig, reference: ModelConfig) -> PreTrainedModel:
    """The model without weights (on torch's meta device), to find out what an adapter on it is before loading it.

    Raises `ModelError` for a config that makes no model.
    """
    try:
        with torch.device("meta"), attention_of(reference):
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=reference.attn_implementation, trust_remote_code=reference.trust_remote_code
            )
    except ModelError:
        raise
    except Exception as error:  # a size that is 0, a name of no activation, …
        raise ModelError(
            f"--model {reference.model}: its config.json makes no model ({type(error).__name__}: {error}). {AGAIN}"
        ) from error


@contextmanager
def attention_of(reference: ModelConfig) -> Iterator[None]:
    """Around making a model. Raises `ModelError` for attention that is not installed, or that the model does not have."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if reference.attn_implementation is None:
            raise
        raise ModelError(f"--attn_implementation {reference.attn_implementation}: {error}") from error


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
