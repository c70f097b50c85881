"""Reading an adapter folder that a stranger made: every size is checked before what has it is read, and nothing is run."""

import json
import stat
import struct
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from loramox.errors import AdapterError

# A 70B model's adapter on every linear layer has a header of 0.2 MB, and PEFT's own config is 2 kB.
MOST_FILES = 1000
MOST_JSON = 4 << 20  # the provenance of a ledger has some 600 bytes for each request
MOST_HEADER = 8 << 20
MOST_TENSORS = 20_000
LONGEST = 500  # name of a tensor
DEEPEST = 32  # in JSON, and of folders
CHUNK = 1 << 20  # values that are read at a time
MAPPED = 1 << 24  # values after which the file is mapped anew

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
PICKLE_MAGIC = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
ZIP_MAGIC = b"PK\x03\x04"  # what torch.save writes since 1.6: pickles in a zip


class Refused(AdapterError):
    """Something in the folder is not read any further: `what` it is, and the `remedy`."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}. {remedy}")
        self.what, self.remedy = what, remedy


class Stored(NamedTuple):
    """A tensor as the header of a safetensors file describes it."""

    dtype: str
    shape: tuple[int, ...]


def shown(text: object, most: int = 100) -> str:
    """A stranger's text, fit for a terminal: one line, of bounded length, without control or direction characters."""
    text = str(text)[: most + 1]
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else text[:most] + "…"


def regular_files(folder: Path) -> tuple[dict[str, Path], list[Refused]]:
    """The regular files in the folder by their relative names, and what is refused: links that lead out of it, pickles,
    whatever is neither file nor folder. Links are never followed to folders."""
    files, refused, root = {}, [], folder.resolve()
    for number, path in enumerate(_walk(root)):
        if number == MOST_FILES:
            refused.append(Refused(f"more than {MOST_FILES} files and folders", "An adapter has two files, and a card"))
            break
        name = path.relative_to(root).as_posix()
        try:
            real = path.resolve()
            mode = real.stat().st_mode
        except (OSError, RuntimeError):  # a link to nowhere, or to itself
            refused.append(Refused(f"{shown(name)} is a link that leads nowhere", f"Delete {shown(name)}"))
            continue
        if not real.is_relative_to(root):
            refused.append(
                Refused(
                    f"{shown(name)} is a link to {shown(real)}, outside the folder",
                    "Look at where it leads; if that is yours (a download of the hub is), copy it into its place: cp -L",
                )
            )
        elif not stat.S_ISREG(mode):
            if path.is_symlink() or not stat.S_ISDIR(mode):
                refused.append(
                    Refused(f"{shown(name)} is a link to a folder, or no regular file", f"Delete {shown(name)}")
                )
        elif pickled := _pickle(path):
            refused.append(Refused(f"{shown(name)} {pickled}", f"Take {shown(name)} out of the folder"))
        else:
            files[name] = path
    return files, refused


def _walk(folder: Path, depth: int = 0) -> Iterator[Path]:
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            if depth == DEEPEST:
                raise Refused(f"folders lie in folders {DEEPEST} deep", "An adapter has two files, and a card")
            yield from _walk(path, depth + 1)


def _pickle(path: Path) -> str | None:
    if path.suffix.lower() in PICKLES:
        return f"is a {path.suffix.lower()} file: a pickle, which runs code when it is read"
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        return f"cannot be read ({shown(error)})"
    if start.startswith(PICKLE_MAGIC):
        return "starts as a pickle does, which runs code when it is read"
    return "is a zip, as torch.save's pickles are, which run code when they are read" if start == ZIP_MAGIC else None


def read_within(folder: Path, name: str) -> dict[str, Any]:
    """`read_object` of a file in an adapter folder. Raises `Refused`, which names the folder too."""
    try:
        return read_object(folder / name)
    except Refused as error:
        raise Refused(f"{folder}: {error.what}", error.remedy) from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a small file. Raises `Refused` when it is missing, large, deep, ambiguous, or not JSON."""
    name, size = path.name, _size(path)
    if size > MOST_JSON:
        raise Refused(f"{name} has {size} bytes", f"No adapter needs more than {MOST_JSON}: get the adapter again")
    return _object(path.read_bytes(), name)


def _size(path: Path) -> int:
    """Bytes of a regular file. Raises `Refused` for anything else, of which a pipe or a device is not even opened."""
    try:
        info = path.stat()
    except OSError as error:
        raise Refused(f"{path.name} cannot be read ({error.strerror})", "Save the adapter again") from error
    if not stat.S_ISREG(info.st_mode):
        raise Refused(f"{path.name} is no regular file", "Get the adapter again from where it was made")
    return info.st_size


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_unambiguous, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else shown(error)
        raise Refused(
            f"{name} is not plain JSON: {why}", f"Get the adapter again from where it was made; {name} is damaged"
        ) from error
    if _depth(value) > DEEPEST:
        raise Refused(f"{name} is nested more deeply than {DEEPEST}", "Get the adapter again from where it was made")
    if not isinstance(value, dict):
        raise Refused(
            f"{name} is not a JSON object", f"Get the adapter again from where it was made; {name} is damaged"
        )
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (dict, list))]:
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{shown(name)} stands in it twice, so that readers may differ")
        result[name] = value
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def read_header(path: Path) -> dict[str, Stored]:
    """Names, types and shapes of a safetensors file's tensors.

    safetensors itself refuses offsets that overlap, leave holes or leave the file, shapes that do not fit them, unknown
    types and deep nesting; the length of the header, which it allows to be 100 MB, and names that stand in it twice,
    of which it takes one, are checked here. Raises `Refused`.
    """
    again = "Get the adapter again from where it was made; the file is damaged or was made to deceive"
    size = _size(path)
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(size - 8, MOST_HEADER):
            raise Refused(f"{path.name} is no safetensors file: a header of {length} bytes in a file of {size}", again)
        header = file.read(length)
    try:
        with safe_open(path, "pt") as tensors:
            found = {}
            for name in tensors.keys():  # noqa: SIM118  (a safe_open is no mapping)
                part = tensors.get_slice(name)
                found[name] = Stored(part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise Refused(f"{path.name} is no safetensors file: {shown(error)}", again) from error
    _object(header, f"the header of {path.name}")
    if len(found) > MOST_TENSORS or max(map(len, found), default=0) > LONGEST:
        raise Refused(f"{path.name} has {len(found)} tensors, or longer names than any layer has", again)
    return found


def values(path: Path, stored: dict[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of each matrix, at most `CHUNK` of them at a time. The file is mapped anew now and then: what was read
    of a mapped file counts as memory in use until then."""
    parts = (
        (key, slice(top, top + high), slice(left, left + wide))
        for key, (_, (rows, columns)) in stored.items()
        for wide in [max(1, min(columns, CHUNK))]
        for high in [max(1, CHUNK // wide)]
        for top in range(0, rows, high)
        for left in range(0, columns, wide)
    )
    for first in parts:
        read = 0
        with safe_open(path, "pt") as tensors:
            for key, across, along in chain([first], parts):
                part = tensors.get_slice(key)[across, along]
                yield key, part
                read += part.numel()
                if read >= MAPPED:
                    break
