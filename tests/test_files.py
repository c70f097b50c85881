"""Files: read with care, written whole, private where they hold rows; folders held by one process; a disk that fills."""

import errno
import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from loramox.errors import NonFiniteLossError, RunError
from loramox.evaluate.measure import check_numbers
from loramox.evaluate.records import RECORDS, write_records
from loramox.evaluate.summary import summarise
from loramox.files import (
    LOCK,
    disk_may_fill,
    has_files,
    locked,
    put_back,
    read_json,
    remove,
    replacing,
    sha256_of,
    write_json,
)
from loramox.sweep.sweep import FRONTIER, _open

DAMAGED = {
    "cut": (b'{"a": 1, "b', "is damaged: "),
    "empty": (b"", "is damaged: "),
    "not UTF-8": (b'{"a": "\xff"}', "is damaged: "),
    "of another type": (b"[]", "is damaged: expected a JSON object"),
    "null": (b"null", "is damaged: expected a JSON object"),
    "deep": (b"[" * 100_000, "is damaged: it is nested more than 100 levels deep"),
    "a little deep": (b"[" * 200 + b"]" * 200, "is damaged: it is nested more than 100 levels deep"),
    "an endless number": (b'{"a": ' + b"9" * 5000 + b"}", "is damaged: "),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_json_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "held.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path} {message}"):
        read_json(path, dict)


def test_what_is_no_regular_file_or_too_large_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless", "."):
        with pytest.raises(RunError, match="is damaged: it is not a regular file"):
            read_json(tmp_path / name)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2 << 30)  # sparse: it takes no room
    with pytest.raises(RunError, match=r"is damaged: it has 2,147,483,648 bytes"):
        read_json(tmp_path / "large")
    with pytest.raises(RunError, match=r"gone cannot be read: No such file"):
        read_json(tmp_path / "gone")


def test_what_has_no_end_has_no_checksum(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(RunError, match=f"{name} is damaged: it is not a regular file"):
            sha256_of(tmp_path / name)


def test_a_half_written_file_of_another_program_is_a_file(tmp_path: Path) -> None:
    (tmp_path / f".{FRONTIER}.partial").touch()
    assert not has_files(tmp_path)  # a kill left it
    (tmp_path / "film.mkv.partial").touch()
    assert has_files(tmp_path)


def test_json_that_is_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, {"b": None}], "nan": float("nan")})
    assert read_json(tmp_path / "a.json", dict) == {"é": [1, {"b": None}], "nan": None}


def test_a_private_file_is_its_owners_alone_while_it_is_written_and_after(tmp_path: Path) -> None:
    write_json(tmp_path / "open.json", 1)
    path = tmp_path / "rows.json"
    for before in (None, "public"):
        if before:
            path.write_text(before)
            path.chmod(0o644)
        with replacing(path, private=True) as partial:
            assert stat.S_IMODE(partial.stat().st_mode) == 0o600
            partial.write_text("row")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_text() == "row"
        path.unlink()
    write_json(path, ["row"], private=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "open.json").stat().st_mode) != 0o600


def test_a_kill_between_the_two_renames_of_a_folder_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "weights").write_text("old")
    os.replace(out, tmp_path / ".out.old")
    put_back(out)
    assert (out / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    os.replace(out, tmp_path / ".out.old")
    with replacing(out) as partial:  # and by the next write
        assert (out / "weights").read_text() == "old"
        partial.mkdir()
        (partial / "weights").write_text("new")
    assert (out / "weights").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    # A kill after both renames leaves the old one beside the new.
    (tmp_path / ".out.old").mkdir()
    put_back(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


HOLDS = """
import sys, time
from pathlib import Path
from loramox.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_that_ends_however_it_ends(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # being refused changes nothing
            with pytest.raises(RunError, match=rf"^{out} is in use by process {holder.pid}\. Wait"), locked(out):
                pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (out / LOCK).exists()
    assert not has_files(out)  # a lock that a kill left is nobody's file
    with locked(out), locked(out):
        assert (out / LOCK).read_text() == f"{os.getpid()}\n"
        (out / "result").touch()
    assert [p.name for p in out.iterdir()] == ["result"]


def test_a_folder_is_written_by_one_process_at_a_time_and_by_the_next_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holds = HOLDS.replace("locked(Path(sys.argv[1]))", "replacing(Path(sys.argv[1]), folder=True)").replace(
        "import locked", "import replacing"
    )
    holder = subprocess.Popen([sys.executable, "-c", holds, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"{out} is being written by another process. Wait"), replacing(out):
            pass
        assert (tmp_path / ".out.partial").is_dir()  # the other's, still
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with replacing(out, folder=True) as partial:
        (partial / "result").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "result"]


def test_of_two_processes_that_begin_a_folder_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial, lock = tmp_path / "out", tmp_path / ".out.partial", fcntl.flock

    def late(descriptor: int, how: int) -> None:
        remove(partial)  # the other one takes it for what a kill left, just before it is locked
        partial.mkdir()
        lock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr("loramox.files.fcntl.flock", late)
        with pytest.raises(RunError, match="out is being written by another process"), replacing(out, folder=True):
            pass
    assert partial.is_dir()  # the other's, still


def test_a_folder_is_put_back_only_after_a_kill_and_its_successor_begins_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, old, partial = (tmp_path / name for name in ("out", ".out.old", ".out.partial"))

    def remove_slowly(path: Path) -> None:
        if path == old:  # the new folder is in its place, and the old one is being removed
            with pytest.raises(RunError, match="out is being written by another process"):
                put_back(out)
            assert old.is_dir()
            partial.mkdir()  # the next process begins
        remove(path)

    out.mkdir()
    monkeypatch.setattr("loramox.files.remove", remove_slowly)
    with replacing(out, folder=True) as folder:
        (folder / "result").touch()
    assert (out / "result").exists()
    assert partial.is_dir()


def test_a_lock_leaves_no_folder_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), locked(tmp_path / "out"):
        raise ValueError("wrong")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"), locked(tmp_path / "file"):
        pass


FULL = {
    "the disk": OSError(errno.ENOSPC, "No space left on device", "run.json"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "the largest file size": OSError(errno.EFBIG, "File too large"),
    "in safetensors": ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "in torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 57408 vs 57296"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_reported_as_one_whoever_meets_it(error: Exception) -> None:
    with pytest.raises(RunError, match=r"^the disk filled up.*\. Free some"), disk_may_fill("Free some"):
        raise error


def test_other_errors_are_passed_on() -> None:
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("a bug"), RunError("no rows")):
        with pytest.raises(type(error)) as caught, disk_may_fill("Free some"):
            raise error
        assert caught.value is error


def test_a_file_that_the_disk_has_no_room_for_leaves_the_one_before(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match="the disk filled up"), disk_may_fill(""):
            write_json(tmp_path / "a.json", "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_records_are_their_owners_alone(tmp_path: Path) -> None:
    write_records(tmp_path, [], summarise([]), {})
    assert stat.S_IMODE((tmp_path / RECORDS).stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "[]", '{"status": "do', "[" * 100_000], ids=["empty", "a list", "cut", "deep"])
def test_a_damaged_frontier_or_record_of_attacks_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / FRONTIER).write_text(content)
    with pytest.raises(RunError, match=f"{tmp_path / FRONTIER} is damaged"):
        _open(tmp_path, {})
    assert (tmp_path / FRONTIER).read_text() == content


def test_scores_that_are_no_numbers_end_an_evaluation_with_the_first_row_named() -> None:
    records = [{"row": "f.jsonl, row 1", "log_p": -0.5}, {"row": "f.jsonl, row 2", "log_p": float("nan")}]
    check_numbers(records[:1])
    with pytest.raises(NonFiniteLossError, match=r"score of f.jsonl, row 2 is not a number, as of 1 of 2 rows"):
        check_numbers(records)
