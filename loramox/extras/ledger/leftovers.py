"""Files that a killed process leaves in a ledger. Found by name and contents, so that nobody else's files are ever deleted."""

import re
from contextlib import suppress
from pathlib import Path

from loramox.adapter.card import RETAIN_FILE
from loramox.adapter.folder import CARD, CONFIG, PROVENANCE, WEIGHTS
from loramox.adapter.provenance import read_provenance
from loramox.errors import LoramoxError, RunError
from loramox.extras.ledger.ledger import FOLDER, INDEX, NAME, REQUESTS, ROWS, STAGING, Ledger
from loramox.files import LOCK, remove
from loramox.run import RECORD, read_record
from loramox.train.synthetic import GUESSES_FILE

# A request's folder while it is written: `.ID.partial`, and within that `..ID.partial.partial`; `.ID.old` while it is replaced.
HALF = re.compile(rf"\.{{1,2}}{FOLDER.pattern}(\.partial){{0,2}}\.(partial|old)")
REQUEST_FILES = {CONFIG, WEIGHTS, PROVENANCE, CARD, RECORD, ROWS, RETAIN_FILE, GUESSES_FILE}


def left_over(ledger: Ledger) -> list[Path]:
    """Folders and half-written files of a process that was killed: runs in staging, requests that no entry names."""
    named = {entry.folder for entry in ledger.entries}
    found = [f for f in _folders(ledger.path / STAGING) if NAME.fullmatch(f.name) and _is_run(f)]
    found += [f for f in _folders(ledger.path / REQUESTS) if f.name not in named and _is_request(f)]
    found += ledger.path.glob(f".{INDEX}.partial")
    return sorted(found)


def clean(ledger: Ledger) -> None:
    for path in left_over(ledger):
        print(f"Removed what an interrupted run left (with --resume it is continued instead): {path}")
        discard(path)
    _remove_staging(ledger)


def drop(ledger: Ledger, run: Path) -> None:
    """Delete a run in staging whose request is entered."""
    discard(run)
    _remove_staging(ledger)


def _remove_staging(ledger: Ledger) -> None:
    with suppress(OSError):  # it has a run in it, or does not exist
        (ledger.path / STAGING).rmdir()


def discard(path: Path) -> None:
    """Delete a run, a request or a file of the ledger; last what marks it as ours, so that a kill leaves nothing unknown."""
    if path.is_dir() and not path.is_symlink():
        for each in sorted(path.iterdir(), key=lambda file: (file.name == PROVENANCE, file.name == RECORD)):
            remove(each)
    remove(path)


def check_links(path: Path) -> None:
    """Raises `RunError` when a folder in which a ledger deletes what it wrote is a link: nothing is deleted through links."""
    for name in (REQUESTS, STAGING):
        if (path / name).is_symlink():
            raise RunError(
                f"{path / name} is a link, and a ledger deletes nothing through links. Make it a folder of the ledger, or move the whole "
                "ledger to where it leads"
            )


def is_ours(path: Path) -> bool:
    """Whether a folder without ledger.json is new, or was left by a first `add` that did not finish."""
    ours = {LOCK, STAGING, REQUESTS, f".{INDEX}.partial"}
    return not path.exists() or (path.is_dir() and {f.name for f in path.iterdir()} <= ours)


def _folders(parent: Path) -> list[Path]:
    if parent.is_symlink() or not parent.is_dir():
        return []
    return [each for each in parent.iterdir() if each.is_dir() and not each.is_symlink()]


def _is_run(folder: Path) -> bool:
    """Whether it is a run of loramox, or one that was killed before its record was written, when it has hidden files at most."""
    if all(each.name.startswith(".") and each.is_file() for each in folder.iterdir()):
        return True
    try:
        return {"settings", "data", "base"} <= read_record(folder).keys()
    except (LoramoxError, OSError, AttributeError):
        return False


def _is_request(folder: Path) -> bool:
    """Whether it is the folder of a request, whole or half-written, and has nothing else in it."""
    for each in folder.iterdir():
        name = re.sub(r"^\.(.+)\.partial$", r"\1", each.name)
        if name not in REQUEST_FILES or each.is_symlink() or not each.is_file():
            return False
    if HALF.fullmatch(folder.name):
        return True
    try:
        return FOLDER.fullmatch(folder.name) is not None and bool(read_provenance(folder, "trained"))
    except LoramoxError:
        return False
