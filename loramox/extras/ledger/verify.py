"""`loramox requests verify`: compare every file of a ledger with its digest, and find leftovers of a killed process."""

from pathlib import Path
from typing import NamedTuple

from loramox.errors import RunError
from loramox.extras.ledger.ledger import INDEX, changed, read_ledger
from loramox.extras.ledger.leftovers import left_over
from loramox.files import LOCK


class Verdict(NamedTuple):
    """The findings of `verify`."""

    faults: list[str]  # files that differ from what was entered
    left_over: list[Path]  # from a process that was killed; the next `add` removes it


def verify(path: Path) -> Verdict:
    """Compare every file of the ledger with its digest in ledger.json. Raises `RunError` when there is no ledger."""
    if not (path / INDEX).exists():
        read_ledger(path)
    try:
        ledger = read_ledger(path)
    except RunError as error:
        return Verdict([str(error)], [])
    faults = [fault for entry in ledger.entries for fault in changed(ledger, entry)]
    lost = left_over(ledger)
    known = {path / INDEX, path / LOCK}
    known |= {ledger.folder(entry) / name for entry in ledger.entries for name in entry.files}
    for found in sorted(path.rglob("*")):
        inside = any(found == folder or folder in found.parents for folder in lost)
        if not inside and found not in known and (found.is_symlink() or not found.is_dir()):
            faults.append(f"{found} is not the ledger's: it was put there by something else. Remove it")
    return Verdict(faults, lost)
