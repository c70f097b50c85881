"""Train again the requests that were trained on top of others that were revoked later."""

import shlex
from dataclasses import replace
from pathlib import Path

from loramox.adapter.provenance import as_now, check_base
from loramox.data.encode import Tokenisation
from loramox.data.row import fingerprint
from loramox.data.rows import Columns, Data, read_rows
from loramox.errors import RowsError, RunError
from loramox.extras.ledger.entry import keep, rows_of, train_request
from loramox.extras.ledger.ledger import ROWS, Entry, Ledger, check_files, existing
from loramox.extras.ledger.leftovers import check_links, clean, discard, drop
from loramox.model.config import identify, read_config
from loramox.model.lora import ReferenceConfig
from loramox.run import read_record
from loramox.settings import of_record
from loramox.train.config import UnlearnConfig
from loramox.train.inputs import refusals_digest
from loramox.train.synthetic import AUTO


def refresh(path: str | Path, resume: bool = False, model: str | None = None) -> list[str]:
    """Train again, with the same settings and seed and in order of arrival, each request that was trained on top of revoked ones,
    or of others that this changes; return their ids. `model` is where the base model is, if it has moved.

    On a CPU they come out as they would have been, to the bit, had the revoked ones never been there. Raises a `LoramoxError` if
    the retain rows, the refusals, the base model or a file of the ledger have changed.
    """
    check_links(Path(path))
    with existing(Path(path)) as ledger:
        stale = [ledger.entry(name) for name in ledger.stale()]
        references = [_checked(ledger, entry, model) for entry in stale]
        if not resume:
            clean(ledger)
        for entry, reference in zip(stale, references, strict=True):
            _refresh(ledger, entry, reference, resume)
    return [entry.id for entry in stale]


def _checked(ledger: Ledger, entry: Entry, model: str | None) -> ReferenceConfig:
    """The reference that a request was trained on, when everything that it was trained with is as it was."""
    check_files(ledger, [entry])
    record = read_record(ledger.folder(entry))
    if as_now(record) is not record:  # the settings of loramox 0.1 mean something else in this version
        raise RunError(
            f"request {entry.id} was trained by loramox 0.1, and this version cannot train it as it was. Revoke it and add it again under another id: "
            f"loramox requests revoke {shlex.quote(str(ledger.path))} {entry.id}"
        )
    reference = of_record(ReferenceConfig, record["settings"])
    reference = replace(reference, model=model) if model else reference
    check_base({"base": ledger.base}, identify(reference, read_config(reference)), ledger.path)
    refusals, known = record["settings"]["refusals"], record["data"].get("taught", {}).get("refusals")
    if known and refusals_digest(refusals) != known:
        raise RowsError(
            f"{refusals} has other refusals than when request {entry.id} was entered, so the request cannot be trained as it was. Restore the "
            "file, or revoke the request and add it again"
        )
    if entry.retain["source"] != AUTO:  # else the reference writes them again
        retain = read_rows(entry.retain["source"], Columns(**entry.columns | {"wanted_column": None}))
        if fingerprint(retain) != entry.retain["sha256"]:
            raise RowsError(
                f"{entry.retain['source']} has changed since request {entry.id} was entered, so the request cannot be trained as it was. "
                "Restore the file, or revoke the request and add it again"
            )
    return reference


def _refresh(ledger: Ledger, entry: Entry, reference: ReferenceConfig, resume: bool) -> None:
    """Train one request again as if the revoked ones had never been there, and replace its entry."""
    before = ledger.folder(entry)
    settings = read_record(before)["settings"]
    tokenisation, args = (of_record(kind, settings) for kind in (Tokenisation, UnlearnConfig))
    args.forget_to = args.forget_to or 0  # none is recorded where the request ships as trained
    on = ledger.before(entry)
    rows = rows_of(ledger, entry)
    data = Data(str(before / ROWS), entry.retain["source"], entry.drop_overlap)
    columns = Columns(**entry.columns)
    run = train_request(ledger, entry.id, resume, reference, data, args, columns, tokenisation, on)
    entry.folder = f"{entry.id}~{int(entry.folder.partition('~')[2] or 1) + 1}"
    entry.on_top_of = {each.id: each.folder for each in on}
    keep(ledger, entry, run, rows)
    ledger.write()
    discard(before)
    drop(ledger, run)
