"""Files that are either written whole or not at all, whatever happens in between."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path it yields (file or folder); only when the block ends well does that become `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    try:
        yield partial
        if path.is_dir() and partial.is_dir():
            # A folder cannot take the place of one with files in it; moved aside, the old one is still there after a kill.
            old = path.with_name(f".{path.name}.old")
            remove(old)
            os.replace(path, old)
            os.replace(partial, path)
            remove(old)
        else:
            os.replace(partial, path)
    finally:
        remove(partial)


def sha256_of(path: Path) -> str:
    """Of a file of any size, read a MB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def has_files(folder: Path) -> bool:
    """Whether there is anything in a folder, besides what `replacing` leaves behind when it is killed."""
    return folder.exists() and any(not path.name.endswith(".partial") for path in folder.iterdir())


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(as_json(value, indent=2) + "\n", encoding="utf-8")


def as_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that every reader takes: infinities and NaN, which JSON has no word for, are null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
