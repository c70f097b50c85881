"""Check the weight files in a model's folder by their headers, before any of them is loaded."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from loramox.errors import ModelError

LFS = b"version https://git-lfs"
AGAIN = "Download the model again, all of its files"


def check_weights(name: str | Path) -> list[Path]:
    """The weight files that transformers loads from a folder; none for a hub id. Raises `ModelError` unless they are whole."""
    folder = Path(name)
    if not folder.is_dir():
        return []
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():
            files = {folder / single: set()}
        elif (folder / index).is_file():
            files = _shards(folder / index)
        else:
            continue
        for file, expected in files.items():
            _check_file(file, expected)
        return sorted(files)
    raise ModelError(
        f"{folder} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} is there. {AGAIN}"
    )


def shard_names(index: Path) -> dict[str, set[str]]:
    """The files that an index names, each with the tensors that it is to have. Raises `ModelError` for what is no index."""
    _refuse_pointer(index)
    try:
        shards: dict[str, set[str]] = {}
        for tensor, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"{file} is no file of its folder")
            shards.setdefault(file, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of weights ({error!r}). {AGAIN}") from error
    return shards


def _shards(index: Path) -> dict[Path, set[str]]:
    shards = {index.parent / name: tensors for name, tensors in shard_names(index).items()}
    missing = [file.name for file in shards if not file.is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} files that {index.name} names (first: {missing[0]}). {AGAIN}"
        )
    return shards


def _check_file(file: Path, expected: set[str]) -> None:
    _refuse_pointer(file)
    if file.suffix != ".safetensors":
        return  # a pickle, which torch alone can read
    try:
        with safe_open(file, "pt") as tensors:  # compares the sizes in the header with the file's
            missing = expected - set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is no whole safetensors file: {error}. {AGAIN}") from error
    if missing:
        raise ModelError(
            f"{file} lacks {len(missing)} of the tensors that the index has in it (first: {min(missing)}). {AGAIN}"
        )


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise ModelError(
                f"{file} is a Git LFS pointer, not the file itself. Run git lfs install and git lfs pull in the model's repository, or "
                "download it with hf download"
            )
