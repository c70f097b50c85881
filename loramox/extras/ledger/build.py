"""Build the one adapter for all requests of a ledger that are in force."""

from pathlib import Path
from typing import Any

from loramox.adapter.card import composed_card
from loramox.adapter.export import ShippingConfig, shipped_dtype
from loramox.adapter.factors import read_factors
from loramox.adapter.folder import write_adapter
from loramox.adapter.provenance import as_now, check_out
from loramox.adapter.source import served_base
from loramox.errors import RunError
from loramox.extras.ledger.compose import compose, terms_of
from loramox.extras.ledger.ledger import check_files, read_ledger
from loramox.run import command, read_record, versions


def build(
    path: str | Path, out: str | Path, shipping: ShippingConfig | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the one adapter for all requests in force, Σ −alpha_i·ΔW_i, to `out`; return its provenance.

    Exact unless `shipping.rank` is below the rank of the sum; then `truncation_error` is that of the sum, and `error` of each
    request its own (see `compose`). Requests are added up in the order of their ids, so that the order of arrival changes
    nothing.
    """
    path, out, shipping = Path(path), Path(out), shipping or ShippingConfig()
    ledger = read_ledger(path)
    entries = sorted(ledger.in_force(), key=lambda entry: entry.id)
    if not entries:
        raise RunError(f"{path} has no request in force, so there is nothing to build. Serve the base model as it is")
    if path.resolve() in (out.resolve(), *out.resolve().parents):
        raise RunError(f"--out {out} is in the ledger. Choose a folder outside it")
    ledger.check_fresh()
    check_out(out, "forget", overwrite)
    base = served_base({"base": ledger.base}, shipping.base, path)
    check_files(ledger, entries)
    first, trained = read_factors(ledger.folder(entries[0]))
    terms = terms_of({entry.id: (ledger.folder(entry), entry.alpha) for entry in entries})
    composed = compose(list(first), terms, shipping.rank)
    records = {entry.id: as_now(read_record(ledger.folder(entry))) for entry in entries}
    dtype = shipped_dtype(shipping.ship_dtype, base["dtype"])
    provenance = {
        "kind": "forget",
        "method": ", ".join(dict.fromkeys(records[entry.id]["method"] for entry in entries)),
        "alpha": max(entry.alpha for entry in entries),
        "rank": composed.rank,
        "truncation_error": composed.error,
        "dtype": str(dtype).removeprefix("torch."),
        "requests": [
            {key: getattr(e, key) for key in ("id", "alpha", "rows", "sha256", "prompt_template", "on_top_of")}
            | {"trained_error": e.truncation_error, "error": composed.errors[e.id]}
            for e in entries
        ],
        "momentum": {name: record["momentum"] for name, record in records.items()},
        "data": {e.id: {"source": e.source, "rows": e.rows, "sha256": e.sha256} for e in entries},
        "settings": ledger.settings,
        "base": base,
        "command": command(),
        "versions": versions(),
    }
    return write_adapter(out, composed.factors, trained, base, dtype, provenance, composed_card(provenance))
