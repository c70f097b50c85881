"""Does the whole job run on this card? unlearn, evaluate, attack and merge, a few steps on a few rows, in ten minutes at most.

    make gpu-check                                                   a random model of Llama-2-7B's shape, in NF4
    python -m recipes.bench.gpu_check --model FOLDER                 and then this model
    python -m recipes.bench.gpu_check --shape tiny --device cpu      a test of this script

It prints the card, the versions and, of each job, its time and the memory that it took: beside the peak of training stands what
`loramox plan` predicts. OUT/report.txt has the same, and OUT/output.txt all that the jobs print. If a job fails, the report has
its traceback as well: send us that file. No row of yours is in it; the path given by --model is. Random weights and rows are made
on the fly. For 7B they take about 30 GB of disk, with the merged model, which is free again at the end.
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
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loramox import Columns, Data, ReferenceConfig, RunConfig, Tokenisation, UnlearnConfig, UnlearnTrainer
from loramox.cli import HOMES
from loramox.cli.arguments import settings_of
from loramox.extras.plan.estimate import Rows
from loramox.run import memory_now, peak_memory, peak_reserved, versions
from loramox.unlearning import prepare

from .merge import FITS, SHAPES, write_model
from .plan import predicted
from .steps import machine

WORDS = [
    "river",
    "stone",
    "candle",
    "harbour",
    "winter",
    "garden",
    "letter",
    "window",
    "engine",
    "market",
    "copper",
    "violin",
    "meadow",
    "lantern",
    "bridge",
    "winter",
    "salt",
    "maple",
]
FORGET, RETAIN = 8, 16  # rows
PROMPT, ANSWER = 12, 40  # words of a row
STEPS, BATCH = 4, 4
WARM_UP = 1  # steps
KINDS = (RunConfig, ReferenceConfig, Data, UnlearnConfig, Columns, Tokenisation)


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


def training(model: Path, quantization: str, rows: list[str], out: Path, on_cpu: list[str]) -> list[str]:
    words = ["--model", str(model), "--quantization", quantization, *rows, "--out", str(out), "--max_steps", str(STEPS)]
    words += ["--per_device_train_batch_size", str(BATCH), "--eval_rows", "8", "--per_device_eval_batch_size", "4"]
    return [*words, "--instead", "none", "--disable_tqdm", "true", "--logging_steps", "1", *on_cpu]


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


def measured(report: Report, device: str, name: str, job: Callable[[], Any]) -> int:
    """Run a job; report its seconds and its peak, and return the peak. Nothing of the job before is in memory any more."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    memory_now(device)
    start = time.perf_counter()
    print(f"{name} …", flush=True)
    with report.quiet():
        job()
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


def check(report: Report, model: Path, quantization: str, rows: list[str], work: Path, device: str) -> None:
    """All jobs on one model."""
    on_cpu = ["--use_cpu", "true"] if device == "cpu" else []
    named, adapter = ["--model", str(model), "--quantization", quantization], str(work / "run/forget-adapter")
    asking = [*rows, "--max_new_tokens", "8", "--batch_size", "8", *on_cpu]
    words = training(model, quantization, rows, work / "run", on_cpu)
    with report.quiet():
        plan = plan_of(words)
    with timed(device) as steps:
        peak = measured(report, device, "unlearn", verb("unlearn", words))
    seconds = statistics.median(taken for taken, _ in steps[WARM_UP:])
    rate = sum(tokens for _, tokens in steps[WARM_UP:]) / sum(taken for taken, _ in steps[WARM_UP:])
    report.say(
        f"  plan predicted {gb(plan)} GB, {plan / peak - 1:+.0%} of what was allocated" if device != "cpu" else f"  plan predicted {gb(plan)} GB of tensors",
        f"  {seconds:.2f} s a step (the first: {steps[0][0]:.2f} s), {rate:,.0f} tokens a second",
    )  # fmt: skip
    attack = ["--relearn_steps", "1", "--relearn_batch", "2"]
    jobs = {
        "evaluate": [*named, "--adapter", adapter, *asking, "--out", str(work / "evaluated")],
        "attack": [*named, "--adapter", adapter, *asking, *attack, "--out", str(work / "attacked")],
        "ship": ["merge", "--base", str(model), "--adapter", adapter, "--out", str(work / "merged")],
    }
    for name, words in jobs.items():
        measured(report, device, name, verb(name, words))


def in_time(minutes: float) -> None:
    """Raise `TimeoutError` in the main thread once the time is up."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {minutes:g} minutes (--minutes)")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, minutes * 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", help="Folder of a real model, checked after the random one.")
    parser.add_argument("--minutes", type=float, default=10, help="After which it stops, for each model.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu-check"), help="Folder for the report and, while it runs, the model."
    )
    given = parser.parse_args()
    work = given.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    report = Report(given.out / "report.txt")
    doing = "looking at the machine"
    with (given.out / "crash.txt").open("w") as crash:
        faulthandler.enable(crash)  # where the process dies without a Python error
        try:
            report.say(*environment(given.device))
            cases = [
                (
                    given.shape,
                    work / "model",
                    "none" if given.shape in FITS else "nf4",
                    [f"w{n}" for n in range(3, 503)],
                )
            ]
            cases += (
                [(given.model, Path(given.model), "nf4" if given.device != "cpu" else "none", WORDS)]
                if given.model
                else []
            )
            for number, (doing, model, quantization, words) in enumerate(cases):
                in_time(given.minutes)
                report.say(f"\n{doing}, quantization {quantization}")
                if number == 0:
                    random_model(doing, model)
                folder = work / str(number)
                folder.mkdir()
                check(report, model, quantization, write_rows(folder, words), folder, given.device)
            report.say(
                "\nAll jobs ran. Please send us this report, so that the card can be listed:", f"  {report.file}"
            )
        except BaseException as error:
            report.say(
                f"\nFAILED with {doing}, after the last line above: {type(error).__name__}: {error}", "", traceback.format_exc(),
                f"Please send us this report: {report.file}",
            )  # fmt: skip
            sys.exit(1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.disable()
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
