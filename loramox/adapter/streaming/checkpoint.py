"""The base model of a merge: its files, and the tensors that belong to each layer of an adapter."""

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as SINGLE

from loramox.adapter.streaming.shards import FLOATS, Shard, read_shard
from loramox.errors import AdapterError, ModelError
from loramox.model.algebra import Factors
from loramox.model.config import ModelConfig, identify, read_config
from loramox.model.stored import check_weights, shard_names

# What is taken along beside the weights; config.json is rewritten.
BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "qwen.tiktoken", "sentencepiece.bpe.model",
    "spiece.model", "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md",
)  # fmt: skip


class Target(NamedTuple):
    """A tensor to be changed: W[rows, columns] + left·right, as it lies in the file."""

    layer: str
    factors: Factors
    transposed: bool  # GPT-2's Conv1D keeps W as [in, out]

    @property
    def shape(self) -> tuple[int, int]:
        out, into = self.factors.B.shape[0], self.factors.A.shape[1]
        return (into, out) if self.transposed else (out, into)


def base_to_merge(made_for: dict[str, Any], given: str | None, revision: str | None = None) -> ModelConfig:
    """The base model: `given` at `revision`, or where none is given, the one that the adapter was trained on (`made_for`)."""
    if not given or given == made_for["model"]:
        return ModelConfig(made_for["model"], made_for["revision"], "none")
    return ModelConfig(given, revision, "none")


def fetch(base: ModelConfig) -> tuple[Path, list[Shard]]:
    """The base's folder and shards: a local folder, or the hub's snapshot in the cache, with the files that a merge needs alone.

    Raises `ModelError` when it cannot be had, and as `read_shards` does.
    """
    folder = Path(base.model)
    if not folder.is_dir():
        folder = _snapshot(base, ["config.json", INDEX, *BESIDE])
        folder = _snapshot(base, sorted(shard_names(folder / INDEX)) if (folder / INDEX).exists() else [SINGLE])
    return folder, read_shards(folder)


def fetch_to_ship(base: ModelConfig, identity: dict[str, Any]) -> tuple[Path, list[Shard], dict[str, Any]]:
    """`fetch`, and the base's `identity`: of a model of the hub, commit and weights can be told once it is here.

    Raises `ModelError` also for a file of it, weights or other, that is a link that leads out of its folder.
    """
    folder, shards = fetch(base)
    beside(folder)
    check_inside([shard.path for shard in shards], folder)
    if folder != Path(base.model):
        here = ModelConfig(str(folder), quantization="none")
        weights = identify(here, read_config(here, flag="--base"))["weights"]
        identity = identity | {"revision": folder.name, "weights": weights}
    return folder, shards, identity


def beside(folder: Path) -> list[Path]:
    """The files of the base that are taken along beside its weights, config.json among them.

    Raises `ModelError` for one that is no regular file, or is a link that leads out of the folder: somebody else's model must not
    bring files of this machine into what is written and uploaded.
    """
    found = [path for name in ("config.json", INDEX, *BESIDE) if (path := folder / name).is_symlink() or path.exists()]
    check_inside(found, folder)
    return found


def check_inside(files: list[Path], folder: Path) -> None:
    """Raises `ModelError` for a file of the base that `leads_out` of its folder."""
    for path in files:
        if leads_out(path, folder):
            raise ModelError(
                f"{path} is a link that leads out of the model's folder, or is no file. If the file is meant, put a copy in its place (cp -L), "
                "or give another --base"
            )


def leads_out(path: Path, folder: Path) -> bool:
    """Whether what should be a file of the folder is none, or is a link to one outside of it."""
    real = path.resolve()
    return not (real.is_file() and any(real.is_relative_to(each) for each in _own(folder)))


def _own(folder: Path) -> list[Path]:
    """The folder and, of a snapshot in the hub's cache, the folder of the files that its links lead to."""
    root = folder.resolve()
    return [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]


def _snapshot(base: ModelConfig, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(base.model, revision=base.revision, allow_patterns=patterns))
    except Exception as error:  # also those of the hub's HTTP package, which differs from version to version
        raise ModelError(f"--base {base.model} cannot be had from the hub or its cache: {error}") from error


def read_shards(folder: Path) -> list[Shard]:
    """Headers of the files that `from_pretrained` would read. Raises `ModelError` when they are missing, damaged or pickles."""
    files = check_weights(folder)
    if pickles := [file for file in files if file.suffix != ".safetensors"]:
        raise ModelError(
            f"--base {folder} has no safetensors; {pickles[0].name} is a pickle, which is not read. Give a revision that has them, or save it "
            "anew: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        )
    return [read_shard(file) for file in files]


def targets(factors: dict[str, Factors], model: PreTrainedModel, adapter: Path) -> dict[str, Target]:
    """What is to be added to each layer of the adapter; `model` is the base without weights, on which PEFT would load it whole.

    Raises `AdapterError` for a layer that shares its weight with another.
    """
    modules = dict(model.named_modules())
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    found: dict[str, Target] = {}
    for layer, each in factors.items():
        module = modules[layer]
        names = shared[id(module.weight)]
        if len(names) > 1:
            raise AdapterError(
                f"{adapter} changes {layer}, whose weight is also {next(n for n in names if n != f'{layer}.weight')} (tied): merged, it "
                "would change both. Serve this adapter unmerged"
            )
        found[layer] = Target(layer, each, isinstance(module, Conv1D))
    return found


def place(wanted: dict[str, Target], shards: list[Shard], prefix: str, adapter: Path) -> dict[str, Target]:
    """The tensors to change, by their names in the files: those of the model, or without `prefix`, that of the model inside
    (GPT-2's `transformer.`). What transformers would rename or rearrange otherwise while loading is not found, and refused.

    Raises `AdapterError` for a layer of which there is no tensor, or one of another shape; `ModelError` for one that is
    not of 16- or 32-bit floats.
    """
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    found = {}
    for layer, target in wanted.items():
        candidates = (f"{layer}.weight", f"{layer.removeprefix(f'{prefix}.')}.weight")
        name = next((name for name in candidates if name in entries), None)
        if name is None:
            raise AdapterError(
                f"{adapter} changes {layer}, and the base has no tensor {' or '.join(dict.fromkeys(candidates))}: its files keep that "
                "layer under another name or in another form. Load and save it with transformers first, or serve the adapter unmerged"
            )
        entry = entries[name]
        if entry.dtype not in FLOATS:
            raise ModelError(
                f"{name} of the base is of type {entry.dtype}: merging into so few bits rounds most of ΔW away. Give the 16- or 32-bit model"
            )
        if entry.shape != target.shape:
            raise AdapterError(
                f"{adapter} changes {layer} by a ΔW of shape {list(target.shape)}, and {name} of the base is {list(entry.shape)}. "
                "Give the base that the adapter was made for"
            )
        found[name] = target
    return found
