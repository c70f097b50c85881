"""Memory that runs out outside of training's passes and scoring's batches: one message, and no traceback."""

import re

import pytest
import torch

from loramox.cli import main
from loramox.model.fitting import FittingBatch
from loramox.run import MAY_DIFFER, peak_reserved

FULL = {
    "CUDA out of memory.": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 8 GiB"),
    "MemoryError": MemoryError(),
}


@pytest.mark.parametrize("why", FULL)
@pytest.mark.parametrize("verb", ["evaluate", "attack", "sweep", "ship", "unlearn"])
def test_memory_that_runs_out_in_any_job_is_a_message_that_says_what_to_change(
    verb: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> None:
        raise FULL[why]

    home = {"unlearn": "training", "ship": "shipping"}.get(verb, "evaluation")
    monkeypatch.setattr(f"loramox.cli.{home}.{verb}", fail)
    with pytest.raises(SystemExit) as left:
        main([verb])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert f"loramox {verb}: the device's memory ran out: {why}" in said
    assert "--use_cpu true" in said
    resumed, *anew = said.split("Or start from the beginning with --overwrite")
    if verb == "unlearn":
        assert {"resume", "activation_checkpointing", *MAY_DIFFER} >= set(re.findall(r"--(\w+)", resumed))
        assert {"quantization", "max_length"} <= set(re.findall(r"--(\w+)", *anew))
        assert not set(re.findall(r"--(\w+)", *anew)) & set(MAY_DIFFER)
    else:
        assert "--batch_size" in said
        assert not anew
        assert "--resume" not in said


@pytest.mark.parametrize("why", FULL)
def test_a_batch_is_halved_until_it_fits(why: str) -> None:
    def fits_two(size: int) -> int:
        if size > 2:
            raise FULL[why]
        return size

    with pytest.warns(UserWarning, match="memory ran out with --batch_size 8: 4 at a time from here on"):
        assert FittingBatch(8).ask(fits_two) == 2


def test_a_request_is_told_of_no_flag_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> None:
        raise MemoryError

    monkeypatch.setattr("loramox.cli.requests.requests", fail)
    with pytest.raises(SystemExit):
        main(["requests", "add"])
    said = capsys.readouterr().err
    assert "Or start from the beginning without --resume, and give --quantization nf4" in said
    assert "--overwrite" not in said


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: list[str]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("loramox.cli.evaluation.evaluate", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["evaluate"])


def test_what_torch_takes_of_a_gpu_is_recorded_beside_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    assert peak_reserved("cuda") == 7
    assert peak_reserved("cpu") is None
