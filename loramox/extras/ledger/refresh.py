"""Memorizing again what was memorized on top of requests that are revoked since."""

from dataclasses import replace
from pathlib import Path

from loramox.adapter.folder import check_base
from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns, Data, fingerprint, read_rows
from loramox.errors import RowsError
from loramox.extras.ledger.entry import clean, drop, existing, keep, memorized, rows_of
from loramox.extras.ledger.ledger import Entry, Ledger, check_files, left_over
from loramox.extras.ledger.rows import ROWS
from loramox.files import remove
from loramox.model.config import identify, read_config
from loramox.model.lora import ReferenceConfig
from loramox.run import read_record
from loramox.settings import of_record
from loramox.train.config import MemorizeConfig


def refresh(path: str | Path, resume: bool = False, model: str | None = None) -> list[str]:
    """Memorize again, with the same settings and seed and in order of arrival, each request that was memorized on top of revoked
    ones, or of others that this changes; return them. `model` is where the base model lies now, if it is not where it was.

    On a CPU they come out as they would have been, to the bit, had the revoked ones never been there. Raises `RowsError` when
    retain rows are not what they were, `AdapterError` when the base model is not, and what `memorize` raises.
    """
    with existing(Path(path)) as ledger:
        stale = [ledger.entry(name) for name in ledger.stale()]
        for entry in stale:
            check_files(ledger, [entry])
            reference = _reference(ledger, entry, model)
            check_base({"base": ledger.base}, identify(reference, read_config(reference)), ledger.path)
            retain = read_rows(entry.retain["source"], Columns(**entry.columns | {"wanted_column": None}))
            if fingerprint(retain) != entry.retain["sha256"]:
                raise RowsError(
                    f"{entry.retain['source']} is not what it was when request {entry.id} was entered, so it cannot be memorized "
                    "as it was. Restore the file, or revoke the request and add it again"
                )
        if not resume:
            clean(ledger.path, left_over(ledger.path, ledger))
        for entry in stale:
            _refresh(ledger, entry, resume, model)
    return [entry.id for entry in stale]


def _reference(ledger: Ledger, entry: Entry, model: str | None) -> ReferenceConfig:
    reference = of_record(ReferenceConfig, read_record(ledger.folder(entry))["settings"])
    return replace(reference, model=model) if model else reference


def _refresh(ledger: Ledger, entry: Entry, resume: bool, model: str | None) -> None:
    """Memorize one request again as if the revoked ones had never been there, and put it in its old one's place."""
    before = ledger.folder(entry)
    settings = read_record(before)["settings"]
    reference = _reference(ledger, entry, model)
    tokenisation, args = (of_record(kind, settings) for kind in (Tokenisation, MemorizeConfig))
    on = ledger.before(entry)
    rows = rows_of(ledger, entry)
    data = Data(str(before / ROWS), entry.retain["source"], entry.drop_overlap)
    columns = Columns(**entry.columns)
    run = memorized(ledger, entry.id, resume, reference, data, args, columns, tokenisation, on)
    entry.folder = f"{entry.id}~{int(entry.folder.partition('~')[2] or 1) + 1}"
    entry.on_top_of = {each.id: each.folder for each in on}
    keep(ledger, entry, run, rows)
    ledger.write()
    remove(before)
    drop(run)
