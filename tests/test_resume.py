"""A run that was killed, whenever that was, goes on and ends with the same bytes as one that was not."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loramox.errors import RunError
from loramox.train.checkpoint import drop_newer, last_whole_checkpoint

# One process imports everything once; each run is a child of it, so that SIGKILL really ends one at the wanted moment.
RUNS = """
import json, os, resource, signal, sys

import loramox.adapter.folder, loramox.cli, loramox.unlearning, loramox.train.momentum
from loramox.train.momentum import Momentum
from loramox.train.trainer import UnlearnTrainer


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner, name, number, instead):
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        return (instead if len(calls) == number else real)(*args, **kwargs)

    setattr(owner, name, counted)


def half_a_file(tensors, path, metadata):
    path.write_bytes(b"half of a file")
    die()


def on_a_full_disk(self, *args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    save(self, *args)


save = UnlearnTrainer._save_optimizer_and_scheduler
KILLS = {
    "no": lambda: None,
    "in a step": lambda: on_call(UnlearnTrainer, "training_step", 2, die),
    "between weights and momentum": lambda: on_call(Momentum, "save", 2, die),
    "while momentum is written": lambda: on_call(loramox.train.momentum, "save_file", 1, half_a_file),
    "while optimizer is written": lambda: on_call(UnlearnTrainer, "_save_optimizer_and_scheduler", 1, die),
    "while results are written": lambda: on_call(loramox.train.checkpoint, "write_adapter", 2, die),
    "after the last step": lambda: on_call(loramox.train.trainer, "write_trained", 1, die),
    "between results and record": lambda: on_call(loramox.unlearning, "update_record", 1, die),
    "disk full": lambda: on_call(UnlearnTrainer, "_save_optimizer_and_scheduler", 2, on_a_full_disk),
}
flags, runs = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for kill, more in runs:
    child = os.fork()
    if not child:
        KILLS[kill]()
        try:
            loramox.cli.main(["train", *flags, *more])
        except SystemExit as exit:
            os._exit(exit.code)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ENDED", json.dumps([kill, code]), flush=True)
"""

RESULTS = ("adapter_model.safetensors", "momentum/adapter_model.safetensors")
KILLED = [
    "in a step",
    "between weights and momentum",
    "while momentum is written",
    "while optimizer is written",
    "while results are written",
    "between results and record",
]


@pytest.fixture(scope="module")
def runs(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A folder with a run that was left alone and one that was killed at six moments and resumed; and what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "model": pico("llama"),
        "forget": rows[0],
        "retain": rows[1],
        "quantization": "none",
        "r": 4,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "momentum_every": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    alone, killed = ["--out", str(folder / "alone")], ["--out", str(folder / "killed"), "--resume"]
    plan = [("no", alone), *((kill, killed) for kill in KILLED), ("no", killed), ("no", killed)]
    inside = ["--max_steps", "5"]  # an epoch is two steps
    cut = ["--out", str(folder / "cut"), "--resume", *inside]
    plan += [("no", ["--out", str(folder / "whole"), *inside]), ("after the last step", cut), ("no", cut)]
    filled = ["--out", str(folder / "filled"), "--resume"]
    plan += [("disk full", filled), ("no", [*filled, "--save_steps", "3"])]
    done = subprocess.run(
        [sys.executable, "-u", "-c", RUNS, json.dumps(flags), json.dumps(plan)],
        check=True, capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    (folder / "errors").write_text(done.stderr)
    return folder, done.stdout


def test_each_kill_really_happened_and_each_other_run_ended_well(runs: tuple[Path, str]) -> None:
    ended = [json.loads(line.removeprefix("ENDED ")) for line in runs[1].splitlines() if line.startswith("ENDED ")]
    later = [["no", 0], ["after the last step", -9], ["no", 0], ["disk full", 2], ["no", 0]]
    assert ended == [["no", 0], *([kill, -9] for kill in KILLED), ["no", 0], ["no", 0], *later]


@pytest.mark.parametrize("file", RESULTS)
def test_a_run_killed_at_six_moments_ends_with_the_same_bytes_as_one_left_alone(
    file: str, runs: tuple[Path, str]
) -> None:
    alone, killed = ((runs[0] / name / "trained" / file).read_bytes() for name in ("alone", "killed"))
    assert killed == alone


@pytest.mark.parametrize("file", RESULTS)
def test_a_run_that_filled_the_disk_says_so_and_goes_on_from_its_last_checkpoint_saving_as_it_is_told_now(
    file: str, runs: tuple[Path, str]
) -> None:
    (said,) = [line for line in (runs[0] / "errors").read_text().splitlines() if "the disk filled up" in line]
    assert said.startswith("loramox train: the disk filled up")
    assert said.endswith(
        f"Free some space on the disk of {runs[0] / 'filled'}, and go on with the same command with --resume"
    )
    alone, filled = ((runs[0] / name / "trained" / file).read_bytes() for name in ("alone", "filled"))
    assert filled == alone
    kept = sorted(c.name for c in (runs[0] / "filled" / "trained").glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize("name", ["killed", "filled"])
def test_the_log_of_a_resumed_run_is_that_of_one_left_alone(name: str, runs: tuple[Path, str]) -> None:
    def steps(run: str) -> list[tuple[int, str]]:
        log = json.loads((runs[0] / run / "run.json").read_text())["log"]
        return [(entry["step"], key) for entry in log for key in entry if key in ("loss", "eval_forget_probability")]

    assert steps(name) == steps("alone")


@pytest.fixture
def checkpoints(runs: tuple[Path, str], tmp_path: Path) -> Path:
    """The folder of a run with two whole checkpoints, 5 and 6."""
    shutil.copytree(runs[0] / "alone" / "trained", tmp_path / "trained")
    return tmp_path / "trained"


def turn_a_bit(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def in_its_place(make: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda path: (path.unlink(), make(path))


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "a bit is another": turn_a_bit,
    "endless": in_its_place(lambda path: path.symlink_to("/dev/zero")),
}
FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken_and_without_one_the_run_is_refused(
    file: str, damage: Callable[[Path], None], checkpoints: Path
) -> None:
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")
    damage(checkpoints / "checkpoint-6" / file)
    with pytest.warns(UserWarning, match=rf"checkpoint-6/{file} .*goes on from checkpoint-5 instead"):
        assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-5")
    damage(checkpoints / "checkpoint-5" / file)
    with pytest.raises(RunError, match=rf"checkpoint-5/{file} .*no older checkpoint is whole.*--overwrite"):
        last_whole_checkpoint(checkpoints)


def test_checkpoints_that_a_kill_left_unfinished_are_passed_over_in_silence(checkpoints: Path) -> None:
    for step, expected in ((6, str(checkpoints / "checkpoint-5")), (5, None)):
        (checkpoints / f"checkpoint-{step}" / "momentum.safetensors").unlink()
        assert last_whole_checkpoint(checkpoints) == expected


def test_a_checkpoint_that_the_user_copied_is_left_alone(checkpoints: Path) -> None:
    copied = shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-best")
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")
    drop_newer(checkpoints, str(checkpoints / "checkpoint-5"))
    assert copied.exists()
    assert not (checkpoints / "checkpoint-6").exists()


@pytest.mark.parametrize("file", RESULTS)
def test_a_run_that_ended_inside_an_epoch_is_not_trained_a_step_further(file: str, runs: tuple[Path, str]) -> None:
    whole, cut = ((runs[0] / name / "trained" / file).read_bytes() for name in ("whole", "cut"))
    assert cut == whole
    steps = [json.loads((runs[0] / name / "run.json").read_text())["momentum"]["updates"] for name in ("whole", "cut")]
    assert steps == [3, 3]


def test_nothing_half_written_is_left_behind(runs: tuple[Path, str]) -> None:
    def files(name: str) -> set[str]:
        return {str(f.relative_to(runs[0] / name)) for f in (runs[0] / name).rglob("*") if f.is_file()}

    assert files("killed") == files("alone")


def test_each_resumed_run_begins_after_the_last_whole_checkpoint_and_a_finished_one_trains_nothing(
    runs: tuple[Path, str],
) -> None:
    """Two steps an epoch, six in all; of a checkpoint without its momentum nothing is used."""
    first_logged = []
    for printed in runs[1].split("ENDED")[: len(KILLED) + 3]:
        logged = re.findall(r"'forget_loss'.*'epoch': '([\d.]+)'", printed)
        first_logged.append(round(2 * float(logged[0])) if logged else None)
    assert dict(zip(["alone", *KILLED, "last", "finished"], first_logged, strict=True)) == {
        "alone": 1,
        "in a step": 1,
        "between weights and momentum": 2,
        "while momentum is written": 3,
        "while optimizer is written": 3,
        "while results are written": 3,
        "between results and record": None,
        "last": None,
        "finished": None,
    }
    assert json.loads((runs[0] / "killed" / "run.json").read_text())["status"] == "trained"
