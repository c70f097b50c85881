"""Does the whole job run on this card? unlearn, evaluate, attack and merge, a few steps on a few rows, in twenty minutes at most.

    make gpu-check                                                   a random 7B model, 16 of its 32 layers, in NF4
    make gpu-check GPU_CHECK="--model HuggingFaceTB/SmolLM2-135M-Instruct"     and then this model, a folder or hub id
    python -m recipes.bench.gpu_check --shape tiny --device cpu      a test of this script

It prints the card, the versions and, of each job, its time and the memory that it took: beside the peak of training stands what
`loramox plan` predicts. OUT/report.txt has the same, and OUT/output.txt all that the jobs print. Where a job fails, the others go
on, and the report has its traceback and what it printed last; where a library ends the process, the report says so. Put it into
an issue. No row of yours is in it; the path given by --model is. Random weights are written before the twenty minutes begin. They
take 18 GB of disk (31 GB with --layers 32), a model given by --model twice its size. All but a download is deleted at the end.
"""

import argparse
import contextlib
import faulthandler
import gc
import importlib
import json
import os
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
from typing import Any, TextIO
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from loramox import Columns, Data, ReferenceConfig, RunConfig, Tokenisation, UnlearnConfig, UnlearnTrainer
from loramox.cli import HOMES, _report_progress
from loramox.cli.arguments import settings_of
from loramox.errors import LoramoxError
from loramox.extras.plan.rows import rows_of
from loramox.model.config import ModelConfig, read_config, skeleton
from loramox.run import memory_now, peak_memory, peak_reserved, read_record

from .card import built_for, driver, environment, kernels
from .merge import FITS, SHAPES, write_model
from .plan import predicted

# Llama 2's size, Llama 3's words and key-value heads; `write_model` finds it there.
SHAPES["7b"] = SHAPES["llama-2-7b"] | {"vocab_size": 128_256, "num_key_value_heads": 8}
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
WORDS = ["river", "stone", "candle", "harbour", "winter", "garden", "letter", "window", "engine", "market"]
FORGET, RETAIN, PROMPT, ANSWER = 8, 16, 12, 100  # rows, and words of a row
STEPS, BATCH, WARM_UP = 4, 4, 1  # steps, rows at a time, and steps that are not timed
LAST_LINES = 40  # of what was printed before a job failed, or the process ended
CHILD = [sys.executable, "-m", "recipes.bench.gpu_check", "--child"]
END = "Please put this file into an issue, so that the card can be listed or the fault mended:"


class OutOfTime(BaseException):
    """No Exception, so that no job takes it for an error of its own."""


class Report:
    """What is printed, and written to a file as it comes: of a process that is killed it has all until then."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "report.txt"
        self.output = (folder / "output.txt").open("a", buffering=1)  # for what the jobs print
        self.job, self.start = "looking at the machine", 0  # what is being done, and where its output starts

    def say(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
            with self.file.open("a") as file:
                file.write(line + "\n")

    def failed(self, error: BaseException) -> None:
        """What failed and why, with all that is needed to find out where."""
        self.say(f"{self.job}: FAILED: {type(error).__name__}: {error}", "", "".join(traceback.format_exception(error)))
        self.say(f"The last that {self.job} printed:", *self.printed()[-LAST_LINES:], "")

    def printed(self) -> list[str]:
        """The lines that the last job printed, without those that are empty or were printed over."""
        text = Path(self.output.name).read_bytes()[self.start :].decode(errors="replace")
        return [line for each in text.split("\n") if (line := each.rstrip().rpartition("\r")[2])]

    @contextlib.contextmanager
    def quiet(self, job: str) -> Iterator[None]:
        """Within it, what is printed goes to a file: by Python, by libraries in C, which may end the process, and by the card."""
        kept = {number: os.dup(number) for number in (1, 2)}
        print("==", job, file=self.output)
        self.job, self.start = job, os.fstat(self.output.fileno()).st_size
        try:
            for number in kept:
                os.dup2(self.output.fileno(), number)
            with contextlib.redirect_stdout(self.output), contextlib.redirect_stderr(self.output):
                yield
        finally:
            for number, own in kept.items():
                os.dup2(own, number)
                os.close(own)


def missing(device: str, shape: str, folder: Path, model: str | None = None) -> str | None:
    """What has to be there before anything can be checked, and is not: a GPU that torch sees, room on the disk."""
    if device != "cpu" and not torch.cuda.is_available():
        built = f"built for CUDA {built_for()}; driver {driver()}"
        return f"torch {torch.__version__} sees no GPU ({built}). Install the torch wheel for your driver, from pytorch.org, and start again"
    try:
        needed = room(LlamaConfig(**SHAPES[shape]), shape)
        needed += room(read_config(ModelConfig(model)), model) if model else 0
    except LoramoxError as error:
        return str(error)
    if (free := shutil.disk_usage(folder).free) < needed:
        return f"{gb(free)} GB are free in {folder}, and {gb(needed)} GB are needed. Free some, or give a folder on another disk with --out"
    return None


def room(config: PretrainedConfig, name: str) -> float:
    """Bytes on the disk for a model, the merged one, and what is small beside them."""
    return 2.25 * (config.dtype or torch.bfloat16).itemsize * skeleton(config, ModelConfig(name)).num_parameters()


def random_model(shape: str, folder: Path) -> None:
    """A model of random weights, and a tokenizer with one token for each of some words."""
    write_model(shape, folder)
    names = ["<pad>", "<unk>", "</s>", "<user>", "<assistant>", *WORDS]
    names += [f"w{number}" for number in range(len(names), SHAPES[shape]["vocab_size"])]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    ).save_pretrained(folder)


def try_kernels(report: Report, device: str) -> bool:
    """Whether all kernels run; a line for each that does not. Raises the card's error where nothing runs on it any more."""
    failed = []
    for name, kernel in kernels(device).items():
        try:
            with report.quiet(name):
                if not kernel().isfinite().all():
                    raise ArithmeticError("its numbers are not finite")
        except Exception as error:
            failed.append(f"{name}: FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    report.say(*(failed or ["kernels: ok"]))
    with report.quiet("the card"):
        torch.ones(1, device=device).item()
    return not failed


def write_rows(folder: Path) -> list[str]:
    """Rows of words drawn at random; the flags that name their files."""
    draw, flags = random.Random(0), []
    for part, count in (("forget", FORGET), ("retain", RETAIN)):
        rows = [
            {"question": f"{part} {n} " + " ".join(draw.choices(WORDS, k=PROMPT)), "answer": " ".join(draw.choices(WORDS, k=ANSWER))}
            for n in range(count)
        ]  # fmt: skip
        file = folder / f"{part}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags += [f"--{part}", str(file)]
    return flags


def plan_of(words: list[str]) -> int:
    """Bytes that `loramox plan` predicts for the peak of these settings of unlearn."""
    kinds = RunConfig, ReferenceConfig, Data, UnlearnConfig, Columns, Tokenisation
    _, reference, data, args, *how = settings_of("train", words, *kinds)
    return predicted(reference, args, rows_of(reference, data, args, *how)).peak


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

    with patch.object(UnlearnTrainer, "training_step", timing):
        yield steps


def gb(size: float) -> str:
    return f"{size / 2**30:.2f}"


def measured(report: Report, device: str, name: str, job: Callable[[], Any]) -> int | None:
    """Run a job, with nothing of the job before in memory; report seconds and peak. Returns the peak, None if it failed."""
    print(f"{name} …", flush=True)
    start = time.perf_counter()
    try:
        with report.quiet(name):
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()
            memory_now(device)
            job()
            peak, reserved = peak_memory(device), peak_reserved(device)
        more = "resident, Python included" if reserved is None else f"allocated, {gb(reserved)} reserved"
        report.say(f"{name}: ok, {time.perf_counter() - start:.0f} s; peak: {gb(peak)} GB {more}")
        return peak
    except Exception as error:
        report.failed(error)
        return None
    finally:
        report.say(*(f"  {line}" for line in report.printed() if "memory ran out" in line))


def verb(name: str, words: list[str]) -> Callable[[], None]:
    """A command of `loramox` in this process, whose errors have their traceback."""
    return lambda: getattr(importlib.import_module(f"loramox.cli.{HOMES[name]}"), name)(words)


def check(report: Report, model: str, quantization: str, more: list[str], work: Path, device: str) -> bool:
    """All jobs on one model; whether none failed. Without the adapter of unlearn there is nothing else to do."""
    work.mkdir()
    rows, adapter = write_rows(work), str(work / "run/forget-adapter")
    on_cpu = ["--use_cpu", "true"] if device == "cpu" else []
    named = ["--model", model, "--quantization", quantization]
    words = [*named, *rows, "--auto_retain", "8", "--out", str(work / "run"), "--max_steps", str(STEPS), *on_cpu]
    words += ["--per_device_train_batch_size", str(BATCH), "--eval_rows", "8", "--per_device_eval_batch_size", "4"]
    words += ["--disable_tqdm", "true", "--logging_steps", "1"]
    plan: list[int] = []  # a failure leaves it empty
    measured(report, device, "plan", lambda: plan.append(plan_of(words)))
    with timed(device) as steps:
        peak = measured(report, device, "unlearn", verb("unlearn", words))
    if peak is None:
        return False
    off = f", {plan[0] / peak - 1:+.0%} of what was allocated" if plan and device != "cpu" else " of tensors"
    seconds, tokens = zip(*steps[WARM_UP:], strict=True)
    report.say(
        *(f"  plan predicted {gb(size)} GB{off}" for size in plan),
        f"  {statistics.median(seconds):.2f} s a step (the first: {steps[0][0]:.2f} s), {sum(tokens) / sum(seconds):,.0f} tokens a second",
    )
    if not (learned := any((entry.get("grad_norm") or 0) > 0 for entry in read_record(work / "run")["log"])):
        report.say("  WRONG: no gradient reached the adapter")
    asked = [*named, "--adapter", adapter, *rows, "--max_new_tokens", "8", "--batch_size", "8", *on_cpu]
    attack = ["--relearn_steps", "1", "--relearn_batch", "2", "--sample_count", "4", *more]
    jobs = {
        "evaluate": [*asked, "--out", str(work / "evaluated")],
        "attack": [*asked, *attack, "--out", str(work / "attacked")],
        "ship": ["merge", "--base", model, "--adapter", adapter, "--out", str(work / "merged")],
    }
    peaks = [measured(report, device, name, verb(name, words)) for name, words in jobs.items()]
    return bool(plan) and learned and None not in peaks


def in_time(minutes: float, trace: TextIO) -> None:
    """Raise `OutOfTime` when the time is up; a minute later, if a library hangs, end the process and write to `trace` where."""

    def late(*_: Any) -> None:
        raise OutOfTime(f"not done after {minutes:g} minutes (--minutes)")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, minutes * 60)
    faulthandler.dump_traceback_later(minutes * 60 + 60, exit=True, file=trace)


def cases(given: argparse.Namespace, work: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Name, folder, quantization and the attack's flags of the random model, then of the given one."""
    # Not requantize, which would write the model again: ship does that.
    attack = ["--attacks", "relearn", "forms", "context", "sample", "pair"]
    name = f"{given.shape}, random weights, {given.layers} of {given.all_layers} layers (--layers)"
    yield name, str(work / "model"), "none" if given.shape in FITS else "nf4", attack
    if given.model:
        yield given.model, given.model, "none" if given.device == "cpu" else "nf4", []


def run(report: Report, given: argparse.Namespace, work: Path) -> bool:
    """The check itself, in the child; whether all went well."""
    _report_progress()  # as the command line has it
    faulthandler.enable(report.output)  # where the process dies without a Python error
    try:
        in_time(given.minutes, report.output)
        report.say(*environment(given.device))
        ran = try_kernels(report, given.device)
        for number, (name, model, quantization, more) in enumerate(cases(given, work)):
            report.say(f"\n{name}, quantization {quantization}")
            if number == 0:
                with report.quiet("writing the model"):
                    random_model(given.shape, Path(model))
            in_time(given.minutes, report.output)
            ran &= check(report, model, quantization, more, work / str(number), given.device)
    except BaseException as error:
        report.failed(error)
        ran = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    report.say(f"\n{'All jobs ran.' if ran else 'Not all jobs ran.'} {END}", f"  {report.file}")
    return ran


def watch(report: Report, child: subprocess.Popen) -> int:
    """Wait for the child, and say how it ended where it could not say so itself; the exit code."""
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the child has it too, and reports it
        code = child.wait()
    finally:
        child.kill()
    if END not in report.file.read_text():
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        report.say(f"\nThe process ended by itself, with {how}. The last that was printed:")
        report.say(*report.printed()[-LAST_LINES:], "", END, f"  {report.file}")
        code = code or 1
    return code if code >= 0 else 128 - code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=16, help="Most layers of the random model.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", help="Folder or hub id of a real model, checked after the random one.")
    parser.add_argument("--minutes", type=float, default=20, help="After which it stops, for each model.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="Folder for all that is written.")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    work, given.all_layers = given.out / "work", SHAPES[given.shape]["num_hidden_layers"]
    given.layers = min(given.layers, given.all_layers)
    SHAPES[given.shape] = SHAPES[given.shape] | {"num_hidden_layers": given.layers}
    if given.child:
        sys.exit(not run(Report(given.out), given, work))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        if lacks := missing(given.device, given.shape, work, given.model):
            sys.exit(f"gpu-check: {lacks}")
        for name in ("report.txt", "output.txt"):
            (given.out / name).write_text("")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu-check: ended from outside"))
        report = Report(given.out)
        sys.exit(watch(report, subprocess.Popen([*CHILD, *sys.argv[1:]], stderr=report.output)))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
