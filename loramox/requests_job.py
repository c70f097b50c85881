"""Requests for forgetting that come one after another, and may be revoked. Where memorize, extrapolate and ship meet.

Each request in force has its own ΔW_i, memorized on the reference model alone, so that Σ −α_i·ΔW_i is the adapter for all of
them, in any order, and leaving one out of the sum is revoking it. What ties requests together is that a later one holds the
rows of earlier ones at the reference while it is memorized (`protect`); when one of these is revoked, `refresh` memorizes the
later one again without it.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from loramox.adapter import at_rank, check_base, read_factors, read_provenance, served_rank, write_adapter
from loramox.batches import Tokenisation
from loramox.card import request_card
from loramox.errors import RowsError, RunError, SettingsError
from loramox.files import remove, replacing
from loramox.memorize import FOLDER, MemorizeConfig, memorize
from loramox.model import identify, read_config
from loramox.reference import ReferenceConfig
from loramox.rows import Columns, Data, Row, fingerprint, keep_disjoint, read_rows
from loramox.run import RECORD, RunConfig, command, read_record
from loramox.settings import of_record
from loramox.ship.ledger import (
    INDEX,
    REQUESTS,
    STAGING,
    Entry,
    Ledger,
    check_files,
    file_digests,
    is_ours,
    left_over,
    locked,
    read_ledger,
)
from loramox.ship.request_rows import ROWS, write_rows

# Settings that all requests of a ledger share: without them adapters could not be added up, or not at constant rank.
SHARED = ("r", "lora_alpha", "target_modules", "shared_subspace", "protect")
# Settings that the first request sets for later ones, which may have others.
DEFAULTS = ("model", "revision", "quantization", "dtype", "trust_remote_code", "strength")


@dataclass
class RequestConfig:
    """Which ledger, and which request in it."""

    ledger: str = field(metadata={"help": "Folder of the ledger. The first request makes it."})
    id: str | None = field(default=None, metadata={"help": "Name of the request. Default: request-1, request-2, …"})
    protect: bool = field(
        default=True,
        metadata={
            "help": "Hold rows of requests in force at the reference while this one is memorized. Revoking one of them then needs "
            "`refresh`. All requests of a ledger share this."
        },
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue an `add` that was killed, from its last checkpoint."}
    )


def add(
    request: RequestConfig,
    reference: ReferenceConfig,
    data: Data,
    args: MemorizeConfig,
    columns: Columns | None = None,
    tokenisation: Tokenisation | None = None,
) -> Entry:
    """Memorize one more request and enter it in the ledger; return its entry.

    Retain rows are held in place as ever, and so are the rows of requests in force. Raises a `LoramoxError` before the model is
    loaded: for another base or other shared settings, an id that is taken, rows that a request in force has already, retain rows
    that are among these, and for all that `memorize` refuses.
    """
    path, columns = Path(request.ledger), columns or Columns()
    if args.strength < 0:
        raise SettingsError("requests are memorized by MOX alone: --method takes mox here, or leave it out")
    if args.world_size > 1:
        raise SettingsError("requests are memorized in one process: run it without torchrun or accelerate launch")
    served_rank(reference.r)
    if not (path / INDEX).exists() and not is_ours(path):
        raise RunError(f"{path} has files in it that are no ledger's; they are left alone. Choose another folder")
    with locked(path, command()):
        ledger = _opened(path, request, reference, args)
        name = _free_id(ledger, request.id)
        rows = read_rows(data.forget, columns)
        in_force = {entry.id: _rows_of(ledger, entry) for entry in ledger.in_force()}
        retain = _checked(rows, in_force, data, columns)
        protected = in_force if request.protect else {}
        if not request.resume:
            _clean(path, left_over(path, ledger))
        run = _memorized(ledger, name, request.resume, reference, data, args, columns, tokenisation, protected)
        settings = read_record(run)["settings"]
        entry = Entry(
            id=name,
            folder=name,
            when=_now(),
            rows=len(rows),
            sha256=fingerprint(rows),
            source=data.forget,
            retain={"source": _lasting(data.retain), "rows": len(retain), "sha256": fingerprint(retain)},
            drop_overlap=data.drop_overlap,
            columns={key: value for key, value in asdict(columns).items() if value is not None},
            prompt_template=settings["prompt_template"],
            strength=args.strength,
            protects=list(protected),
            truncation_error=0.0,
            files={},
        )
        _keep(ledger, entry, run, rows)
        ledger.entries.append(entry)
        ledger.write()
        _drop(run)
    return entry


def revoke(path: str | Path, name: str) -> list[str]:
    """Mark a request as revoked, for good; return the requests in force that must be refreshed before building again."""
    with _existing(Path(path)) as ledger:
        entry = ledger.entry(name)
        if entry.in_force:
            entry.revoked = _now()
            ledger.write()
        return list(ledger.stale())


def refresh(path: str | Path, resume: bool = False) -> list[str]:
    """Memorize again, with the same settings and seed, each request that was memorized around rows of revoked ones; return them.

    On a CPU they come out as they would have been, to the bit, had the revoked ones never been there. Raises `RowsError` when
    retain rows are not what they were, `AdapterError` when the base model is not, and what `memorize` raises.
    """
    with _existing(Path(path)) as ledger:
        stale = [ledger.entry(name) for name in ledger.stale()]
        for entry in stale:
            check_files(ledger, [entry])
            reference = of_record(ReferenceConfig, read_record(ledger.folder(entry))["settings"])
            check_base({"base": ledger.base}, identify(reference, read_config(reference)), ledger.path)
            retain = read_rows(entry.retain["source"], Columns(**entry.columns | {"wanted_column": None}))
            if fingerprint(retain) != entry.retain["sha256"]:
                raise RowsError(
                    f"{entry.retain['source']} is not what it was when request {entry.id} was entered, so it cannot be memorized "
                    "as it was. Restore the file, or revoke the request and add it again"
                )
        if not resume:
            _clean(ledger.path, left_over(ledger.path, ledger))
        for entry in stale:
            _refresh(ledger, entry, resume)
    return [entry.id for entry in stale]


@contextmanager
def _existing(path: Path) -> Iterator[Ledger]:
    """The ledger at `path`, which no other process writes to within it."""
    read_ledger(path)  # before a lock is made where there is no ledger
    with locked(path, command()):
        yield read_ledger(path)


def _opened(path: Path, request: RequestConfig, reference: ReferenceConfig, args: MemorizeConfig) -> Ledger:
    """The ledger at `path`, or a new one; its base and shared settings must be those of this request."""
    base = identify(reference, read_config(reference))
    settings = asdict(reference) | {"protect": request.protect, "strength": args.strength}
    if not (path / INDEX).exists():
        return Ledger(path, base, {name: settings[name] for name in (*SHARED, *DEFAULTS)})
    ledger = read_ledger(path)
    check_base({"base": ledger.base}, base, path)
    for name in SHARED:
        if settings[name] != ledger.settings[name]:
            raise SettingsError(
                f"{name} is {settings[name]}; all requests in {path} have {ledger.settings[name]}. Leave --{name} out, or begin "
                "another ledger"
            )
    return ledger


def _free_id(ledger: Ledger, wanted: str | None) -> str:
    name = wanted or f"request-{len(ledger.entries) + 1}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise SettingsError(
            f"id is '{name}'; --id needs up to 64 letters, digits, dots, dashes or underscores, a letter or digit first"
        )
    # Folders that differ in case alone are one folder on some disks.
    taken = next((entry for entry in ledger.entries if entry.id.lower() == name.lower()), None)
    if taken:
        state = "in force" if taken.in_force else "revoked, and its id stays taken"
        raise RunError(f"{ledger.path} has a request '{taken.id}' already; it is {state}. Choose another --id")
    return name


def _rows_of(ledger: Ledger, entry: Entry) -> list[Row]:
    check_files(ledger, [entry], ROWS)
    return read_rows(str(ledger.folder(entry) / ROWS), Columns(**entry.columns))


def _checked(rows: list[Row], in_force: dict[str, list[Row]], data: Data, columns: Columns) -> list[Row]:
    """The retain rows as they are in their file, once it is known that no row is in two places."""
    retain = read_rows(data.retain, Columns(**asdict(columns) | {"wanted_column": None}))
    for name, theirs in in_force.items():
        known = {row.key() for row in theirs}
        if again := [row for row in rows if row.key() in known]:
            todo = "Remove them: they are forgotten as it is" if len(again) < len(rows) else "There is nothing to add"
            raise RowsError(
                f"{len(again)} of {len(rows)} rows of {data.forget} are in request {name} already, which is in force (first: row "
                f"{again[0].number}). {todo}"
            )
        keep_disjoint(theirs, retain, data.drop_overlap)
    return retain


def _clean(ledger: Path, found: list[Path]) -> None:
    for path in found:
        print(f"Left over from what did not finish (with --resume it would have gone on), and removed: {path}")
        remove(path)
    with suppress(OSError):  # a run is in it, or there is none
        (ledger / STAGING).rmdir()


def _drop(run: Path) -> None:
    remove(run)
    _clean(run.parent.parent, [])


def _memorized(
    ledger: Ledger,
    name: str,
    resume: bool,
    reference: ReferenceConfig,
    data: Data,
    args: MemorizeConfig,
    columns: Columns,
    tokenisation: Tokenisation | None,
    protected: dict[str, list[Row]],
) -> Path:
    """The folder, in staging, of a run that memorized the request."""
    run = ledger.path / STAGING / name
    together = [row for rows in protected.values() for row in rows]
    try:
        memorize(RunConfig(str(run), resume=resume), reference, data, args, columns, tokenisation, together)
    except RunError as error:
        raise type(error)(str(error).replace("with --overwrite", "without --resume")) from error
    return run


def _keep(ledger: Ledger, entry: Entry, run: Path, rows: list[Row]) -> None:
    """Make the request's folder, whole or not at all, of what a run left: ΔW at the rank that ships, without optimiser states.

    ΔW is the momentum average, as `extrapolate` ships it, so that a ledger of one request builds what `unlearn` would.
    """
    source = read_provenance(run / FOLDER, "memorization")
    delta, trained = read_factors(run / FOLDER / "momentum")
    fitted, entry.truncation_error = at_rank(delta, served_rank(source["settings"]["r"]))
    provenance = source | {"truncation_error": entry.truncation_error}
    with replacing(ledger.path / REQUESTS / entry.folder) as folder:
        card = request_card(provenance, entry.id)
        write_adapter(folder, fitted, trained, ledger.base, torch.float32, provenance, card)
        shutil.copy(run / RECORD, folder / RECORD)
        write_rows(folder / ROWS, rows, Columns(**entry.columns))
        entry.files = file_digests(folder)


def _refresh(ledger: Ledger, entry: Entry, resume: bool) -> None:
    """Memorize one request again as if the revoked ones had never been there, and put it in its old one's place."""
    before = ledger.folder(entry)
    settings = read_record(before)["settings"]
    reference, tokenisation, args = (
        of_record(kind, settings) for kind in (ReferenceConfig, Tokenisation, MemorizeConfig)
    )
    earlier = ledger.entries[: ledger.entries.index(entry)]
    protected = {each.id: _rows_of(ledger, each) for each in earlier if each.in_force}
    rows = _rows_of(ledger, entry)
    data = Data(str(before / ROWS), entry.retain["source"], entry.drop_overlap)
    columns = Columns(**entry.columns)
    run = _memorized(ledger, entry.id, resume, reference, data, args, columns, tokenisation, protected)
    entry.folder = f"{entry.id}~{int(entry.folder.partition('~')[2] or 1) + 1}"
    entry.protects = list(protected)
    _keep(ledger, entry, run, rows)
    ledger.write()
    remove(before)
    _drop(run)


def _lasting(source: str) -> str:
    """A path that means the same from any folder; a hub id as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
