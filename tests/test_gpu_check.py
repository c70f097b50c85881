"""`make gpu-check` on the CPU: the whole job on a random model, and a report that can be sent."""

import sys
from pathlib import Path

import pytest

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
        gpu_check.main()
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
    assert "FAILED with tiny" in said
    assert "no kernel image" in said
    report = (tmp_path / "out/report.txt").read_text()
    assert "Traceback (most recent call last)" in report
    assert "torch 2" in report
    assert "Please send us this report" in report
    assert not (tmp_path / "out/work").exists()
