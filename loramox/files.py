"""Write files completely or not at all, read JSON with care, and lock a folder for one process."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loramox.errors import LoramoxError, RunError

LARGEST_JSON = 256 << 20  # bytes; our own files are far smaller, and Python needs several times as many to hold it
DEEPEST_JSON = 100  # levels; our own files have fewer than 10
LOCK = ".lock"

# How libraries that do not raise `OSError` report that the disk, a quota or the largest file size is used up.
_FULL = re.compile(
    r"os error (27|28|122)\b|No space left on device|Disk quota exceeded|File too large|unexpected pos \d+ vs \d+|file write failed"
)


def read_json(path: Path | str, kind: type | None = None) -> Any:
    """Read a JSON file, of a `kind` (dict or list) if one is given.

    Raises `RunError`, which names the file, if it is missing, damaged, too large, nested too deeply, of another type, or a pipe
    or device, which is not opened.
    """
    path = Path(path)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("it is not a regular file")
        if info.st_size > LARGEST_JSON:
            raise ValueError(f"it has {info.st_size:,} bytes, and {LARGEST_JSON:,} are the most that are read")
        value = json.loads(path.read_text(encoding="utf-8"))
        if _depth(value) > DEEPEST_JSON:
            raise RecursionError
        if kind and not isinstance(value, kind):
            raise ValueError(f"expected a JSON {'object' if kind is dict else kind.__name__}")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise RunError(f"{path} is damaged: it is nested more than {DEEPEST_JSON} levels deep") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return value


def _depth(value: Any) -> int:
    """The levels of lists and objects in a JSON value. Raises `RecursionError` where Python can go no deeper."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


@contextmanager
def replacing(path: Path, private: bool = False, folder: bool = False) -> Iterator[Path]:
    """Write to the path it yields (file or folder); only when the block ends well does that become `path`.

    A `private` file holds rows: only its owner may read it (mode 0600), from its first byte on. A `folder` is made, and kept from
    other processes: `RunError` if one writes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    _refuse_held(partial, path)  # else a kill has left it
    put_back(path)
    remove(partial)
    if private:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    held = _hold(partial, path, make=True) if folder else None
    try:
        yield partial
        flush(partial)
        if path.is_dir() and partial.is_dir():
            # A folder cannot take the place of one with files in it; moved aside, the old one is still there after a kill.
            old = _moved_aside(path)
            os.replace(path, old)
            os.replace(partial, path)
            remove(old)
        else:
            os.replace(partial, path)
        with suppress(OSError):  # not every file system has it; the rename is then in the system's hands
            _fsync(path.parent)
    except BaseException:
        remove(partial)
        raise
    finally:
        if held is not None:
            os.close(held)


def _hold(folder: Path, path: Path, make: bool = False) -> int:
    """Lock a folder, made anew if `make`, until the descriptor is closed, at the latest when this process ends.

    Raises:
        RunError: another process has it; the message names `path`, which that one writes.
    """
    busy = RunError(f"{path} is being written by another process. Wait until that has ended, or choose another folder")
    try:
        if make:
            folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileExistsError, FileNotFoundError) as error:  # two processes have begun at once
        raise busy from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise busy from error
    except OSError:  # a file system without locks
        pass
    if not (folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())):
        os.close(descriptor)
        raise busy  # it was replaced before it was locked
    return descriptor


def _refuse_held(folder: Path, path: Path) -> None:
    if folder.is_dir():
        os.close(_hold(folder, path))


def put_back(path: Path) -> None:
    """Undo what a kill between the two renames of `replacing` leaves: the old folder moved aside, and none in its place.

    Raises:
        RunError: no kill has left it, but another process is between the two renames, or removes the old folder.
    """
    old = _moved_aside(path)
    if old.is_dir() and not old.is_symlink():
        for each in (_partial(path), path):
            _refuse_held(each, path)
        remove(old) if path.exists() else os.replace(old, path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _moved_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def flush(path: Path) -> None:
    """Wait until a file, or every file in a folder, is on the disk, so that a loss of power does not cut it."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            _fsync(file)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Within it no other process that asks for it writes to the folder; within itself it may be taken again.

    Raises:
        RunError: another process holds the folder, or a file has its name; the message names the folder and the process.
    """
    out = Path(out)
    if out.is_file():
        raise RunError(f"--out {out} is a file. Give a folder that does not exist yet, or an empty one")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be made: {error.strerror}. Choose another folder") from error
    path, holder = out / LOCK, ""
    with suppress(OSError):  # there is none as a rule
        holder = path.read_text(encoding="utf-8").strip()
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunError(
            f"{out} is in use by {f'process {holder}' if holder else 'another process'}. Wait until that has ended, or choose another folder"
        ) from error
    try:
        if lock.lock_counter == 1:
            path.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)  # before it is released: another process may have opened it already
            with suppress(OSError):  # it is not empty any more
                for folder in made:
                    folder.rmdir()
        lock.release()


@contextmanager
def disk_may_fill(advice: str) -> Iterator[None]:
    """Raise `RunError` with the advice for every error that means that the disk is full; pass on all others."""
    try:
        yield
    except LoramoxError:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        raise RunError(f"the disk filled up{where}. Files written before are complete. {advice}") from error


def _is_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, says that the disk, a quota or the largest file size is used up."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return bool(_FULL.search(str(error))) or _is_full(error.__cause__ or error.__context__)


def sha256_of(path: Path) -> str:
    """Of a file of any size, read a MB at a time. Raises `RunError` for a pipe or a device, which may have no end."""
    if path.exists() and not path.is_file():
        raise RunError(f"{path} is damaged: it is not a regular file. Restore it")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def empty(folder: Path) -> None:
    """Delete everything in a folder except its lock. The folder itself stays: it may be a link."""
    for path in folder.iterdir():
        if path.name != LOCK:
            remove(path)


def has_files(folder: Path) -> bool:
    """Whether there is anything in a folder, besides a lock and what `replacing` leaves behind when it is killed."""
    return folder.exists() and not all(map(is_passing, folder.iterdir()))


def is_passing(path: Path) -> bool:
    """Whether it is a lock, or what `replacing` leaves behind when it is killed: `.NAME.partial`. Others' files end so too."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".partial"))


def write_json(path: Path, value: Any, private: bool = False) -> None:
    """Write a JSON file atomically; `private` as in `replacing`."""
    with replacing(path, private) as partial:
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
