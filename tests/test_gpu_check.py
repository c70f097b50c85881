"""`make gpu-check` on the CPU: the whole job on a random model, and a report that can be sent."""

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes are not installed

from recipes.bench import gpu_check

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PICO = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 600,
}


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command on a pico model; returns the report."""
    monkeypatch.setitem(gpu_check.SHAPES, "tiny", PICO)
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--shape", "tiny", "--device", "cpu", "--out", str(tmp_path / "out")]
    )

    def run() -> str:
        try:
            gpu_check.main()
        except SystemExit as left:
            if left.code:
                raise
        return (tmp_path / "out/report.txt").read_text()

    return run


def test_every_job_runs_and_the_report_has_what_it_took(checked, tmp_path: Path) -> None:
    report = checked()
    for part in ("python 3", "torch 2", "plan predicted 0.0", "s a step", "tokens a second", "All jobs ran"):
        assert part in report
    for job in ("unlearn", "evaluate", "attack", "ship"):
        assert f"{job}: ok" in report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["crash.txt", "output.txt", "report.txt"]
    assert "GB" in report


def test_a_job_that_fails_leaves_a_report_with_its_traceback(
    checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr("loramox.cli.training.unlearn", fail)
    with pytest.raises(SystemExit) as left:
        checked()
    said = capsys.readouterr().out
    assert left.value.code == 1
    assert "unlearn: FAILED: RuntimeError: no kernel image" in said
    assert "evaluate" not in said.split("FAILED")[1]  # there is no adapter
    report = (tmp_path / "out/report.txt").read_text()
    assert "Traceback (most recent call last)" in report
    assert "torch 2" in report
    assert "Please put this file into an issue" in report
    assert not (tmp_path / "out/work").exists()


def test_a_job_that_fails_does_not_end_the_others_and_what_it_printed_is_in_the_report(
    checked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = []

    def fail(words: list[str]) -> None:
        print("asking the model")
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(gpu_check, "random_model", lambda *_: None)
    monkeypatch.setattr(gpu_check, "plan_of", lambda words: 1)
    monkeypatch.setattr(gpu_check, "timed", lambda device: contextlib.nullcontext([(1.0, 10)] * 3))
    monkeypatch.setattr("loramox.cli.training.unlearn", lambda words: done.append("unlearn"))
    monkeypatch.setattr("loramox.cli.evaluation.evaluate", fail)
    monkeypatch.setattr("loramox.cli.evaluation.attack", lambda words: done.append("attack"))
    monkeypatch.setattr("loramox.cli.shipping.ship", lambda words: done.append("ship"))
    with pytest.raises(SystemExit) as left:
        checked()
    report = (tmp_path / "out/report.txt").read_text()
    assert (left.value.code, done) == (1, ["unlearn", "attack", "ship"])
    assert "evaluate: FAILED: RuntimeError: CUDA error: misaligned address" in report
    assert "The last that evaluate printed:\nasking the model\n" in report
    assert "ship: ok" in report
    assert "Not all jobs ran" in report


def test_the_time_is_limited_also_where_the_main_thread_hangs(
    checked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, exit, file: limits.append((seconds, exit)))
    monkeypatch.setattr(gpu_check, "random_model", lambda *_: time.sleep(60))
    sys.argv += ["--minutes", "0.002"]
    with pytest.raises(SystemExit):
        checked()
    assert limits == [(0.002 * 60 + 60, True)]
    report = (tmp_path / "out/report.txt").read_text()
    assert "tiny: FAILED: OutOfTime: not done after 0.002 minutes (--minutes)" in report


def test_without_a_gpu_or_room_on_the_disk_it_says_what_is_missing(
    checked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(SystemExit, match=r"0\.00 GB are free in .*work, and 0\.00 GB are needed.*--out"):
        checked()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--shape", "tiny", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"torch 2.* sees no GPU .*Install the torch wheel for your driver"):
        checked()


def test_seven_billion_weights_are_planned_for_and_a_model_of_ones_own_answers_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = argparse.Namespace(shape="llama-2-7b", device="cuda", model="owner/name")
    random, own = gpu_check.cases(given, tmp_path)
    assert (random.quantization, own.quantization) == ("nf4", "nf4")
    assert "requantize" not in random.attack
    assert (own.model, own.unlearn, own.attack) == ("owner/name", ["--auto_retain", "8"], [])
    monkeypatch.setattr(gpu_check.shutil, "disk_usage", lambda folder: SimpleNamespace(free=29 * 2**30))
    assert gpu_check.missing("cpu", "llama-2-7b", tmp_path) is None  # 28.2 GB
    monkeypatch.setattr(gpu_check.shutil, "disk_usage", lambda folder: SimpleNamespace(free=28 * 2**30))
    assert "28.00 GB are free" in gpu_check.missing("cpu", "llama-2-7b", tmp_path)


@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 1), ("float32", 2)])
def test_a_model_of_ones_own_needs_room_beside_the_random_one_and_is_looked_for_first(
    dtype: str, factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed(model: str | None) -> float:
        said = gpu_check.missing("cpu", "100m", tmp_path, model)
        return float(re.search(r"and ([\d.]+) GB are needed", said)[1])

    monkeypatch.setattr(gpu_check.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert "there is no such folder" in gpu_check.missing("cpu", "100m", tmp_path, str(tmp_path / "gone"))
    LlamaConfig(**gpu_check.SHAPES["100m"], dtype=dtype, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert needed(str(tmp_path)) == pytest.approx((1 + factor) * needed(None), abs=0.02)
