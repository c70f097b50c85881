"""Unlearning requests that arrive over time and can be revoked.

Each request in force has its own ΔW_i; Σ −alpha_i·ΔW_i is the adapter for all of them, in any order, and revoking one leaves it
out of the sum. A later request is trained on top of those in force (`protect`), so that retain rows are held under the sum; when
one of these is revoked, `refresh` trains the later ones again without it.
"""

from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from loramox.adapter.folder import served_rank
from loramox.adapter.provenance import check_base
from loramox.data.encode import Tokenisation
from loramox.data.row import Row, also_in, fingerprint, keep_disjoint
from loramox.data.rows import Columns, Data, read_rows
from loramox.errors import RowsError, RunError, SettingsError
from loramox.extras.ledger.entry import keep, rows_of, train_request
from loramox.extras.ledger.ledger import INDEX, NAME, Entry, Ledger, existing, read_ledger
from loramox.extras.ledger.leftovers import check_links, clean, drop, is_ours
from loramox.files import locked
from loramox.model.config import identify, read_config
from loramox.model.lora import ReferenceConfig
from loramox.run import read_record
from loramox.settings import setting
from loramox.train.config import METHODS, UnlearnConfig
from loramox.train.synthetic import AUTO

# Settings that all requests of a ledger share, so that their adapters add up, in a shared subspace at constant rank.
SHARED = ("r", "lora_alpha", "target_modules", "shared_subspace", "protect")
# Settings that the first request sets for later ones, which may have others.
DEFAULTS = ("model", "revision", "quantization", "dtype", "trust_remote_code", "method", "alpha")

# Their alpha is free, and they hold retain rows and rows that are forgotten already.
LEDGER_METHODS = [
    name for name, each in METHODS.items() if each.alpha_is_free and each.settings["retain_term"] != "none"
]


@dataclass
class RequestConfig:
    """Which ledger, and which request in it."""

    ledger: str = setting("Folder of the ledger. The first request makes it.")
    id: str | None = setting("Name of the request. Default: request-1, request-2, …", None)
    protect: bool = setting(
        "Train on top of the requests in force: retain rows are held under the sum of all, and rows that are forgotten "
        "already stay forgotten. Revoking one of them then needs `refresh`. All requests of a ledger share this.",
        True,
    )
    resume: bool = setting("Continue an `add` that was killed, from its last checkpoint.", False)


def add(
    request: RequestConfig,
    reference: ReferenceConfig,
    data: Data,
    args: UnlearnConfig,
    columns: Columns | None = None,
    tokenisation: Tokenisation | None = None,
) -> Entry:
    """Train an adapter for one more request and enter it in the ledger; return its entry.

    The adapters of the requests in force are active meanwhile: retain rows are held at the reference under the sum of all, and
    rows that are forgotten already are held where they are. What is wrong with the request is raised before the model is loaded.
    """
    path, columns = Path(request.ledger), columns or Columns()
    _check_method(args, reference)
    if args.world_size > 1:
        raise SettingsError("requests are trained in one process: run it without torchrun or accelerate launch")
    served_rank(reference.r)
    if not (path / INDEX).exists() and not is_ours(path):
        raise RunError(f"{path} has files in it that belong to no ledger; they are left alone. Choose another folder")
    check_links(path)
    if args.refusals is not None:
        args.refusals = _lasting(args.refusals)  # `refresh` may be started in another folder
    with locked(path):
        ledger = _opened(path, request, reference, args)
        name = _free_id(ledger, request.id)
        rows = read_rows(data.forget, columns)
        in_force = {entry.id: rows_of(ledger, entry) for entry in ledger.in_force()}
        retain = _checked(rows, in_force, data, columns)
        if request.protect:
            ledger.check_fresh()
        on = ledger.in_force() if request.protect else []
        if not request.resume:
            clean(ledger)
        run = train_request(ledger, name, request.resume, reference, data, args, columns, tokenisation, on)
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
            alpha=args.alpha,
            on_top_of={each.id: each.folder for each in on},
            truncation_error=0.0,
            files={},
        )
        keep(ledger, entry, run, rows)
        ledger.entries.append(entry)
        ledger.write()
        drop(ledger, run)
    return entry


def revoke(path: str | Path, name: str) -> list[str]:
    """Mark a request as revoked, for good; return the requests in force that must be refreshed before building again."""
    with existing(Path(path)) as ledger:
        entry = ledger.entry(name)
        if entry.in_force:
            entry.revoked = _now()
            ledger.write()
        return list(ledger.stale())


def _check_method(args: UnlearnConfig, reference: ReferenceConfig) -> None:
    """Raises `SettingsError` for a method without alpha or retain term, and for adapters of another base."""
    for name in ("tuned_adapter", "memorize_at"):
        if getattr(reference, name) is not None:
            raise SettingsError(
                f"--{name} is of no use to a ledger, which adds up requests on --model itself. Leave it out, or run loramox unlearn"
            )
    if args.method not in LEDGER_METHODS:
        raise SettingsError(
            f"--method {args.method} does not fit a ledger, which adds up adapters −alpha·ΔW and holds rows that are forgotten already. Give "
            f"--method {', '.join(LEDGER_METHODS)}, or leave it out"
        )


def _opened(path: Path, request: RequestConfig, reference: ReferenceConfig, args: UnlearnConfig) -> Ledger:
    """The ledger at `path`, or a new one; its base and shared settings must be those of this request."""
    base = identify(reference, read_config(reference))
    settings = asdict(reference) | {"protect": request.protect, "method": args.method, "alpha": args.alpha}
    settings["lora_alpha"] = reference.lora_alpha or round(args.spec.lora_scale * reference.r)  # as `train` fills it in
    if not (path / INDEX).exists():
        return Ledger(path, base, {name: settings[name] for name in (*SHARED, *DEFAULTS)})
    ledger = read_ledger(path)
    check_base({"base": ledger.base}, base, path)
    for name in SHARED:
        if settings[name] != ledger.settings.get(name):
            raise SettingsError(
                f"{name} is {settings[name]}; all requests in {path} have {ledger.settings.get(name)}. Leave --{name} out, or begin "
                "another ledger"
            )
    return ledger


def _free_id(ledger: Ledger, wanted: str | None) -> str:
    name = wanted or f"request-{len(ledger.entries) + 1}"
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"id is '{name}'; --id needs up to 64 letters, digits, dots, dashes or underscores, a letter or digit first"
        )
    # Folders that differ in case alone are one folder on some disks.
    taken = next((entry for entry in ledger.entries if entry.id.lower() == name.lower()), None)
    if taken:
        state = "in force" if taken.in_force else "revoked, and its id stays taken"
        raise RunError(f"{ledger.path} has a request '{taken.id}' already; it is {state}. Choose another --id")
    return name


def _checked(rows: list[Row], in_force: dict[str, list[Row]], data: Data, columns: Columns) -> list[Row]:
    """The retain rows as they are in their file, after the check that no row is in two places; none of `--retain auto`."""
    retain = [] if data.retain == AUTO else read_rows(data.retain, replace(columns, wanted_column=None))
    for name, theirs in in_force.items():
        if again := also_in(rows, theirs):
            todo = "Remove them: they are forgotten already" if len(again) < len(rows) else "There is nothing to add"
            raise RowsError(
                f"{len(again)} of {len(rows)} rows of {data.forget} are in request {name} already, which is in force (first: row "
                f"{again[0].number}). {todo}"
            )
        if retain:
            keep_disjoint(theirs, retain, data.drop_overlap)
    return retain


def _lasting(source: str) -> str:
    """A path that means the same from any folder; a hub id and `auto` as they are."""
    return str(Path(source).resolve()) if source != AUTO and Path(source).exists() else source


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
