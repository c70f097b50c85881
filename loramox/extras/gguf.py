"""Convert a forget adapter to a LoRA GGUF, the file that llama.cpp and Ollama load; its scale is set at run time.

Held against llama.cpp's `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` (in llama-cpp-python 0.3.36), and run in it
by `make test-llamacpp`. The base model is converted by llama.cpp's own `convert_hf_to_gguf.py`.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from loramox.adapter.factors import read_factors
from loramox.adapter.folder import CONFIG
from loramox.adapter.untrusted import Refused, read_object, regular_files, shown
from loramox.errors import AdapterError, ModelError, RunError, SettingsError, needs
from loramox.extras.check.check import check
from loramox.extras.check.servers import OLLAMAS_OWN
from loramox.files import replacing
from loramox.model.algebra import Factors
from loramox.model.config import ModelConfig, read_config
from loramox.settings import check_choices, setting

with needs("gguf"):
    import gguf


class Family(NamedTuple):
    """How llama.cpp calls an architecture, and whether its converter reorders the rows of Q and K."""

    arch: gguf.MODEL_ARCH
    interleaves: bool


# By model_type. Mistral's weights are those of a Llama to llama.cpp.
FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, False),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, False),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, False),
}


@dataclass
class GgufConfig:
    """What is written as a LoRA GGUF, and where to."""

    adapter: str = setting("Folder of the forget adapter.")
    out: str = setting("File to write, such as forget.gguf.")
    base: str | None = setting(
        "Folder or hub id of the base model, when it is not where the adapter says. Only its config.json is read.", None
    )
    outtype: str = setting(
        "Type of the weights in it; f32, the default of llama.cpp's converter too, holds every adapter exactly.",
        "f32",
        choices=["f32", "f16"],
    )
    overwrite: bool = setting("Replace the LoRA GGUF that is at --out.", False)

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.out.endswith(".gguf"):
            raise SettingsError(f"--out {self.out} does not end in .gguf. Give a file, such as forget.gguf")


def to_gguf(
    adapter: str | Path, out: str | Path, base: str | None = None, outtype: str = "f32", overwrite: bool = False
) -> tuple[str, int]:
    """Write a plain LoRA adapter to the file `out`, whole or not at all; return the base's model_type and the number of layers.

    A layer's ΔW = s·B·A, with s = lora_alpha/r, becomes `<weight>.lora_a` [r, in] and `<weight>.lora_b` [out, r] = s·B under
    llama.cpp's name of the weight, and adapter.lora.alpha = r: the scale given at run time is a multiple of what was shipped. For
    Llama and Mistral the rows of B of Q and K are `interleaved`, as those of the base's weights are.

    The adapter may be a stranger's: it is read as `check` reads it, and refused if that stops it for llama.cpp.
    """
    GgufConfig(str(adapter), str(out), base, outtype, overwrite)  # refuses wrong values
    adapter, out = Path(adapter), Path(out)
    _check_out(out, overwrite)
    config = _base_config(adapter, base)
    factors, _ = read_factors(adapter)
    tensors = dict(_tensors(factors, config))
    if outtype == "f16":
        tensors = {name: _half(name, tensor) for name, tensor in tensors.items()}
    try:
        with replacing(out) as partial:
            _write(partial, FAMILIES[config.model_type].arch, next(iter(factors.values())).rank, tensors)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error}. Free some space, or choose another place") from error
    return config.model_type, len(factors)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows [heads·d, n] of Q or K in llama.cpp's order: row i of the first half of each head, then row i of the second.

    Rotary embeddings turn pairs of rows by one angle: i and i + d/2 in transformers, 2i and 2i + 1 in llama.cpp's Llama.
    As (P·B)·A = P·(B·A), reordering the rows of B reorders those of ΔW.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def for_ollama(model_type: str, out: str | Path) -> str:
    """How Ollama takes the LoRA GGUF at `out`: a Modelfile, to lie beside it and the base's. Ollama has no scale but 1."""
    if model_type in OLLAMAS_OWN:
        return f"Ollama takes no adapters on {model_type} models: merge it (loramox ship merge), and convert the merged model"
    return f"Ollama, with this Modelfile: ollama create forget -f Modelfile\n    FROM ./base.gguf\n    ADAPTER ./{Path(out).name}"


def _check_out(out: Path, overwrite: bool) -> None:
    """Nothing but a LoRA GGUF is ever overwritten: a base model's may be beside it."""
    if out.is_symlink() or out.is_dir():
        raise RunError(f"--out {out} is a folder or a link. Give a file that does not exist yet, such as forget.gguf")
    if not out.exists():
        return
    if not _is_adapter(out):
        raise RunError(f"--out {out} is there already, and is no LoRA GGUF. Choose another name")
    if not overwrite:
        raise RunError(f"--out {out} is a LoRA GGUF already. Replace it with --overwrite, or choose another name")


def _is_adapter(path: Path) -> bool:
    try:
        kind = gguf.GGUFReader(path).get_field(gguf.Keys.General.TYPE)
        return kind is not None and kind.contents() == gguf.GGUFType.ADAPTER
    except Exception:  # whatever comes of reading what is no GGUF
        return False


def _base_config(adapter: Path, given: str | None) -> PretrainedConfig:
    """The config of the base model, by which the adapter was checked."""
    settings = _settings(adapter)
    named = settings.get("base_model_name_or_path")
    base = given or (named if isinstance(named, str) else None)
    needed = "Its config.json is needed, for its layers and heads: give --base FOLDER_OR_HUB_ID"
    try:
        stops = [each for each in check(adapter, base, ("llama.cpp",)) if each.verdict == "stop"]
    except ModelError as error:
        raise ModelError(f"{error}. {needed}") from error
    if stops:
        why = "; ".join(f"{stop.what}. {stop.remedy}" for stop in stops)
        raise AdapterError(f"{shown(adapter)} would not load in llama.cpp: {why}")
    if base is None:
        raise ModelError(f"{shown(adapter)} does not name its base model. {needed}")
    return read_config(ModelConfig(base, settings.get("revision") if base == named else None, "none"))


def _settings(adapter: Path) -> dict[str, Any]:
    """adapter_config.json; nothing where it cannot be read, of which `check` says why."""
    try:
        files = regular_files(adapter)[0] if adapter.is_dir() else {}
        return read_object(files[CONFIG]) if CONFIG in files else {}
    except Refused:
        return {}


def _tensors(factors: dict[str, Factors], config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Every layer's A and B by their names in the GGUF. Raises `AdapterError` for a layer that llama.cpp has no name for."""
    family = FAMILIES[config.model_type]
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for layer, (A, B) in factors.items():
        weight, part = names.get_name(layer), layer.rpartition(".")[2]
        if weight is None:
            raise AdapterError(
                f"the adapter changes {shown(layer)}, and llama.cpp has no such layer in a {config.model_type} model of "
                f"{config.num_hidden_layers} layers. Give the base that it was made for (--base)"
            )
        yield f"{weight}.weight.lora_a", A
        yield f"{weight}.weight.lora_b", interleaved(B, heads[part]) if family.interleaves and part in heads else B


def _half(name: str, tensor: Tensor) -> Tensor:
    """`tensor` in fp16. Raises `AdapterError` when a value overflows, or one that is not 0 becomes 0."""
    half = tensor.half()
    if not torch.isfinite(half).all() or ((half == 0) & (tensor != 0)).any():
        raise AdapterError(f"{name} has values that are too large or too small for f16. Write it with --outtype f32")
    return half


def _write(path: Path, arch: gguf.MODEL_ARCH, rank: int, tensors: dict[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, rank)  # an alpha of 0 means none to llama.cpp, and so a scale of 1
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
