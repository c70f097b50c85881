"""The ledger of requests: a folder for one base model, with the adapter and the rows of each request, and which are in force.

    LEDGER/ledger.json          base, shared settings, entries in order of arrival, and a digest over itself
    LEDGER/requests/ID/         ΔW as a plain PEFT adapter, run.json, and a copy of the rows that only the owner can read
    LEDGER/staging/ID/          a run in progress

Folders that ledger.json names are never changed in place: a new folder is made whole, then ledger.json is replaced atomically,
then folders that it no longer names are removed. A kill at any point leaves the old ledger or the new one, and something to
clean up.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

from loramox.data.rows import Columns
from loramox.errors import AdapterError, RunError
from loramox.files import locked, read_json, sha256_of, write_json

INDEX = "ledger.json"
REQUESTS = "requests"
ROWS = "rows.jsonl"  # the copy of a request's forget rows, in its folder
STAGING = "staging"
RESTORE = "Restore the ledger from a copy"

# What a request may be called, and its folder: the same, with a number behind it after a refresh.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FOLDER = re.compile(rf"{NAME.pattern}(~[0-9]{{1,9}})?")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass
class Entry:
    id: str
    folder: str  # in LEDGER/requests; another one after each refresh
    when: str  # UTC, ISO 8601
    rows: int
    sha256: str  # fingerprint of the forget rows
    source: str  # where they came from
    retain: dict[str, Any]  # source, rows and sha256: the retain rows are not copied
    drop_overlap: bool
    columns: dict[str, Any]
    prompt_template: str | None
    alpha: float
    on_top_of: dict[str, str]  # requests whose adapters were active while this one was trained, and their folders then
    truncation_error: float  # of the stored ΔW, against the momentum average
    files: dict[str, str]  # SHA-256 of each file in `folder`
    revoked: str | None = None  # when

    @property
    def in_force(self) -> bool:
        return self.revoked is None


@dataclass
class Ledger:
    path: Path
    base: dict[str, Any]
    settings: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)

    def in_force(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.in_force]

    def entry(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.id == name:
                return entry
        known = ", ".join(entry.id for entry in self.entries) or "none"
        raise RunError(f"{self.path} has no request '{name}'. It has: {known}")

    def folder(self, entry: Entry) -> Path:
        return self.path / REQUESTS / entry.folder

    def before(self, entry: Entry) -> list[Entry]:
        return [each for each in self.entries[: self.entries.index(entry)] if each.in_force]

    def stale(self) -> dict[str, list[str]]:
        """Requests in force that were trained on top of others that have changed, or will after a refresh: id → which.

        These others were revoked, or trained again since, or are stale themselves.
        """
        now = {entry.id: entry.folder for entry in self.in_force()}
        found: dict[str, list[str]] = {}
        for entry in self.in_force():  # in order of arrival: each is on top of earlier ones alone
            if gone := [name for name, folder in entry.on_top_of.items() if now.get(name) != folder or name in found]:
                found[entry.id] = gone
        return found

    def check_fresh(self) -> None:
        if stale := self.stale():
            which = "; ".join(f"{name} (on top of {', '.join(gone)})" for name, gone in stale.items())
            raise RunError(
                f"{self.path}: {which} was trained on top of requests that were revoked or trained again since. Train it again without "
                f"them: loramox requests refresh {shlex.quote(str(self.path))}"
            )

    def write(self) -> None:
        content = {
            "base": self.base,
            "settings": self.settings,
            "entries": [asdict(entry) for entry in self.entries],
        }
        write_json(self.path / INDEX, content | {"digest": _digest(content)})


@contextmanager
def existing(path: Path) -> Iterator[Ledger]:
    """The ledger at `path`, which no other process writes to within it."""
    read_ledger(path)  # before a lock is made where there is no ledger
    with locked(path):
        yield read_ledger(path)


def read_ledger(path: Path) -> Ledger:
    """Raises `RunError` when there is no ledger, or its ledger.json was changed by anything but loramox."""
    index = path / INDEX
    if not index.exists():
        raise RunError(f"{path} has no {INDEX}, so it is no ledger. `loramox requests add` makes one")
    try:
        content = read_json(index, dict)
    except RunError as error:
        raise RunError(f"{error}. {RESTORE}") from error
    try:
        digest = content.pop("digest")
        if digest != _digest(content):
            raise ValueError("its contents do not fit its digest")
        entries = [Entry(**_as_now(entry)) for entry in content["entries"]]
        _check_entries(entries)
        if not isinstance(content["base"], dict) or not isinstance(content["base"].get("model"), str):
            raise ValueError("its base is no model")
        return Ledger(path, content["base"], _as_now(content["settings"]), entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{index} is damaged, or was changed by hand: {error}. {RESTORE}") from error


def _check_entries(entries: list[Entry]) -> None:
    """Raises `ValueError` for an entry that loramox would not write: the digest has no key, so anyone can make one."""
    for entry in entries:
        for each in fields(entry):
            kind: Any = dict if get_origin(each.type) is dict else (int, float) if each.type is float else each.type
            if not isinstance(value := getattr(entry, each.name), kind):
                raise ValueError(f"{each.name} of an entry is {type(value).__name__}")
        folders = entry.on_top_of | {entry.id: entry.folder}
        for name, folder in folders.items():
            known = isinstance(folder, str) and NAME.fullmatch(name) and FOLDER.fullmatch(folder)
            if not known or folder.partition("~")[0] != name:
                raise ValueError(f"an entry has the id {name!r} and the folder {folder!r}")
        if odd := [name for name in entry.files if not FILE.fullmatch(name)]:
            raise ValueError(f"an entry has the file {odd[0]!r}")
        Columns(**entry.columns)
        if {"source", "rows", "sha256"} - entry.retain.keys():
            raise ValueError("an entry does not say which its retain rows are")
    for key in ("id", "folder"):
        if len({getattr(entry, key).lower() for entry in entries}) < len(entries):
            raise ValueError(f"two entries have one {key}")


def _as_now(record: dict[str, Any]) -> dict[str, Any]:
    """An entry or the settings of a ledger, in which loramox 0.1 called alpha `strength`."""
    return {"alpha" if name == "strength" else name: value for name, value in record.items()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): sha256_of(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def changed(ledger: Ledger, entry: Entry) -> list[str]:
    faults = []
    for name, digest in entry.files.items():
        path = ledger.folder(entry) / name
        if path.is_symlink() or not path.is_file():
            faults.append(f"{path} is missing. {RESTORE}")
        elif sha256_of(path) != digest:
            faults.append(f"{path} was changed since request {entry.id} was entered. {RESTORE}")
    return faults


def check_files(ledger: Ledger, entries: list[Entry]) -> None:
    if faults := [fault for entry in entries for fault in changed(ledger, entry)]:
        raise AdapterError(
            f"{faults[0]} ({len(faults)} such in all; `loramox requests verify` lists them). If another process is refreshing the "
            "ledger, run this again after it"
        )
