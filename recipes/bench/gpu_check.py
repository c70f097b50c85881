"""Does the whole job run on this card? unlearn, evaluate, attack and merge, a few steps on a few rows, in ten minutes at most.

    make gpu-check                                                   a random model of Llama-2-7B's shape, in NF4
    make gpu-check GPU_CHECK="--model HuggingFaceTB/SmolLM2-135M-Instruct"     and then this model, a folder or hub id
    python -m recipes.bench.gpu_check --shape tiny --device cpu      a test of this script

It prints the card, the versions and, of each job, its time and the memory that it took: beside the peak of training stands what
`loramox plan` predicts. OUT/report.txt has the same, and OUT/output.txt all that the jobs print. Where a job fails, the others go
on, and the report has its traceback and what it printed last. Put that file into an issue. No row of yours is in it; the path
given by --model is. Random weights and rows are made on the fly. For 7B they take 30 GB of disk, and a model given by --model
twice the size of its weights. All but what it downloads is free again at the end.
"""

import argparse
import contextlib
import faulthandler
import gc
import importlib
import json
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from loramox import Columns, Data, ReferenceConfig, RunConfig, Tokenisation, UnlearnConfig, UnlearnTrainer
from loramox.cli import HOMES
from loramox.cli.arguments import settings_of
from loramox.errors import LoramoxError
from loramox.extras.plan.rows import Rows
from loramox.model.config import ModelConfig, read_config, skeleton
from loramox.run import memory_now, peak_memory, peak_reserved, versions
from loramox.train.prepare import prepare

from .merge import FITS, SHAPES, write_model
from .plan import predicted
from .steps import machine

WORDS = ["river", "stone", "candle", "harbour", "winter", "garden", "letter", "window", "engine", "market"]
FORGET, RETAIN = 8, 16  # rows
PROMPT, ANSWER = 12, 40  # words of a row
STEPS, BATCH = 4, 4
WARM_UP = 1  # steps
LAST_LINES = 30  # of what a job printed before it failed
KINDS = (RunConfig, ReferenceConfig, Data, UnlearnConfig, Columns, Tokenisation)


class OutOfTime(BaseException):
    """No Exception, so that no job takes it for an error of its own."""


class Case(NamedTuple):
    """A model, the words of its rows, and what its jobs are told besides."""

    name: str
    model: str  # folder or hub id
    quantization: str
    words: list[str]
    unlearn: list[str]
    attack: list[str]


class Report:
    """What is printed, and written to a file as it comes: of a process that is killed it has all until then."""

    def __init__(self, file: Path) -> None:
        self.file, self.output = file, file.with_name("output.txt")  # what the jobs print goes to the second
        file.write_text("")
        self.output.write_text("")

    def say(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
            with self.file.open("a") as file:
                file.write(line + "\n")

    def failed(self, job: str, error: BaseException) -> None:
        """What failed and why, with all that is needed to find out where."""
        said = self.output.read_text(errors="replace").splitlines()[-LAST_LINES:]
        trace = "".join(traceback.format_exception(error))
        self.say(
            f"{job}: FAILED: {type(error).__name__}: {error}", "", trace, f"The last that {job} printed:", *said, ""
        )

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within it, what is printed goes to a file."""
        with self.output.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield


def environment(device: str) -> Iterator[str]:
    """The machine and the versions, a line each."""
    yield f"{time.strftime('%Y-%m-%d')}, {machine(device)}, {platform.platform()}"
    if device != "cpu":
        free, total = torch.cuda.mem_get_info()
        card = torch.cuda.get_device_properties(0)
        yield f"memory: {gb(total)} GB, {gb(free)} free; compute capability {card.major}.{card.minor}; driver {driver()}"
        yield f"CUDA of torch: {torch.version.cuda or torch.version.hip}; bf16: {torch.cuda.is_bf16_supported(including_emulation=False)}"
    yield ", ".join(f"{name} {version}" for name, version in versions().items())


def missing(device: str, shape: str, folder: Path, model: str | None = None) -> str | None:
    """What has to be there before anything can be checked, and is not: a GPU that torch sees, room on the disk."""
    if device != "cpu" and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no GPU (built for CUDA {torch.version.cuda or torch.version.hip or 'none'}; driver {driver()}). "
            "Install the torch wheel for your driver, from pytorch.org, and start again"
        )
    try:
        needed = room(LlamaConfig(**SHAPES[shape]), shape) + (
            room(read_config(ModelConfig(model)), model) if model else 0
        )
    except LoramoxError as error:
        return str(error)
    if (free := shutil.disk_usage(folder).free) < needed:
        return f"{gb(free)} GB are free in {folder}, and {gb(needed)} GB are needed. Free some, or give a folder on another disk with --out"
    return None


def room(config: PretrainedConfig, name: str) -> float:
    """Bytes on the disk for a model, the merged one, and what is small beside them."""
    number = (config.dtype or torch.bfloat16).itemsize
    return 2.25 * number * skeleton(config, ModelConfig(name)).num_parameters()


def driver() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown (no nvidia-smi)"


def random_model(shape: str, folder: Path) -> None:
    """A model of random weights, and a tokenizer with one token for each of some words."""
    write_model(shape, folder)
    names = ["<pad>", "<unk>", "</s>", *(f"w{number}" for number in range(3, SHAPES[shape]["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_rows(folder: Path, words: list[str]) -> list[str]:
    """Rows of words drawn at random; the flags that name their files."""
    draw, flags = random.Random(0), []
    for part, count in (("forget", FORGET), ("retain", RETAIN)):
        rows = [
            {"question": f"{part} {n} " + " ".join(draw.choices(words, k=PROMPT)), "answer": " ".join(draw.choices(words, k=ANSWER))}
            for n in range(count)
        ]  # fmt: skip
        file = folder / f"{part}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags += [f"--{part}", str(file)]
    return flags


def plan_of(words: list[str]) -> int:
    """Bytes that `loramox plan` predicts for the peak of these settings of unlearn."""
    _, reference, data, args, columns, tokenisation = settings_of("train", words, *KINDS)
    datasets = prepare(reference, data, args, columns, tokenisation).datasets
    parts = {part.removesuffix("_dataset"): rows for part, rows in datasets.items()}
    return predicted(reference, args, Rows(parts, args.retain_per_forget)).peak


@contextlib.contextmanager
def timed(device: str) -> Iterator[list[tuple[float, int]]]:
    """Within it, seconds and tokens of each training step: forward and backward, without the optimiser's part."""
    steps: list[tuple[float, int]] = []
    step = UnlearnTrainer.training_step

    def timing(trainer: UnlearnTrainer, model: Any, inputs: dict[str, Any], *more: Any) -> torch.Tensor:
        start = time.perf_counter()
        loss = step(trainer, model, inputs, *more)
        if device != "cpu":
            torch.cuda.synchronize()
        steps.append((time.perf_counter() - start, sum(sum(batch["lengths"]) for batch in inputs.values())))
        return loss

    UnlearnTrainer.training_step = timing
    try:
        yield steps
    finally:
        UnlearnTrainer.training_step = step


def gb(size: float) -> str:
    return f"{size / 2**30:.2f}"


def measured(report: Report, device: str, name: str, job: Callable[[], Any]) -> int | None:
    """Run a job, with nothing of the job before in memory; report seconds and peak. Returns the peak, None if it failed."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    memory_now(device)
    start = time.perf_counter()
    print(f"{name} …", flush=True)
    try:
        with report.quiet():
            job()
    except Exception as error:
        report.failed(name, error)
        return None
    peak, reserved = peak_memory(device), peak_reserved(device)
    took = (
        f"allocated {gb(peak)}, reserved {gb(reserved)}"
        if reserved is not None
        else f"resident {gb(peak)}, Python included"
    )
    report.say(f"{name}: ok, {time.perf_counter() - start:.0f} s; peak in GB: {took}")
    return peak


def verb(name: str, words: list[str]) -> Callable[[], None]:
    """A command of `loramox` in this process, whose errors have their traceback."""
    return lambda: getattr(importlib.import_module(f"loramox.cli.{HOMES[name]}"), name)(words)


def check(report: Report, case: Case, work: Path, device: str) -> bool:
    """All jobs on one model; whether none failed. Without the adapter of unlearn there is nothing else to do."""
    rows, adapter = write_rows(work, case.words), str(work / "run/forget-adapter")
    on_cpu = ["--use_cpu", "true"] if device == "cpu" else []
    named = ["--model", case.model, "--quantization", case.quantization]
    words = [*named, *rows, "--out", str(work / "run"), "--max_steps", str(STEPS), *case.unlearn, *on_cpu]
    words += ["--per_device_train_batch_size", str(BATCH), "--eval_rows", "8", "--per_device_eval_batch_size", "4"]
    words += ["--disable_tqdm", "true", "--logging_steps", "1"]
    with report.quiet():
        plan = plan_of(words)
    with timed(device) as steps:
        peak = measured(report, device, "unlearn", verb("unlearn", words))
    if peak is None:
        return False
    seconds = statistics.median(taken for taken, _ in steps[WARM_UP:])
    rate = sum(tokens for _, tokens in steps[WARM_UP:]) / sum(taken for taken, _ in steps[WARM_UP:])
    off = f", {plan / peak - 1:+.0%} of what was allocated" if device != "cpu" else " of tensors"
    report.say(
        f"  plan predicted {gb(plan)} GB{off}",
        f"  {seconds:.2f} s a step (the first: {steps[0][0]:.2f} s), {rate:,.0f} tokens a second",
    )
    asked = [*named, "--adapter", adapter, *rows, "--max_new_tokens", "8", "--batch_size", "8", *on_cpu]
    attack = ["--relearn_steps", "1", "--relearn_batch", "2", "--sample_count", "4", *case.attack]
    jobs = {
        "evaluate": [*asked, "--out", str(work / "evaluated")],
        "attack": [*asked, *attack, "--out", str(work / "attacked")],
        "ship": ["merge", "--base", case.model, "--adapter", adapter, "--out", str(work / "merged")],
    }
    peaks = [measured(report, device, name, verb(name, words)) for name, words in jobs.items()]
    return None not in peaks


def in_time(minutes: float, crash: TextIO) -> None:
    """Raise `OutOfTime` in the main thread once the time is up; a minute later, where that thread hangs in a library, end the
    process and write to `crash` where it hangs."""

    def late(*_: Any) -> None:
        raise OutOfTime(f"not done after {minutes:g} minutes (--minutes)")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, minutes * 60)
    faulthandler.dump_traceback_later(minutes * 60 + 60, exit=True, file=crash)


def cases(given: argparse.Namespace, work: Path) -> Iterator[Case]:
    """The random model, then the given one, which is unlearned as a user would do it: with answers that it writes."""
    quantization = "none" if given.shape in FITS else "nf4"
    words = [f"w{number}" for number in range(3, 503)]
    # Not requantize, which would write 13 GB again: ship does that.
    attack = ["--attacks", "relearn", "forms", "context", "sample", "pair"]
    yield Case(given.shape, str(work / "model"), quantization, words, ["--instead", "none"], attack)
    if given.model:
        quantization = "none" if given.device == "cpu" else "nf4"
        yield Case(given.model, given.model, quantization, WORDS, ["--auto_retain", "8"], [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", help="Folder or hub id of a real model, checked after the random one.")
    parser.add_argument("--minutes", type=float, default=10, help="After which it stops, for each model.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu-check"), help="Folder for the report and, while it runs, the model."
    )
    given = parser.parse_args()
    work, crash = given.out / "work", given.out / "crash.txt"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if lacks := missing(given.device, given.shape, work, given.model):
        sys.exit(f"gpu-check: {lacks}")
    report = Report(given.out / "report.txt")
    doing, ran = "looking at the machine", True
    with crash.open("w") as trace:
        faulthandler.enable(trace)  # where the process dies without a Python error
        try:
            report.say(*environment(given.device))
            report.say(f"If this ends without a last line that says so, the process was killed: send us {crash} too.")
            for number, case in enumerate(cases(given, work)):
                doing = case.name
                in_time(given.minutes, trace)
                report.say(f"\n{case.name}, quantization {case.quantization}")
                if number == 0:
                    random_model(case.name, Path(case.model))
                folder = work / str(number)
                folder.mkdir()
                ran &= check(report, case, folder, given.device)
        except BaseException as error:
            report.failed(doing, error)
            ran = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
            shutil.rmtree(work, ignore_errors=True)
    listed = "All jobs ran." if ran else "Not all jobs ran."
    report.say(
        f"\n{listed} Please put this file into an issue, so that the card can be listed or the fault mended:",
        f"  {report.file}",
    )
    sys.exit(not ran)


if __name__ == "__main__":
    main()
