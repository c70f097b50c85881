"""A ledger that was killed at any point is whole, and the same command again ends as if nothing had happened; two at once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramox.extras.ledger import leftovers
from loramox.extras.ledger.ledger import Ledger
from loramox.files import remove

# One process imports everything once; each command is a child of it, so that SIGKILL really ends one at the wanted moment.
COMMANDS = """
import contextlib, io, json, os, signal, sys, time
from pathlib import Path

import rich.console, rich.table, torch, transformers.models.llama.modeling_llama
import loramox.adapter.folder, loramox.cli.requests, loramox.files
import loramox.extras.ledger.build, loramox.extras.ledger.entry, loramox.extras.ledger.requests, loramox.extras.ledger.refresh
from loramox.train.trainer import UnlearnTrainer
from loramox.extras.ledger.ledger import Ledger
from loramox.extras.ledger.verify import verify


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner, name, instead, number=1):
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        return (instead if len(calls) == number else real)(*args, **kwargs)

    setattr(owner, name, counted)


def half_a_file(tensors, path, metadata):
    path.write_bytes(b"half of a file")
    die()


def index_not_replaced(real=os.replace):
    # ledger.json's new contents are written, and have not taken its place yet.
    os.replace = lambda here, there: die() if Path(there).name == "ledger.json" else real(here, there)


def wait_in_a_step(real=UnlearnTrainer.training_step):
    def waiting(*args, **kwargs):
        Path("training").touch()
        while not Path("go").exists():
            time.sleep(0.01)
        return real(*args, **kwargs)

    UnlearnTrainer.training_step = waiting


HOW = {
    "no": lambda: None,
    "in a step": lambda: on_call(UnlearnTrainer, "training_step", die, 2),
    "while the request is kept": lambda: on_call(loramox.adapter.folder, "save_file", half_a_file, 3),
    "while its rows are copied": lambda: on_call(loramox.extras.ledger.entry, "write_rows", die),
    "before it is entered": lambda: on_call(Ledger, "write", die),
    "while it is entered": index_not_replaced,
    "before staging is cleaned": lambda: on_call(loramox.extras.ledger.requests, "drop", die),
    "before the old one is removed": lambda: on_call(loramox.extras.ledger.refresh, "discard", die),
    "while the adapter is written": lambda: on_call(loramox.adapter.folder, "save_file", half_a_file),
    "waiting": wait_in_a_step,
}


def start(how, words):
    child = os.fork()
    if not child:
        HOW[how]()
        said = io.StringIO()
        code = 0
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                loramox.cli.main(words)
        except SystemExit as stopped:
            code = stopped.code
        Path(f"said-{os.getpid()}").write_text(said.getvalue())
        os._exit(code)
    return child


def end(child, how, words):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said, ledger = Path(f"said-{child}"), Path(words[2])
    faults, left_over = verify(ledger) if (ledger / "ledger.json").exists() else ([], [])
    return {
        "how": how,
        "step": words[1],
        "code": code,
        "said": " ".join(said.read_text().split()) if said.exists() else "",
        "faults": faults,
        "left_over": [str(path) for path in left_over],
    }


torch.ones(64, 64) @ torch.ones(64, 64)  # its kernels are chosen once
ended = []
for how, words in json.loads(sys.argv[1]):
    if how == "let go":
        Path("go").touch()
        ended.append(end(waiting, how, words))
        continue
    child = start(how, words)
    if how == "waiting":
        waiting = child
        while not Path("training").exists():
            time.sleep(0.01)
    else:
        ended.append(end(child, how, words))
print("ENDED", json.dumps(ended))
"""


@pytest.fixture(scope="module")
def adding(pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory):
    """adding(ledger, name) → the command that adds request a, b or c."""
    folder = tmp_path_factory.mktemp("rows")
    records = [line for file in rows for line in file.read_text().splitlines(keepends=True)]
    for name, part in {
        "a": records[:2],
        "b": records[2:6],
        "c": records[6:8],
        "d": records[8:10],
        "retain": records[10:],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    training = {
        "model": pico("llama"),
        "quantization": "none",
        "r": 4,
        "use_cpu": "true",
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "alpha": 2,
        "eval_strategy": "no",
        "eval_on_start": "false",
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    flags = [word for key, value in training.items() for word in (f"--{key}", str(value))]

    def command(ledger: str, name: str) -> list[str]:
        data = ["--forget", str(folder / f"{name}.jsonl"), "--retain", str(folder / "retain.jsonl"), "--id", name]
        return ["requests", "add", ledger, *data, *flags]

    return command


Ledgers = tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]

IN_ADD = [
    "in a step",
    "while the request is kept",
    "while its rows are copied",
    "before it is entered",
    "while it is entered",
]
IN_REVOKE = ["before it is entered", "while it is entered"]
IN_REFRESH = ["in a step", "before it is entered", "while it is entered", "before the old one is removed"]


@pytest.fixture(scope="module")
def ledgers(adding: Callable[[str, str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Ledgers:
    """A folder with two ledgers, one left alone and one killed at every step; and what became of each command, first of these and
    then of those of several processes at once."""
    folder = tmp_path_factory.mktemp("ledgers")

    def killed(words: list[str], hows: list[str], resume: bool = False) -> list[tuple[str, list[str]]]:
        more = ["--resume"] if resume else []
        return [(how, words + more) for how in (*hows, "no")]

    def of(ledger: str) -> dict[str, list[str]]:
        steps = {"a": adding(ledger, "a"), "b": adding(ledger, "b")}
        steps["refresh"] = ["requests", "refresh", ledger]
        steps["revoke"] = ["requests", "revoke", ledger, "a"]
        steps["build"] = ["requests", "build", ledger, "--out", f"{ledger}-built"]
        return steps

    alone, other = of("alone"), of("killed")
    plan = [("no", alone[step]) for step in ("a", "b", "revoke", "refresh", "build")]
    plan += killed(other["a"], ["before it is entered"])
    plan += killed(other["b"], IN_ADD, resume=True)
    plan += killed(other["revoke"], IN_REVOKE)
    plan += killed(other["refresh"], IN_REFRESH, resume=True)
    plan += [("no", other["refresh"])]
    plan += killed(other["build"], ["while the adapter is written"])
    alone_or_killed = len(plan)
    plan += two_at_once("alone", adding)
    done = subprocess.run(
        [sys.executable, "-u", "-c", COMMANDS, json.dumps(plan)], check=True, capture_output=True, text=True, cwd=folder
    )  # fmt: skip
    ended = json.loads(done.stdout.rpartition("ENDED ")[2])
    return folder, ended[:alone_or_killed], ended[alone_or_killed:]


def two_at_once(ledger: str, adding: Callable[[str, str], list[str]]) -> list[tuple[str, list[str]]]:
    """A request that is being trained while others come; then one that is killed when it was entered already."""
    return [
        ("waiting", adding(ledger, "c")),
        ("no", adding(ledger, "d")),
        ("no", ["requests", "revoke", ledger, "b"]),
        ("no", ["requests", "refresh", ledger]),
        ("no", ["requests", "verify", ledger]),
        ("no", ["requests", "build", ledger, "--out", "built"]),
        ("let go", adding(ledger, "c")),
        ("before staging is cleaned", adding(ledger, "d")),
        ("no", adding(ledger, "d")),
        ("no", ["requests", "refresh", ledger]),
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_each_kill_really_happened_and_each_other_command_ended_well(
    ledgers: Ledgers,
) -> None:
    for ended in ledgers[1]:
        assert ended["code"] == (0 if ended["how"] == "no" else -9), ended


def test_a_killed_ledger_is_whole_at_every_point_and_what_is_left_over_is_told(
    ledgers: Ledgers,
) -> None:
    killed = ledgers[1][5:]
    assert all(ended["faults"] == [] for ended in killed)
    told = {(ended["step"], ended["how"]): ended["left_over"] for ended in killed if ended["how"] != "no"}
    assert told == {
        ("add", "in a step"): ["killed/staging/b"],
        ("add", "while the request is kept"): ["killed/requests/..b.partial.partial", "killed/staging/b"],
        ("add", "while its rows are copied"): ["killed/requests/.b.partial", "killed/staging/b"],
        ("add", "before it is entered"): ["killed/requests/b", "killed/staging/b"],
        ("add", "while it is entered"): ["killed/.ledger.json.partial", "killed/requests/b", "killed/staging/b"],
        ("revoke", "before it is entered"): [],
        ("revoke", "while it is entered"): ["killed/.ledger.json.partial"],
        ("refresh", "in a step"): ["killed/staging/b"],
        ("refresh", "before it is entered"): ["killed/requests/b~2", "killed/staging/b"],
        ("refresh", "while it is entered"): ["killed/.ledger.json.partial", "killed/requests/b~2", "killed/staging/b"],
        ("refresh", "before the old one is removed"): ["killed/requests/b", "killed/staging/b"],
        ("build", "while the adapter is written"): [],
    }
    assert killed[-1]["left_over"] == []


def test_a_ledger_killed_at_every_step_holds_and_builds_what_one_left_alone_does(
    ledgers: Ledgers,
) -> None:
    folder = ledgers[0]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "killed-built" / name).read_bytes() == (folder / "alone-built" / name).read_bytes()
    alone, killed = files(folder / "alone"), files(folder / "killed")
    alone = {name: data for name, data in alone.items() if not name.startswith(("requests/c", "requests/d"))}
    assert killed.keys() == alone.keys()
    for name, data in alone.items():
        if name.endswith((".safetensors", "adapter_config.json", "rows.jsonl")):
            assert killed[name] == data


def test_a_first_add_that_was_killed_is_begun_again_and_says_so(ledgers: Ledgers) -> None:
    killed, again = ledgers[1][5:7]
    assert (killed["how"], again["how"]) == ("before it is entered", "no")
    assert (
        "Removed what an interrupted run left (with --resume it is continued instead): killed/staging/a"
        in again["said"]
    )
    assert "instead): killed/requests/a" in again["said"]


def test_of_two_processes_at_once_one_writes_and_the_other_is_told_so_at_once(ledgers: Ledgers) -> None:
    refused, readers, waited = ledgers[2][:3], ledgers[2][3:5], ledgers[2][5]
    assert [each["step"] for each in refused] == ["add", "revoke", "refresh"]
    for each in refused:
        assert each["code"] == 2
        assert "alone is in use by process" in each["said"]
        assert each["left_over"] == ["alone/staging/c"]
    assert [(each["step"], each["code"]) for each in readers] == [("verify", 0), ("build", 0)]
    assert waited["code"] == 0
    assert "c is in force" in waited["said"]


def test_a_request_killed_when_it_was_entered_is_entered_and_what_is_left_of_it_is_removed(ledgers: Ledgers) -> None:
    killed, again, refreshed = ledgers[2][6:]
    assert (killed["how"], killed["code"], killed["faults"]) == ("before staging is cleaned", -9, [])
    assert killed["left_over"] == ["alone/staging/d"]
    assert again["code"] == 2
    assert "a request 'd' already; it is in force" in again["said"]
    assert "instead): alone/staging/d" in refreshed["said"]
    assert refreshed["left_over"] == []
    assert sorted(f.name for f in (ledgers[0] / "alone").iterdir()) == ["ledger.json", "requests"]


def test_a_run_whose_removal_was_killed_is_still_known_as_the_ledgers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for last in range(4):
        run = tmp_path / str(last) / "staging" / "b"
        for name in ("a.txt", "run.json", "trained/weights", "z.txt"):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text('{"settings": {}, "data": {}, "base": {}}')
        removed = []

        def stop(path: Path, last: int = last, removed: list[Path] = removed) -> None:
            if len(removed) == last:
                raise KeyboardInterrupt
            removed.append(path)
            remove(path)

        monkeypatch.setattr(leftovers, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            leftovers.discard(run)
        assert leftovers.left_over(Ledger(tmp_path / str(last), {}, {})) == [run]
