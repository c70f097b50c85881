"""The command line, the public names, and the rules about a run's folder."""

import ast
import errno
import importlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import loramox
from loramox.cli import VERBS, main
from loramox.cli.arguments import say
from loramox.cli.help import typed
from loramox.cli.training import watched
from loramox.errors import LoramoxError, RunError
from loramox.files import LOCK, locked
from loramox.run import (
    RECORD,
    RunConfig,
    command,
    memory_now,
    one_writer,
    open_run,
    peak_memory,
    read_record,
    update_record,
)

HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "numpy", "yaml", "rich"}


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["loramox", *{words}]
try:
    import loramox.__main__
except SystemExit as exit:
    assert exit.code == 0
print("imported:", *sys.modules)
"""
    out = in_a_new_process(code)
    assert "usage: loramox" in out
    assert HEAVY.isdisjoint(out.rpartition("imported:")[2].split())


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [("--forget", "gone.jsonl", "gone.jsonl does not exist"), ("--holdout", "rows.txt", "rows.txt ends in '.txt'")],
)
def test_a_file_of_rows_that_cannot_be_is_refused_before_anything_heavy_is_imported(
    flag: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").touch()
    code = f"""
import sys
sys.argv = ["loramox", "evaluate", "--model", "m", {flag!r}, {name!r}, "--out", "o"]
sys.stderr = sys.stdout
try:
    import loramox.__main__
except SystemExit as exit:
    assert exit.code == 2
print("imported:", *sys.modules)
"""
    said, _, imported = in_a_new_process(code).partition("imported:")
    assert said.startswith("loramox evaluate: " + message)
    assert HEAVY.isdisjoint(imported.split())


def test_importing_loramox_imports_nothing_heavy() -> None:
    assert HEAVY.isdisjoint(in_a_new_process("import loramox, sys; print(*sys.modules)").split())


def test_training_waits_for_nothing_that_only_planning_and_evaluating_need() -> None:
    code = """
import sys
from loramox.cli.training import fitted, training_kinds
from loramox.adapter.export import ShippingConfig
import loramox.unlearning
words = "--model m --forget f.jsonl --retain r.jsonl --out o --use_cpu true"
assert len(fitted("unlearn", words.split(), (*training_kinds(), ShippingConfig))) == 7
print(*sys.modules)
"""
    imported = set(in_a_new_process(code).split())
    assert {"scipy.stats", "rouge_score", "matplotlib", "loramox.evaluate", "loramox.extras.plan.job"}.isdisjoint(
        imported
    )


def test_help_names_every_verb_with_what_it_does(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out and does in out for verb, does in VERBS.items())


@pytest.mark.parametrize("words", [[], ["forget"], ["--version-of-what"]])
def test_no_verb_or_an_unknown_one_exits_with_2(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "loramox: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unlearn", "gone.yaml"], "loramox unlearn: recipe gone.yaml cannot be read"),
        (["train", "--temprature", "1"], "did you mean --temperature?"),
        (["extrapolate", "nowhere", "--out", "o"], "loramox extrapolate: nowhere has no readable provenance.json"),
        (["extrapolate", "nowhere", "--out", "o", "--rank", "5"], "--rank 5 is not a rank that every server takes"),
    ],
)
def test_wrong_input_is_one_line_on_stderr_and_exits_with_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] == "train":
        words = [*words, "--model", "m", "--forget", "f", "--retain", "r", "--out", "o"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert message in err
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_quotes_many_lines_is_still_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "r.yaml").write_text("a: [1\n")
    with pytest.raises(SystemExit):
        main(["unlearn", str(tmp_path / "r.yaml")])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_is_not_dressed_up_as_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("loramox.cli.training.train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


def test_what_the_system_refuses_is_one_line_with_the_files_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--out", str(tmp_path / "file" / "demo")])
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"{tmp_path / 'file'}" in err
    assert "Not a directory" in err
    assert err.count("\n") == 1


def test_brackets_in_what_is_said_are_brackets_and_markup_is_ours_alone(capsys: pytest.CaptureFixture) -> None:
    say('[bold]n[red]x[/] and [/x], [a-z], {"lora": [{"id": 0}]}')
    assert capsys.readouterr().out.strip() == 'n[red]x and [/x], [a-z], {"lora": [{"id": 0}]}'


def test_an_interrupted_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loramox.cli.training.unlearn", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["unlearn"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip().endswith("The same command with --resume continues the run")


def test_what_became_of_the_rows_watched_is_said_in_one_line_if_any_were_with_what_to_do() -> None:
    log = [
        {"eval_forget_probability": 0.99, "step": 0},
        {"eval_retain_probability": 0.98, "step": 0},
        {"loss": 3.0, "step": 5},
        {"eval_forget_probability": 0.12, "step": 9},
        {"eval_retain_probability": 0.97, "step": 9},
    ]
    line = "Mean probability of the true answers, on the rows scored in training: forget 0.990 → 0.120, retain 0.980 → 0.970"
    assert watched({"log": log, "advice": []}) == [line]
    right = [
        {f"eval_{part}_tokens_right": share}
        for part, share in (("forget", 1.0), ("retain", 0.99), ("forget", 0.45), ("retain", 0.98))
    ]
    tokens = "; share of their tokens that are the first choice: forget 1.000 → 0.450, retain 0.990 → 0.980"
    assert watched({"log": [*log, *right], "advice": []}) == [line + tokens]
    assert watched({"log": log[:3], "advice": []}) == []
    # What went wrong comes after it.
    assert watched({"log": log, "advice": ["more rows"]}) == [line, "[bold]Warning:[/] more rows"]


def test_the_public_names_are_sorted_and_all_there() -> None:
    assert loramox.__all__ == sorted(set(loramox.__all__))
    for name in loramox.__all__:
        value = getattr(importlib.import_module(loramox._HOME_OF[name]), name)
        assert value.__name__ == name
        assert value.__doc__, f"{name} has no docstring"


def test_nothing_else_is_public() -> None:
    found = {n for n, v in vars(loramox).items() if not n.startswith("_") and not isinstance(v, ModuleType)}
    ours = {n for n in found if getattr(vars(loramox)[n], "__module__", "").startswith("loramox")}
    assert ours <= set(loramox.__all__)
    with pytest.raises(AttributeError, match="module 'loramox' has no attribute 'nothing'"):
        loramox.nothing  # noqa: B018


def test_importing_a_room_hides_no_public_name() -> None:
    for home in ("data", "model", "train", "adapter", "evaluate", "sweep", "unlearning"):
        importlib.import_module(f"loramox.{home}")
    assert all(callable(getattr(loramox, name)) for name in loramox.__all__)


def test_every_error_is_a_loramox_error_and_one_of_pythons_own() -> None:
    for error in vars(importlib.import_module("loramox.errors")).values():
        if isinstance(error, type) and error.__module__ == "loramox.errors" and error is not LoramoxError:
            assert issubclass(error, LoramoxError)
            assert issubclass(error, ValueError | RuntimeError | ImportError)


PLAN: dict[str, Any] = {
    "command": "loramox unlearn",
    "settings": {"r": 4, "seed": 0, "logging_steps": 5, "target_modules": ("q", "v")},
    "data": {"forget": {"source": "f.jsonl", "sha256": "1"}},
    "base": {"model": "m", "weights": "2"},
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "run"


@pytest.fixture
def held(out: Path) -> Path:
    """A folder with a run in it, and a checkpoint of that run."""
    open_run(RunConfig(str(out)), PLAN, disk_needed=0)
    (out / "trained").mkdir()
    (out / "trained" / "weights").write_text("precious")
    return out


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_its_plan_before_anything_else(out: Path) -> None:
    open_run(RunConfig(str(out)), PLAN, disk_needed=0)
    assert read_record(out) == json.loads(json.dumps({"status": "running", **PLAN}))
    assert [p.name for p in out.iterdir()] == [RECORD]


def test_an_empty_folder_may_be_used(out: Path) -> None:
    out.mkdir(parents=True)
    open_run(RunConfig(str(out)), PLAN, disk_needed=0)
    assert read_record(out)["status"] == "running"


def test_the_record_is_added_to_and_what_was_there_stays(held: Path) -> None:
    update_record(held, status="done", more=1)
    assert read_record(held) == json.loads(json.dumps({**PLAN, "status": "done", "more": 1}))


def test_a_folder_that_holds_a_run_is_refused_with_the_three_ways_on(held: Path) -> None:
    before = contents(held)
    with pytest.raises(RunError, match=r"holds a run already.*--resume.*--overwrite.*another folder"):
        open_run(RunConfig(str(held)), PLAN, disk_needed=0)
    assert contents(held) == before


FOREIGN = {
    "notes": {"notes.txt": "mine"},
    "a record of another program": {"run.json": '{"id": 3}', "notes.txt": "mine"},
    "a list of that name": {"run.json": '[{"settings": 1}]'},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "has files in it that are not a run of loramox; they are left alone. Choose another folder"),
        ({"overwrite": True}, "has files in it that are not a run of loramox; they are left alone"),
        ({"resume": True}, "--resume: .* has files but no run.json of loramox, so it is not a run. Give the folder"),
    ],
)
def test_files_that_are_no_run_are_left_alone(
    out: Path, files: dict[str, str], flags: dict[str, bool], message: str
) -> None:
    out.mkdir(parents=True)
    for name, text in files.items():
        (out / name).write_text(text)
    with pytest.raises(RunError, match=message):
        open_run(RunConfig(str(out), **flags), PLAN, disk_needed=0)
    assert contents(out) == files


def test_overwriting_deletes_the_run_that_was_there(held: Path) -> None:
    other = PLAN | {"settings": {"r": 8}}
    open_run(RunConfig(str(held), overwrite=True), other, disk_needed=0)
    assert list(contents(held)) == [RECORD]
    assert read_record(held)["settings"] == {"r": 8}


def test_overwriting_deletes_all_that_loramox_wrote_there_and_refuses_to_delete_anything_else(held: Path) -> None:
    for name in (
        "forget-adapter/provenance.json",
        "mine/summary.json",
        "scores/one/summary.json",
        "sweep/frontier.json",
        "attack/attacks.json",
    ):
        (held / name).parent.mkdir(exist_ok=True, parents=True)
        (held / name).write_text("{}")
    (held / "summary.md").write_text("## What run forgot\n\n")
    (held / ".forget-adapter.old").mkdir()  # left by a kill
    (held / f".{RECORD}.partial").touch()
    for name in ("thesis.txt", "photos/1.jpg", "film.mkv.partial", "report.html"):
        (held / name).parent.mkdir(exist_ok=True)
        (held / name).write_text("precious")
        before = contents(held)
        with pytest.raises(
            RunError, match=f"holds a run, and {held / name.split('/')[0]}, which is not of it. Move that"
        ):
            open_run(RunConfig(str(held), overwrite=True), PLAN, disk_needed=0)
        assert contents(held) == before
        (held / name).unlink()
    (held / "photos").rmdir()
    open_run(RunConfig(str(held), overwrite=True), PLAN, disk_needed=0)
    assert [path.name for path in held.iterdir()] == [RECORD]


def test_overwriting_never_deletes_what_the_new_run_reads(held: Path) -> None:
    (held / "forget.jsonl").write_text("precious")
    other = PLAN | {"data": {"forget": {"source": str(held / "forget.jsonl")}}}
    before = contents(held)
    with pytest.raises(RunError, match=r"--overwrite would delete .*forget.jsonl, which this run reads.*Move it"):
        open_run(RunConfig(str(held), overwrite=True), other, disk_needed=0)
    assert contents(held) == before


def test_overwriting_through_a_link_empties_the_folder_behind_it(held: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(held)
    open_run(RunConfig(str(tmp_path / "link"), overwrite=True), PLAN, disk_needed=0)
    assert list(contents(held)) == [RECORD]


def test_what_a_kill_left_half_written_is_no_foreign_file(out: Path) -> None:
    out.mkdir(parents=True)
    (out / f".{RECORD}.partial").write_text("{")
    open_run(RunConfig(str(out)), PLAN, disk_needed=0)
    assert read_record(out)["status"] == "running"


def test_memory_is_of_the_device_that_is_asked_of_whatever_else_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert 0 < memory_now("cpu") <= peak_memory("cpu")


def test_overwriting_what_does_not_exist_yet_starts_a_run(out: Path) -> None:
    open_run(RunConfig(str(out), overwrite=True), PLAN, disk_needed=0)
    assert read_record(out)["status"] == "running"


def test_resuming_the_same_run_changes_nothing_on_disk(held: Path) -> None:
    update_record(held, status="interrupted")
    before = contents(held)
    open_run(RunConfig(str(held), resume=True), PLAN, disk_needed=0)
    assert contents(held) == before


def test_resuming_where_nothing_is_starts_a_run(out: Path) -> None:
    open_run(RunConfig(str(out), resume=True), PLAN, disk_needed=0)
    assert read_record(out)["status"] == "running"


def test_resuming_may_change_what_is_shown_but_not_what_is_computed(held: Path) -> None:
    shown = PLAN | {"settings": PLAN["settings"] | {"logging_steps": 1}, "command": "loramox unlearn --resume"}
    open_run(RunConfig(str(held), resume=True), shown, disk_needed=0)


@pytest.mark.parametrize(
    "less",
    [
        {"activation_checkpointing": True},
        {"per_device_eval_batch_size": 4},
        {"reference_cache_gb": 0.0},
        {"torch_empty_cache_steps": 1},
    ],
)
def test_resuming_may_take_less_memory_with_the_same_result(out: Path, less: dict[str, Any]) -> None:
    before, now = (
        PLAN | {"settings": loramox.UnlearnConfig(use_cpu=True, report_to="none", **more).to_dict()}
        for more in ({}, less)
    )
    open_run(RunConfig(str(out)), before, disk_needed=0)
    open_run(RunConfig(str(out), resume=True), now, disk_needed=0)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("settings", PLAN["settings"] | {"r": 8}, "was started otherwise: settings.r was 4, is 8"),
        ("settings", PLAN["settings"] | {"new": 1}, "was started otherwise: settings.new was None, is 1"),
        ("data", {"forget": {"source": "f.jsonl", "sha256": "9"}}, "was started otherwise: data.forget was .*'1'.*'9'"),
        ("base", {"model": "m", "weights": "9"}, "was trained on another base model: base.weights was 2, is 9"),
    ],
)
def test_resuming_with_anything_else_is_refused_by_name_and_both_values(
    held: Path, part: str, value: Any, message: str
) -> None:
    before = contents(held)
    with pytest.raises(RunError, match=rf"--resume: the run in .* {message}.*start anew with --overwrite"):
        open_run(RunConfig(str(held), resume=True), PLAN | {part: value}, disk_needed=0)
    assert contents(held) == before


def test_a_run_of_0_1_is_not_resumed(held: Path) -> None:
    record = json.loads((held / "run.json").read_text())
    (held / "run.json").write_text(json.dumps(record | {"settings": record["settings"] | {"strength": 8.0}}))
    with pytest.raises(RunError, match=r"--resume: the run in .* was started by loramox 0\.1.*--overwrite"):
        open_run(RunConfig(str(held), resume=True), PLAN, disk_needed=0)


def test_resuming_and_overwriting_contradict_each_other(held: Path) -> None:
    before = contents(held)
    with pytest.raises(RunError, match="--resume and --overwrite contradict each other"):
        open_run(RunConfig(str(held), resume=True, overwrite=True), PLAN, disk_needed=0)
    assert contents(held) == before


def test_a_file_in_the_place_of_the_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"--out .*file is a file. Give a folder"), locked(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_damaged_record_is_refused_and_kept(held: Path, flags: dict[str, bool]) -> None:
    (held / RECORD).write_text('{"status": ')
    before = contents(held)
    with pytest.raises(RunError, match=r"run.json is damaged: .*Restore it, or choose another folder"):
        open_run(RunConfig(str(held), **flags), PLAN, disk_needed=0)
    assert contents(held) == before


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 MB free, wherever a folder exists."""
    usage = namedtuple("usage", "total used free")

    def disk_usage(path: Path) -> usage:
        assert path.exists()
        return usage(10**12, 10**12, 5_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


@pytest.mark.usefixtures("full_disk")
def test_too_little_disk_is_refused_before_anything_is_written(out: Path) -> None:
    with pytest.raises(RunError, match=r"5 MB are free there, and the checkpoints of this run need 6,000 MB"):
        open_run(RunConfig(str(out)), PLAN, disk_needed=6_000_000_000)
    assert not out.exists()
    open_run(RunConfig(str(out)), PLAN, disk_needed=5_000_000)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("flags", [{"overwrite": True}, {"resume": True}])
def test_a_run_that_is_refused_for_the_disk_is_left_as_it_was(held: Path, flags: dict[str, bool]) -> None:
    before = contents(held)
    with pytest.raises(RunError, match="MB are free there"):
        open_run(RunConfig(str(held), **flags), PLAN, disk_needed=5_000_001)
    assert contents(held) == before


def test_a_relative_folder_is_on_the_disk_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    open_run(RunConfig("a/b"), PLAN, disk_needed=1)
    assert read_record(tmp_path / "a" / "b")["base"]["model"] == "m"


def test_the_command_in_the_record_is_without_the_place_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/loramox", "unlearn", "--r", "4"])
    assert command() == "loramox unlearn --r 4"


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["unlearn", "--model", "my model", "--alpha", "2"], "loramox unlearn --model 'my model' --alpha 2"),
        (["train", "--hub_token", "hf_x", "--r", "4"], "loramox train --hub_token HIDDEN --r 4"),
        (["train", "--hf-token=hf_x"], "loramox train --hf-token=HIDDEN"),
        (["train", "--api_key", "hf_x", "--PASSWORD=hf_x"], "loramox train --api_key HIDDEN --PASSWORD=HIDDEN"),
        (["train", "--client_secret", "--resume"], "loramox train --client_secret --resume"),
        (["train", "--max_new_tokens", "8"], "loramox train --max_new_tokens 8"),
        (["train", "--prompt_template", "Q: {prompt}\\nA:"], "loramox train --prompt_template 'Q: {prompt}\\nA:'"),
    ],
)
def test_the_command_in_records_and_cards_can_be_pasted_and_holds_no_secret(
    words: list[str], written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/loramox", *words])
    assert command() == written
    monkeypatch.setattr(sys, "argv", ["/lib/loramox/__main__.py", *words])
    assert command() == written


def test_the_version_is_shown(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"loramox {loramox.__version__}\n"


def help_of(flag: str, verb: str, capsys: pytest.CaptureFixture) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        main([verb, flag])
    assert caught.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_help_is_short_and_in_groups_and_help_all_has_every_flag(capsys: pytest.CaptureFixture) -> None:
    short, whole = (help_of(flag, "unlearn", capsys) for flag in ("--help", "--help-all"))
    assert len(short) <= 80
    assert max(map(len, short)) <= 120
    assert [line for line in short if line.endswith(":")] == ["Data:", "Model:", "Method:", "Training:", "Output:"]
    shown = {line.split()[0] for line in short if line.startswith("  --")}
    assert {"--model", "--forget", "--retain", "--out", "--alpha", "--method", "--learning_rate"} <= shown
    assert "--adam_beta1" not in shown
    text = "\n".join(whole)
    assert all(flag in text for flag in (*shown, "--adam_beta1", "--momentum_rank"))


def test_defaults_are_shown_as_they_are_typed(capsys: pytest.CaptureFixture) -> None:
    assert [typed(v) for v in (None, False, True, 0.1, "a b\nc", ["q", "v w"])] == [
        "",
        "",
        "true",
        "0.1",
        r"'a b\nc'",
        "q 'v w'",
    ]
    lines = help_of("--help", "unlearn", capsys)
    assert any(line.startswith("  --quantization ") and line.endswith("(default: nf4)") for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_utf_8_gets_the_text_with_some_characters_replaced(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    for words, code in ((["unlearn", "--help"], 0), (["unlearn", "--help-all"], 0), (["unlearn", "漢.yaml"], 2)):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == code
    say("[bold]θ_ref[/] − alpha·ΔW → 漢")
    print("漢")
    terminal.flush()
    *_, said, printed = terminal.buffer.getvalue().decode(encoding).splitlines()
    assert said.endswith("?")
    assert "alpha" in said
    assert printed == "?"


@pytest.mark.parametrize("python", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_job_whose_reader_leaves_goes_on_to_its_end(python: list[str], tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from loramox.cli import _write_what_the_terminal_can
_write_what_the_terminal_can()
for number in range(100_000):
    print("step", number)
Path(sys.argv[1]).touch()
"""
    job = [sys.executable, *python, "-c", code, str(tmp_path / "result")]
    with subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"step 0\n"
        running.stdout.close()
        said = running.stderr.read()
    assert (running.returncode, said) == (0, b"")
    assert (tmp_path / "result").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device")
def test_what_is_printed_to_a_full_disk_is_reported() -> None:
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-c", FULL, "requests", "list", "ledger"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "loramox requests: the disk filled up. Files written before are complete. Free some space, and run the same command again\n"
    )


FULL = """
import loramox.cli.requests
loramox.cli.requests.requests = lambda words: print(words)
loramox.cli.main()
"""


def test_a_name_that_others_chose_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit), warnings.catch_warnings():
        main(["report", "\x1b[2Jfolder"])
    say("\x1b[2Jsaid")
    logging.getLogger("loramox").info("\x1b[2Jlogged")
    print(warnings.formatwarning("\x1b[2Jwarned", UserWarning, "", 0))
    seen = "".join(capsys.readouterr())
    assert "\x1b" not in seen
    assert all(f"x1b[2J{each}" in seen for each in ("folder", "said", "logged", "warned"))


# What stands unquoted in a command: words that were quoted before, and names that have no spaces.
QUOTED = {"adapter", "rows", "flag", "base", "entry.id", "frontier['unit']", "config.rule"}


def test_every_command_that_is_printed_can_be_pasted() -> None:
    verbs = "|".join(VERBS)
    bare = []
    for path in Path(loramox.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            said = ""
            for part in node.values if isinstance(node, ast.JoinedStr) else ():
                if isinstance(part, ast.FormattedValue):
                    value = ast.unparse(part.value)
                    quoted = value in QUOTED or re.match(r"((shlex\.)?(quote|join|quoted)|rows_flags)\(", value)
                    if re.search(rf"(loramox ({verbs})\b[^.,:;\n]*|--logdir )$", said) and not (
                        quoted or part.format_spec
                    ):
                        bare.append(f"{path.name}:{node.lineno}: {value}")
                said += part.value if isinstance(part, ast.Constant) else "…"
    assert bare == []


def test_the_evaluation_that_unlearn_offers_asks_the_rows_as_training_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = {
        "forget_adapter": {"alpha": 8.0, "rank": 4},
        "method": "MOX",
        "settings": {"processes": 1},
        "log": [],
        "advice": [],
    }
    monkeypatch.setattr("loramox.unlearning.unlearn", lambda *_: made)
    flags = {
        "forget": "on/forget",
        "retain": "on/retain",
        "model": "owner/name",
        "revision": "v 1",
        "drop_overlap": "true",
    }
    flags |= {"prompt_template": "Q: {prompt}\nIt's\n", "max_length": "64", "long_rows": "truncate"}
    flags |= {"prompt_column": "q", "answer_column": "a b"}
    main(["unlearn", *(word for name, value in flags.items() for word in (f"--{name}", value)), "--out", "o"])
    said = capsys.readouterr().out
    assert "--drop_overlap true" in said.partition("loramox sweep")[2]
    words = iter(shlex.split(said.partition("loramox evaluate ")[2].partition(" --out o/served")[0]))
    assert {name.removeprefix("--"): next(words) for name in words} == flags | {
        "adapter": "o/forget-adapter",
        "quantization": "none",
    }


def test_warnings_are_sentences_without_pythons_file_and_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def warns(words: list[str]) -> None:
        logging.getLogger("loramox.unlearning").info("Reading the rows")
        said = warnings.formatwarning(UserWarning("the retain set should be larger"), UserWarning, "file.py", 7)
        print(said, end="", file=sys.stderr)

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # so that it is put back
    monkeypatch.setattr("loramox.cli.training.train", warns)
    main(["train"])
    main(["train"])
    out, err = capsys.readouterr()
    assert err == "Reading the rows\nWarning: the retain set should be larger\n" * 2
    assert out == ""


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("~/m", "{home}/m"),
        ("--out=~/m", "--out={home}/m"),
        ("--out=~", "--out={home}"),
        ("a~/m", "a~/m"),
        ("--prompt_template=a=~/b", "--prompt_template=a=~/b"),
        ("--out", "--out"),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_form_of_a_path(
    written: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given: list[str] = []
    monkeypatch.setattr("loramox.cli.training.train", given.extend)
    main(["train", written])
    assert given == [taken.format(home=tmp_path)]


def test_a_full_disk_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fills(words: list[str]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for verb, again in (("train", " with --resume\n"), ("report", "the same command again\n")):
        monkeypatch.setattr("loramox.cli.training.train", fills)
        monkeypatch.setattr("loramox.cli.evaluation.report", fills)
        with pytest.raises(SystemExit) as caught:
            main([verb])
        err = capsys.readouterr().err
        assert caught.value.code == 2
        assert err.startswith(f"loramox {verb}: the disk filled up")
        assert err.endswith(again)
        assert err.count("\n") == 1


def test_a_job_holds_its_folder_and_another_is_refused_whatever_its_flags(tmp_path: Path) -> None:
    @one_writer
    def job(config: RunConfig) -> str:
        with pytest.raises(RunError, match=rf"{config.out} is in use by process {os.getpid()}"):
            pool.submit(job, replace(config, overwrite=True)).result()
        return inner(config)

    inner = one_writer(lambda config: "done")  # as train in unlearn
    with ThreadPoolExecutor(1) as pool:
        assert job(RunConfig(str(tmp_path / "out"))) == "done"
    assert not list(tmp_path.iterdir())


def test_overwriting_keeps_the_lock_and_resuming_may_save_at_other_steps(held: Path) -> None:
    with locked(held):
        open_run(RunConfig(str(held), overwrite=True), PLAN, disk_needed=0)
        assert {p.name for p in held.iterdir()} == {RECORD, LOCK}
    rarer = PLAN | {"settings": PLAN["settings"] | {"save_steps": 100, "save_strategy": "steps", "save_total_limit": 3}}
    open_run(RunConfig(str(held), resume=True), rarer, disk_needed=0)


@pytest.mark.usefixtures("full_disk")
def test_what_a_resumed_run_has_on_disk_already_is_not_asked_for_again(held: Path) -> None:
    (held / "trained" / "checkpoint-1").mkdir()
    (held / "trained" / "checkpoint-1" / "weights").write_bytes(bytes(3_000_000))
    with pytest.raises(RunError, match="5 MB are free there"):
        open_run(RunConfig(str(held), resume=True), PLAN, disk_needed=9_000_000)
    open_run(RunConfig(str(held), resume=True), PLAN, disk_needed=7_000_000)
