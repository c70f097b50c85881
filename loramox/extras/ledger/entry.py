"""One request of a ledger: train its ΔW on top of those in force, and keep the result. Used by `add` and `refresh`."""

import shutil
from pathlib import Path

import torch

from loramox.adapter.card import request_card
from loramox.adapter.factors import read_factors
from loramox.adapter.folder import SERVED_RANKS, at_rank, served_rank, write_adapter
from loramox.adapter.provenance import read_provenance
from loramox.data.encode import Tokenisation
from loramox.data.row import Row, fingerprint
from loramox.data.rows import Columns, Data, read_rows, write_rows
from loramox.errors import RowsError, RunError
from loramox.extras.ledger.compose import terms_of, total_within
from loramox.extras.ledger.ledger import REQUESTS, ROWS, STAGING, Entry, Ledger, check_files, file_digests
from loramox.files import replacing
from loramox.model.lora import ReferenceConfig
from loramox.run import RECORD, RunConfig, read_record
from loramox.train.config import UnlearnConfig
from loramox.train.earlier import Earlier
from loramox.train.synthetic import AUTO, GUESSES_FILE, RETAIN_FILE
from loramox.unlearning import TRAINED, train


def rows_of(ledger: Ledger, entry: Entry) -> list[Row]:
    """The copy of a request's rows, after a check that all its files are as they were entered."""
    check_files(ledger, [entry])
    return read_rows(str(ledger.folder(entry) / ROWS), Columns(**entry.columns))


def train_request(
    ledger: Ledger,
    name: str,
    resume: bool,
    reference: ReferenceConfig,
    data: Data,
    args: UnlearnConfig,
    columns: Columns,
    tokenisation: Tokenisation | None,
    on: list[Entry],
) -> Path:
    """Train ΔW of a request while the adapters of the requests in `on` are active; return the folder of the run, in staging."""
    run = ledger.path / STAGING / name
    try:
        earlier = _earlier(ledger, on)
        train(RunConfig(str(run), resume=resume), reference, data, args, columns, tokenisation, earlier)
    except RunError as error:
        raise type(error)(str(error).replace("with --overwrite", "without --resume")) from error
    return run


def _earlier(ledger: Ledger, on: list[Entry]) -> Earlier | None:
    """The rows of these requests, and the sum of their adapters."""
    if not on:
        return None
    rows = [(row, entry.prompt_template) for entry in on for row in rows_of(ledger, entry)]
    terms = terms_of({entry.id: (ledger.folder(entry), entry.alpha) for entry in on})
    layers = read_factors(ledger.folder(on[0]))[0]
    change = {layer: total_within(terms(layer).values(), SERVED_RANKS[-1]) for layer in layers}
    return Earlier([row for row, _ in rows], [template for _, template in rows], change)


def keep(ledger: Ledger, entry: Entry, run: Path, rows: list[Row]) -> None:
    """Make the request's folder from its run, whole or not at all: ΔW at the rank that ships, without optimiser states.

    ΔW is the momentum average, as `extrapolate` ships it, so that a ledger of one request builds what `unlearn` would. From the
    run the entry has the alpha that `--forget_to` chose, and what tells the rows of `--retain auto` from others.
    """
    record = read_record(run)
    entry.alpha = record["forget_to"]["at"] if "forget_to" in record else entry.alpha
    if entry.retain["source"] == AUTO:
        entry.retain |= record["generated"]["retain"]
    source = read_provenance(run / TRAINED, "trained")
    delta, trained = read_factors(run / TRAINED / "momentum")
    fitted, entry.truncation_error = at_rank(delta, served_rank(source["settings"]["r"]))
    provenance = source | {"truncation_error": entry.truncation_error}
    with replacing(ledger.path / REQUESTS / entry.folder) as folder:
        card = request_card(provenance, entry.id)
        write_adapter(folder, fitted, trained, ledger.base, torch.float32, provenance, card)
        for name in (RECORD, RETAIN_FILE, GUESSES_FILE):
            if (run / name).exists():
                with replacing(folder / name, private=True) as partial:
                    shutil.copyfile(run / name, partial)
        _copy(folder / ROWS, rows, Columns(**entry.columns))
        entry.files = file_digests(folder)


def _copy(path: Path, rows: list[Row], columns: Columns) -> None:
    """Write the rows, to keep them forgotten later and to train on them again. Raises `RowsError` if they do not read back."""
    write_rows(path, rows, columns)
    if fingerprint(read_rows(str(path), columns)) != fingerprint(rows):
        raise RowsError(
            f"the copy of {rows[0].source} does not read back as the same rows. Give them as JSON Lines of question and answer"
        )
