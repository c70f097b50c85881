"""requests: the ledger of unlearning requests for one base model, and one adapter for all requests in force."""

import argparse
import shlex
import sys
from pathlib import Path

from loramox.cli.arguments import USAGES, given_settings, parse, parser_of, plain_parser, run_step, say, settings_of
from loramox.cli.training import watched
from loramox.errors import escaped


def requests(words: list[str]) -> None:
    steps = {"add": _add, "list": _list, "show": _show, "revoke": _revoke, "refresh": _refresh, "build": _build, "verify": _verify}  # fmt: skip
    run_step("requests", steps, words)


def _ledger_parser(step: str, *names: str) -> argparse.ArgumentParser:
    parser = plain_parser(f"requests {step}")
    parser.add_argument("ledger", metavar="LEDGER", help="Folder of the ledger.")
    for name in names:
        parser.add_argument(name, metavar=name.upper(), help="Name of the request.")
    return parser


def _add(words: list[str]) -> None:
    from loramox.data.encode import Tokenisation
    from loramox.data.rows import Columns, Data
    from loramox.extras.ledger.ledger import REQUESTS
    from loramox.extras.ledger.requests import RequestConfig, add
    from loramox.model.lora import ReferenceConfig
    from loramox.run import read_record
    from loramox.train.config import UnlearnConfig

    kinds = (RequestConfig, ReferenceConfig, Data, UnlearnConfig, Columns, Tokenisation)
    verb, path = "requests add LEDGER", words[:1] if words and not words[0].startswith("-") else []
    words = words[len(path) :]
    first = [f"--ledger={path[0]}", *_defaults(path[0], given_settings(verb, words, *kinds))] if path else []
    request, *settings = settings_of(verb, words, *kinds, first=first)
    entry = add(request, *settings)
    record = read_record(Path(request.ledger) / REQUESTS / entry.folder)
    on_top_of = f", on top of {', '.join(entry.on_top_of)}" if entry.on_top_of else ""
    say(
        f"[bold]{entry.id}[/] is in force: {entry.rows} rows at alpha = {entry.alpha:g}{on_top_of}",
        *watched(record),
        f"[bold]{request.ledger}[/] holds a copy of these rows, which only the owner of the file can read",
        f"Next: loramox requests build {shlex.quote(request.ledger)} --out NEW_FOLDER",
    )


def _defaults(path: str, given: set[str]) -> list[str]:
    """The settings of a ledger's first request, as flags for a later one; nothing for a new ledger.

    A method that is given comes with its own default alpha.
    """
    from loramox.extras.ledger.ledger import INDEX, read_ledger

    words: list[str] = []
    settings = read_ledger(Path(path)).settings if (Path(path) / INDEX).exists() else {}
    for name, value in settings.items():
        if name == "alpha" and "method" in given:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *value]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def _list(words: list[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from loramox.extras.ledger.ledger import read_ledger

    ledger = read_ledger(Path(_ledger_parser("list").parse_args(words).ledger))
    stale = ledger.stale()
    table = Table("request", "entered", "rows", "alpha", "on top of", "state")
    for e in ledger.entries:
        state = "in force" if e.in_force else f"revoked {e.revoked}"
        state += f", to be refreshed (on top of {', '.join(stale[e.id])})" if e.id in stale else ""
        cells = (e.id, e.when, str(e.rows), f"{e.alpha:g}", ", ".join(e.on_top_of), state)
        table.add_row(*(escape(escaped(cell)) for cell in cells))
    Console().print(table)
    say(f"base {ledger.base['model']}, r = {ledger.settings['r']}; {len(ledger.in_force())} in force")


def _show(words: list[str]) -> None:
    import json
    from dataclasses import asdict

    from loramox.extras.ledger.ledger import read_ledger

    given = _ledger_parser("show", "id").parse_args(words)
    ledger = read_ledger(Path(given.ledger))
    entry = ledger.entry(given.id)
    held = {"in_force": entry.in_force, "to_refresh": ledger.stale().get(entry.id, []), "base": ledger.base}
    # In ASCII, so that a terminal obeys nothing in it.
    print(json.dumps(asdict(entry) | held | {"path": str(ledger.folder(entry))}, indent=2))


def _revoke(words: list[str]) -> None:
    from loramox.extras.ledger.requests import revoke

    given = _ledger_parser("revoke", "id").parse_args(words)
    stale = revoke(given.ledger, given.id)
    say(
        f"[bold]{given.id}[/] is revoked. Its rows and its adapter stay in {given.ledger}; adapters built before are unchanged",
        f"{', '.join(stale)} was trained on top of it. Train it again: loramox requests refresh {shlex.quote(given.ledger)}"
        if stale
        else f"The other requests do not depend on it. Next: loramox requests build {shlex.quote(given.ledger)} --out NEW_FOLDER",
    )


def _refresh(words: list[str]) -> None:
    from loramox.extras.ledger.refresh import refresh

    parser = _ledger_parser("refresh")
    parser.add_argument("--resume", action="store_true", help="Continue a refresh that was killed.")
    parser.add_argument("--model", help="Folder or hub id of the base model, if it has moved since training.")
    given = parser.parse_args(words)
    again = refresh(given.ledger, given.resume, given.model)
    say(f"Trained again: {', '.join(again)}" if again else "No request has to be refreshed")


def _build(words: list[str]) -> None:
    from loramox.adapter.export import ShippingConfig
    from loramox.extras.ledger.build import build

    parser = parser_of("requests build", (ShippingConfig,), USAGES["requests build"])
    parser.add_argument("ledger", metavar="LEDGER", help="Folder of the ledger.")
    parser.add_argument("--out", required=True, help="Folder to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the adapter in that folder.")
    shipping, given = parse(parser, words)
    made = build(given.ledger, given.out, shipping, given.overwrite)
    errors = ", ".join(f"{r['id']} {r['error']:.2g}" for r in made["requests"])
    alone = [
        f"Retain rows were held for each request alone (--protect false), not for the sum: loramox evaluate --adapter {shlex.quote(given.out)} …"
    ]
    say(
        f"[bold]{given.out}[/] is the forget adapter for all requests in force ({len(made['requests'])}), rank {made['rank']}",
        f"Truncation error: {made['truncation_error']:.2g} of ‖ΔW‖; of each request: {errors}"
        if made["truncation_error"]
        else "It is the exact sum of the requests: nothing was truncated",
        *(alone if len(made["requests"]) > 1 and not made["settings"]["protect"] else ()),
        f"Load it: PeftModel.from_pretrained(base, {given.out!r}). Its README.md shows how to switch it off, scale and merge it",
    )


def _verify(words: list[str]) -> None:
    from loramox.extras.ledger.verify import verify

    path = _ledger_parser("verify").parse_args(words).ledger
    faults, left_over = verify(Path(path))
    say(
        *(f"[bold red]changed[/] {fault}" for fault in faults),
        *(f"left over {f}: from a run that is in progress or was killed; the next add removes it" for f in left_over),
        f"{path}: {f'{len(faults)} files differ from what was entered' if faults else 'every file is as it was entered'}",
    )
    if faults:
        sys.exit(1)
