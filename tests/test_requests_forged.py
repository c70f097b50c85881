"""A ledger that somebody else made, or keeps other files in: it deletes nothing but its own, and never leaves its folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from signing import sign

from loramox.adapter.folder import WEIGHTS
from loramox.cli import main
from loramox.errors import AdapterError, RunError
from loramox.extras.ledger.compose import terms_of
from loramox.extras.ledger.ledger import INDEX, ROWS, _digest, read_ledger
from loramox.extras.ledger.leftovers import check_links, left_over
from loramox.extras.ledger.refresh import refresh
from loramox.extras.ledger.verify import verify

ENTRY = {
    "when": "2026-01-01T00:00:00+00:00", "rows": 1, "sha256": "0" * 64, "source": "forget.jsonl", "drop_overlap": False,
    "retain": {"source": "retain.jsonl", "rows": 1, "sha256": "0" * 64}, "columns": {}, "prompt_template": None, "alpha": 8.0,
    "on_top_of": {}, "truncation_error": 0.0, "files": {}, "revoked": None,
}  # fmt: skip


def forged(folder: Path, *entries: dict[str, Any]) -> Path:
    """A ledger with these entries, and a digest that fits: it has no key."""
    content = {"base": {"model": "m"}, "settings": {}, "entries": [ENTRY | each for each in entries]}
    (folder / "requests").mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(json.dumps(content | {"digest": _digest(content)}))
    return folder


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(
    "entry",
    [
        {"id": "../../escaped", "folder": "a"},
        {"id": "a", "folder": "../../victim"},
        {"id": "a", "folder": "b"},
        {"id": "a", "folder": "a~2/../../victim"},
        {"id": "", "folder": ""},
        {"id": "a", "folder": "a", "on_top_of": {"b": "../victim"}},
        {"id": "a", "folder": "a", "files": {"../../victim/diary.txt": "0" * 64}},
        {"id": "a", "folder": "a", "files": {"/etc/passwd": "0" * 64}},
        {"id": 3, "folder": "a"},
        {"id": "a", "folder": "a", "alpha": "8"},
        {"id": "a", "folder": "a", "files": []},
        {"id": "a", "folder": "a", "columns": {"no_such": "x"}},
        {"id": "a", "folder": "a", "retain": {}},
    ],
)
def test_an_entry_that_loramox_would_not_write_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "diary.txt").write_text("years")
    ledger = forged(tmp_path / "ledger", entry)
    before = files(tmp_path)
    with pytest.raises(RunError, match=r"ledger.json is damaged, or was changed by hand"):
        refresh(ledger)
    assert verify(ledger).faults
    assert files(tmp_path) == before


def test_requests_that_change_other_layers_are_no_sum(trained: Path, tmp_path: Path) -> None:
    whole, half = (shutil.copytree(trained / "trained" / "momentum", tmp_path / name) for name in ("whole", "half"))
    weights = load_file(half / WEIGHTS)
    save_file({key: each for key, each in weights.items() if "q_proj" not in key}, half / WEIGHTS)
    sign(half)
    for pair in ((whole, half), (half, whole)):
        with pytest.raises(AdapterError, match=f"{pair[1]} changes other layers than request 0"):
            terms_of({str(number): (folder, 1.0) for number, folder in enumerate(pair)})


def test_two_entries_of_one_name_or_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="two entries have one id"):
        read_ledger(forged(tmp_path / "x", {"id": "a", "folder": "a"}, {"id": "A", "folder": "A"}))
    assert read_ledger(forged(tmp_path / "y", {"id": "a", "folder": "a"}, {"id": "b", "folder": "b~3"})).entries


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["a pipe", "endless"])
def test_a_ledger_that_has_no_end_is_not_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / INDEX)
    with pytest.raises(RunError, match=r"ledger.json is damaged: it is not a regular file. Restore the ledger"):
        read_ledger(tmp_path)


def test_what_a_ledger_shows_is_not_obeyed_by_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\u001b[2J\u009b31m[/x]"
    ledger = forged(
        tmp_path / "ledger", {"id": "a", "folder": "a", "when": hostile, "revoked": hostile, "source": hostile}
    )
    content = json.loads((ledger / INDEX).read_text()) | {"base": {"model": hostile}, "settings": {"r": hostile}}
    del content["digest"]
    (ledger / INDEX).write_text(json.dumps(content | {"digest": _digest(content)}))
    main(["requests", "list", str(ledger)])
    main(["requests", "show", str(ledger), "a"])
    assert not set("\u001b\u009b") & set(capsys.readouterr().out)


def a_backup(requests: Path, whole: Path) -> None:
    (requests / "backup").mkdir()
    (requests / "backup" / "thesis.txt").write_text("years")


def a_copy_with_more_in_it(requests: Path, whole: Path) -> None:
    shutil.copytree(whole, requests / "b")
    (requests / "b" / "thesis.txt").write_text("years")


def a_copy_with_a_folder(requests: Path, whole: Path) -> None:
    shutil.copytree(whole, requests / "b")
    (requests / "b" / "run.json").unlink(missing_ok=True)
    (requests / "b" / "run.json").mkdir()


def hidden(requests: Path, whole: Path) -> None:
    (requests / ".cache").mkdir()
    (requests / ".cache.partial").mkdir()
    (requests / ".cache.partial" / "thesis.txt").write_text("years")


def a_link(requests: Path, whole: Path) -> None:
    shutil.copytree(whole, requests.parent.parent / "elsewhere")
    (requests / "b").symlink_to(requests.parent.parent / "elsewhere")


def rows_alone(requests: Path, whole: Path) -> None:
    (requests / "b").mkdir()
    (requests / "b" / ROWS).write_text("{}")


def in_staging(requests: Path, whole: Path) -> None:
    (requests.parent / "staging" / "mine").mkdir(parents=True)
    (requests.parent / "staging" / "mine" / "thesis.txt").write_text("years")


@pytest.mark.parametrize(
    "put", [a_backup, a_copy_with_more_in_it, a_copy_with_a_folder, hidden, a_link, rows_alone, in_staging]
)
def test_what_somebody_else_put_into_a_ledger_is_not_taken_for_a_kills_remains(
    put: Callable[[Path, Path], None], trained: Path, tmp_path: Path
) -> None:
    ledger = forged(tmp_path / "ledger")
    put(ledger / "requests", trained / "trained" / "momentum")
    assert left_over(read_ledger(ledger)) == []
    before = files(tmp_path)
    refresh(ledger)
    assert files(tmp_path) - before <= {ledger / ".lock"}
    assert before <= files(tmp_path)


def test_a_request_that_no_entry_names_is_a_kills_remains(trained: Path, tmp_path: Path) -> None:
    ledger = forged(tmp_path / "ledger")
    shutil.copytree(trained / "trained" / "momentum", ledger / "requests" / "b~2")
    assert left_over(read_ledger(ledger)) == [ledger / "requests" / "b~2"]


@pytest.mark.parametrize("name", ["requests", "staging"])
def test_nothing_is_deleted_through_a_link(name: str, trained: Path, tmp_path: Path) -> None:
    ledger, disk = forged(tmp_path / "ledger"), tmp_path / "disk"
    (ledger / "requests").rmdir()
    shutil.copytree(trained / "trained" / "momentum", disk / "b")
    (ledger / name).symlink_to(disk)
    before = files(tmp_path)
    assert left_over(read_ledger(ledger)) == []
    with pytest.raises(RunError, match=rf"{name} is a link, and a ledger deletes nothing through links"):
        refresh(ledger)
    with pytest.raises(RunError, match="is a link"):
        check_links(ledger)
    assert files(tmp_path) == before
