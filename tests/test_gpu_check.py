"""`make gpu-check` on the CPU: the whole job on a random model, and a report that can be sent."""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes are not installed

from recipes.bench import gpu_check

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PICO = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
}


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The check on a pico model, in this process and not in a child; returns the report."""
    monkeypatch.setitem(gpu_check.SHAPES, "tiny", PICO)
    words = ["gpu_check", "--shape", "tiny", "--device", "cpu", "--out", str(tmp_path / "out"), "--child"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(gpu_check, "ANSWER", 20)
    monkeypatch.setattr("faulthandler.enable", lambda file: None)  # pytest has its own
    (tmp_path / "out/work").mkdir(parents=True)

    def run() -> str:
        try:
            gpu_check.main()
        except SystemExit as left:
            if left.code:
                raise
        return (tmp_path / "out/report.txt").read_text()

    return run


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """The command as a user starts it. Its child runs this code, in which `out` is the folder; exit code and report."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(gpu_check.SHAPES, "tiny", gpu_check.SHAPES["tiny"])  # main changes it
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--shape", "tiny", "--device", "cpu", "--out", str(out)])

    def run(code: str | None = None) -> tuple[int, str]:
        if code is not None:
            code = f"import os, signal; from pathlib import Path; out = Path({str(out)!r}); {code}"
            monkeypatch.setattr(gpu_check, "CHILD", [sys.executable, "-c", code])
        with pytest.raises(SystemExit) as left:
            gpu_check.main()
        return left.value.code, (out / "report.txt").read_text()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No model, and commands that do nothing but write down that they ran; unlearn also its record."""
    done = []

    def unlearn(words: list[str]) -> None:
        done.append("unlearn")
        out = Path(words[words.index("--out") + 1])
        out.mkdir()
        (out / "run.json").write_text(json.dumps({"log": [{"loss": 1.0, "grad_norm": None}, {"grad_norm": 0.5}]}))

    monkeypatch.setattr(gpu_check, "random_model", lambda *_: None)
    monkeypatch.setattr(gpu_check, "plan_of", lambda words: 1)
    monkeypatch.setattr(gpu_check, "timed", lambda device: contextlib.nullcontext([(1.0, 10)] * 3))
    monkeypatch.setattr("loramox.cli.training.unlearn", unlearn)
    monkeypatch.setattr("loramox.cli.evaluation.evaluate", lambda words: done.append("evaluate"))
    monkeypatch.setattr("loramox.cli.evaluation.attack", lambda words: done.append("attack"))
    monkeypatch.setattr("loramox.cli.shipping.ship", lambda words: done.append("ship"))
    return done


def test_every_job_runs_and_the_report_has_what_it_took(checked, tmp_path: Path) -> None:
    report = checked()
    for part in ("python 3", "torch 2", "kernels: ok", "2 of 2 layers", "plan predicted 0.0", "GB resident"):
        assert part in report
    for part in ("s a step", "tokens a second", "All jobs ran"):
        assert part in report
    for job in ("plan", "unlearn", "evaluate", "attack", "ship"):
        assert f"{job}: ok" in report
    output = (tmp_path / "out/output.txt").read_text()
    # As the command line has it by default, on a chat model.
    for part in ("(--instead): refuse", "Generating 8 retain rows", "chose alpha", "Loading the model"):
        assert part in output


def test_a_job_that_fails_leaves_a_report_with_its_traceback(
    checked, mocked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr("loramox.cli.training.unlearn", fail)
    with pytest.raises(SystemExit) as left:
        checked()
    said = capsys.readouterr().out
    assert left.value.code == 1
    assert "unlearn: FAILED: RuntimeError: no kernel image" in said
    assert mocked == []  # there is no adapter
    report = (tmp_path / "out/report.txt").read_text()
    assert "Traceback (most recent call last)" in report
    assert "torch 2" in report
    assert "Please put this file into an issue" in report


def test_a_job_that_fails_does_not_end_the_others_and_what_it_printed_is_in_the_report(
    checked, mocked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(words: list[str]) -> None:
        print("bar: 10%\rbar: 100%\r         \n\nasking the model")
        os.write(2, b"device-side assert\n")  # as CUDA and bitsandbytes print
        print("Warning: memory ran out with --batch_size 8: 4 at a time from here on", file=sys.stderr)
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr("loramox.cli.evaluation.evaluate", fail)
    with pytest.raises(SystemExit) as left:
        checked()
    report = (tmp_path / "out/report.txt").read_text()
    assert (left.value.code, mocked) == (1, ["unlearn", "attack", "ship"])
    assert "evaluate: FAILED: RuntimeError: CUDA error: misaligned address" in report
    assert "The last that evaluate printed:\nbar: 100%\nasking the model\ndevice-side assert\nWarning: memory" in report
    assert "\n  Warning: memory ran out with --batch_size 8" in report
    assert "ship: ok" in report
    assert "Not all jobs ran" in report


def test_after_an_error_that_the_card_keeps_and_without_a_plan_the_others_are_still_tried(
    checked, mocked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lost(*_: object) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def evaluate(words: list[str]) -> None:
        monkeypatch.setattr(gpu_check, "memory_now", lost)
        lost()

    monkeypatch.setattr(gpu_check, "plan_of", lost)
    monkeypatch.setattr("loramox.cli.evaluation.evaluate", evaluate)
    with pytest.raises(SystemExit):
        checked()
    report = (tmp_path / "out/report.txt").read_text()
    assert "unlearn: ok" in report
    assert "plan predicted" not in report
    for job in ("plan", "evaluate", "attack", "ship"):
        assert f"{job}: FAILED: RuntimeError: CUDA error: an illegal memory access" in report


@pytest.mark.parametrize("log", [[], [{"grad_norm": 0.0}, {"grad_norm": None}, {"eval_loss": 1.0}]])
def test_an_adapter_that_no_gradient_reached_is_no_success(
    log: list, checked, mocked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "read_record", lambda out: {"log": log})
    with pytest.raises(SystemExit):
        checked()
    report = (tmp_path / "out/report.txt").read_text()
    assert "WRONG: no gradient reached the adapter" in report
    assert "Not all jobs ran" in report
    assert mocked == ["unlearn", "evaluate", "attack", "ship"]


def test_kernels_that_fail_are_listed_before_anything_is_written(
    checked, mocked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> torch.Tensor:
        raise NotImplementedError("no\n" * 1000)

    tried = {"good": lambda: torch.ones(1), "bad": lambda: torch.full((1,), torch.nan), "none": fail}
    monkeypatch.setattr(gpu_check, "kernels", lambda device: tried)
    with pytest.raises(SystemExit):
        checked()
    report = (tmp_path / "out/report.txt").read_text()
    assert (
        "bad: FAILED: ArithmeticError: its numbers are not finite\nnone: FAILED: NotImplementedError: no no" in report
    )
    assert max(map(len, report.splitlines())) < 400
    assert "good" not in report
    assert "ship: ok" in report
    assert "Not all jobs ran" in report


def test_the_time_is_limited_also_where_the_main_thread_hangs(
    checked, mocked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, exit, file: limits.append((seconds, exit)))
    monkeypatch.setattr("loramox.cli.evaluation.attack", lambda words: signal.raise_signal(signal.SIGALRM))
    with pytest.raises(SystemExit):
        checked()
    assert limits == [(21 * 60, True)] * 2  # the second when the model is written
    report = (tmp_path / "out/report.txt").read_text()
    assert "attack: FAILED: OutOfTime: not done after 20 minutes (--minutes)" in report
    assert "ship" not in report


def test_the_check_runs_in_a_process_of_its_own_and_leaves_two_files(parent, tmp_path: Path) -> None:
    """With no time at all, so that it ends by itself before a model is written."""
    sys.argv += ["--minutes", "1e-6"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.txt").write_text("an older report: All jobs ran")
    code, report = parent()
    assert code == 1
    assert "OutOfTime" in report
    assert "older" not in report
    assert "ended by itself" not in report
    assert report.count("Please put this file into an issue") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["output.txt", "report.txt"]


@pytest.mark.parametrize(
    ("end", "code", "how"),
    [
        ("os._exit(3)", 3, "exit code 3"),
        ("os._exit(0)", 1, "exit code 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL"),
    ],
)
def test_a_library_that_ends_the_process_leaves_its_last_words_and_a_free_disk(
    end: str, code: int, how: str, parent, tmp_path: Path
) -> None:
    said = r"(out / 'report.txt').write_text('the card\n')"
    printed = r"os.write(2, b'Error no kernel image at line 7 in file ops.cu\n')"
    model = "(out / 'work/model').mkdir()"
    left, report = parent(f"{said}; {printed}; {model}; {end}")
    assert left == code
    assert report.startswith("the card\n")
    assert f"The process ended by itself, with {how}. The last that was printed:\nError no kernel image" in report
    assert "Please put this file into an issue" in report
    assert not (tmp_path / "out/work").exists()


def test_where_a_library_calls_exit_the_report_has_the_machine_and_what_the_library_printed(parent) -> None:
    """As bitsandbytes does, in C: there is no exception, and nothing is flushed by Python."""
    broken = "lambda: (print('a word'), os.write(2, b'Error no kernel image\\n'), ctypes.CDLL(None).exit(1))"
    code, report = parent(
        f"import ctypes; from recipes.bench import gpu_check; gpu_check.kernels = lambda device: {{'broken': {broken}}}; "
        "import sys; sys.argv.append('--child'); gpu_check.main()"
    )
    assert code == 1
    assert "python 3" in report
    said = report.partition("by itself, with exit code 1. The last that was printed:\n")[2]
    # On some CPUs bitsandbytes prints a line of its own first.
    assert "== broken\na word\nError no kernel image\n" in said


def test_without_a_gpu_or_room_on_the_disk_it_says_what_is_missing(
    parent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(SystemExit, match=r"0\.00 GB are free in .*work, and 0\.0\d GB are needed.*--out"):
        gpu_check.main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--shape", "tiny", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"torch 2.* sees no GPU .*Install the torch wheel for your driver"):
        gpu_check.main()
    assert not (tmp_path / "out/work").exists()


def test_seven_billion_weights_are_planned_for_and_a_model_of_ones_own_answers_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = argparse.Namespace(shape="7b", device="cuda", model="owner/name", layers=16, all_layers=32)
    random, own = gpu_check.cases(given, tmp_path)
    assert random[0] == "7b, random weights, 16 of 32 layers (--layers)"
    assert random[2] == "nf4"
    assert "requantize" not in random[3]
    assert own == ("owner/name", "owner/name", "nf4", [])
    for layers, needed in ((16, 16.3), (32, 28.2)):
        monkeypatch.setitem(gpu_check.SHAPES, "7b", gpu_check.SHAPES["7b"] | {"num_hidden_layers": layers})
        for free, enough in ((needed + 0.2, True), (needed - 0.2, False)):
            monkeypatch.setattr(
                gpu_check.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free * 2**30)
            )
            assert (gpu_check.missing("cpu", "7b", tmp_path) is None) == enough


def test_the_random_model_is_a_chat_model_with_few_key_value_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seven = gpu_check.SHAPES["7b"]
    assert (seven["vocab_size"], seven["num_key_value_heads"]) == (128_256, 8)
    monkeypatch.setitem(gpu_check.SHAPES, "tiny", PICO)
    gpu_check.random_model("tiny", tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    asked = [{"role": "user", "content": "river stone"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "<user> river stone </s> <assistant> "
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert len(tokenizer) == 600


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
