"""The files of weights in a model's folder, checked by their headers before any of them is loaded."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from loramox.errors import ModelError

LFS = b"version https://git-lfs"
AGAIN = "Download the model again, all of its files"


def check_weights(name: str) -> None:
    """Raises `ModelError` when a folder's weights are missing, cut off, incomplete or Git LFS pointers; nothing for a hub id."""
    folder = Path(name)
    if not folder.is_dir():
        return
    single, index = _single_or_index(folder)
    if single is None and index is None:
        raise ModelError(
            f"{name} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} is there. {AGAIN}"
        )
    for file, expected in ({single: set()} if single else _shards(index)).items():
        _check_file(file, expected)


def _single_or_index(folder: Path) -> tuple[Path | None, Path | None]:
    """The one file, or the index of several, that transformers loads."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():
            return folder / single, None
        if (folder / index).is_file():
            return None, folder / index
    return None, None


def _shards(index: Path) -> dict[Path, set[str]]:
    """The tensors that each file is to have."""
    _refuse_pointer(index)
    try:
        shards: dict[Path, set[str]] = {}
        for tensor, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            shards.setdefault(index.parent / file, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of weights ({error!r}). {AGAIN}") from error
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
