"""Read an untrusted adapter folder: every size is checked before anything is read, and nothing is run."""

import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loramox.adapter.streaming.shards import Entry, read_shard
from loramox.errors import AdapterError, RunError
from loramox.files import read_json

# A 70B model's adapter on every linear layer has a header of 0.2 MB, and PEFT's own config is 2 kB.
MOST_FILES = 500
MOST_JSON = 4 << 20  # the provenance of a ledger has some 600 bytes for each request
MOST_HEADER = 8 << 20
MOST_TENSORS = 20_000
LONGEST = 500  # name of a tensor

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
PICKLE_MAGIC = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
ZIP_MAGIC = b"PK\x03\x04"  # what torch.save writes since 1.6: pickles in a zip


class Refused(AdapterError):
    """Something in the folder is not read any further: `what` it is, and the `remedy`."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}. {remedy}")
        self.what, self.remedy = what, remedy


def shown(text: object, most: int = 100) -> str:
    """A stranger's text, fit for a terminal: one line, of bounded length, without control or direction characters."""
    text = str(text)[: most + 1]
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else text[:most] + "…"


def regular_files(folder: Path) -> tuple[dict[str, Path], list[Refused]]:
    """The regular files in the folder by their relative names, and what is refused: links that lead out of it, pickles,
    whatever is neither file nor folder. Links are never followed to folders."""
    files, refused, root = {}, [], folder.resolve()
    for number, path in enumerate(root.rglob("*")):
        if number == MOST_FILES:
            refused.append(Refused(f"more than {MOST_FILES} files and folders", "An adapter has two files, and a card"))
            break
        if refusal := _refusal(path, root):
            refused.append(refusal)
        elif path.is_file():
            files[path.relative_to(root).as_posix()] = path
    return files, refused


def _refusal(path: Path, root: Path) -> Refused | None:
    """Why something in the folder `root` is not read; None for a regular file without code in it, and for a folder."""
    name = shown(path.relative_to(root).as_posix())
    try:
        real = path.resolve()
        mode = real.stat().st_mode
    except (OSError, RuntimeError):  # a link to nowhere, or to itself
        return Refused(f"{name} is a link that leads nowhere", f"Delete {name}")
    if not real.is_relative_to(root):
        return Refused(
            f"{name} is a link to {shown(real)}, outside the folder",
            "Look at where it leads; if that is yours (a download of the hub is), copy it into its place: cp -L",
        )
    if stat.S_ISDIR(mode) and not path.is_symlink():
        return None
    if not stat.S_ISREG(mode):
        return Refused(f"{name} is a link to a folder, or no regular file", f"Delete {name}")
    pickled = _pickle(path)
    return Refused(f"{name} {pickled}", f"Take {name} out of the folder") if pickled else None


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


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a small file. Raises `Refused` when it is missing, no regular file, large, deep, or not JSON."""
    again = "Get the adapter again from where it was made"
    if path.is_file() and (size := path.stat().st_size) > MOST_JSON:
        raise Refused(f"{path} has {size:,} bytes, and no adapter needs more than {MOST_JSON:,}", again)
    try:
        return read_json(path, dict)
    except RunError as error:
        raise Refused(str(error), again) from error


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, from its header alone.

    safetensors itself refuses offsets that overlap, leave holes or leave the file, shapes that do not fit them, unknown types and
    deep nesting. The length of the header, which it allows to be 100 MB, is checked here. Raises `Refused`.
    """
    again = "Get the adapter again from where it was made; the file is damaged or was made to deceive"
    if not path.is_file():
        raise Refused(f"{path.name} is not there, or is no regular file", again)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, MOST_HEADER):
        raise Refused(f"{path.name} is no safetensors file: a header of {length} bytes in a file of {size}", again)
    try:
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise Refused(f"{path.name} is no safetensors file: {shown(error)}", again) from error
    if len(names) > MOST_TENSORS or max(map(len, names), default=0) > LONGEST:
        raise Refused(f"{path.name} has {len(names)} tensors, or longer names than any layer has", again)
    return {entry.name: entry for entry in read_shard(path).entries}
