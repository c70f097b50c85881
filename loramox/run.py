"""The folder of a run: check that it may be written or resumed, and keep its record."""

import contextlib
import functools
import importlib.metadata
import inspect
import json
import os
import platform
import re
import resource
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil
import torch
from accelerate import PartialState

from loramox.errors import RunError
from loramox.files import disk_may_fill, empty, has_files, is_passing, locked, read_json, write_json
from loramox.settings import setting

RECORD = "run.json"
PACKAGES = ("loramox", "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors")

# What loramox writes to the folder of a run, and the files by which it knows the folders of other results in it.
OF_RUN = (
    "trained",
    "forget-adapter",
    "combined-adapter",
    "retain-auto.jsonl",
    "guesses.jsonl",
)
# The files of a report, and how each begins: somebody else's file of such a name is neither replaced nor deleted.
OF_REPORT = {
    "report.html": r"\s*<!DOCTYPE html>.*?<title>[^<]*loramox[^<]*</title>",
    "report.json": r'\{\s*"request": \{',
    "summary.md": r"## What [^\n]* forgot\n",
}
MARKS = (RECORD, "provenance.json", "summary.json", "frontier.json", "attacks.json")

# Settings that may differ between a run and its continuation: they change what is shown, saved or held in memory, but not what is
# computed, except for rounding.
MAY_DIFFER = (
    "output_dir", "run_name", "disable_tqdm", "report_to", "logging_steps", "local_rank",
    "save_strategy", "save_steps", "save_total_limit",
    "activation_checkpointing", "activation_checkpointing_kwargs", "per_device_eval_batch_size", "reference_cache_gb",
    "gradient_checkpointing", "gradient_checkpointing_kwargs",  # the same by their older names, which transformers fills in
    "torch_empty_cache_steps",
    "drop_overlap",  # what it leaves is compared as data; older records lack it
)  # fmt: skip

SECRET = re.compile(r"--?[\w-]*(token|password|passphrase|key|secret)", re.IGNORECASE)
HIDDEN = "HIDDEN"


@dataclass
class RunConfig:
    """Where a run is written, and what to do with what is there."""

    out: str = setting("Folder to write.")
    resume: bool = setting("Continue the run in --out from its last complete checkpoint.", False)
    overwrite: bool = setting("Delete the run in --out and start again.", False)


P = ParamSpec("P")
T = TypeVar("T")


def one_writer(job: Callable[P, T]) -> Callable[P, T]:
    """Decorate a job whose first argument has `out`, the folder that it writes.

    Raises `RunError` at once when another process writes there, and when the disk fills up. Of several processes of one job the
    first one holds the folder, and they end together.
    """

    @functools.wraps(job)
    def held(*args: P.args, **kwargs: P.kwargs) -> T:
        config: Any = inspect.signature(job).bind(*args, **kwargs).args[0]
        again = "the same command with --resume" if hasattr(config, "resume") else "the same command"
        lock = locked(Path(config.out)) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext()
        with lock, disk_may_fill(f"Free some space on the disk of {config.out}, and go on with {again}"):
            done = job(*args, **kwargs)
            PartialState().wait_for_everyone()  # none leaves while another computes or writes
            return done

    return held


def resumed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings with which the run that `--resume` continues was started; {} where there is none to continue."""
    return read_record(Path(config.out))["settings"] if config.resume and _is_run(Path(config.out) / RECORD) else {}


def open_run(config: RunConfig, plan: dict[str, Any], disk_needed: int) -> None:
    """Check the folder, then write the run's plan (settings, data, base) to its record, before anything expensive.

    Raises `RunError` when the folder holds another run, or files that are no run; when the run in it was started with
    other settings, data or another base; when the disk has less than `disk_needed` bytes free.
    """
    out = Path(config.out)
    record = out / RECORD
    if config.resume and config.overwrite:
        raise RunError("--resume and --overwrite contradict each other: give one of them")
    is_run = _is_run(record)
    if config.resume and is_run:
        _same_run(record, plan)
    elif config.resume and has_files(out):
        raise RunError(
            f"--resume: {out} has files but no {RECORD} of loramox, so it is not a run. Give the folder of the run"
        )
    elif is_run and not config.overwrite:
        raise RunError(
            f"--out {out} holds a run already. Continue it with --resume, replace it with --overwrite, or choose another folder"
        )
    elif has_files(out) and not is_run:
        raise RunError(
            f"--out {out} has files in it that are not a run of loramox; they are left alone. Choose another folder"
        )
    # The checkpoints of a run that goes on are there already: new ones take their place.
    held = sum(file.stat().st_size for file in out.rglob("checkpoint-*/*") if file.is_file()) if config.resume else 0
    _check_disk(out, disk_needed - held)
    if config.overwrite and out.exists():
        _check_apart(out, plan)
        if others := not_of_run(out):
            raise RunError(
                f"--out {out} holds a run, and {others[0]}, which is not of it. Move that, or choose another folder"
            )
        empty(out)
    if not (config.resume and is_run):
        write_json(record, {"status": "running", **plan}, private=True)


def not_of_run(out: Path) -> list[Path]:
    """What is in the folder of a run and was not written by loramox, so that it must not be deleted with the run."""

    def ours(path: Path) -> bool:
        name = re.sub(r"^\.(.+)\.old$", r"\1", path.name)  # left by a kill between two renames
        return name in (RECORD, *OF_RUN) or is_passing(path) or result(path) or is_of_report(path)

    def result(path: Path) -> bool:
        """A folder of results, or of such folders; or a link, with which nothing is lost."""
        if path.is_symlink() or any((path / mark).is_file() for mark in MARKS):
            return True
        return path.is_dir() and all(is_passing(each) or result(each) for each in path.iterdir())

    return [path for path in sorted(out.glob("*")) if not ours(path)]


def is_of_report(path: Path) -> bool:
    """Whether it is a file that `loramox report` wrote, and not somebody else's of the same name."""
    if path.name not in OF_REPORT or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return bool(re.match(OF_REPORT[path.name], file.read(5000), re.DOTALL))


def _is_run(record: Path) -> bool:
    """Whether it is a record of loramox: other programs write a file of that name too, and theirs must not be deleted."""
    held = _read(record) if record.exists() else None
    return isinstance(held, dict) and all(isinstance(held.get(part), dict) for part in ("settings", "data", "base"))


def _same_run(record: Path, plan: dict[str, Any]) -> None:
    before = read_record(record.parent)
    if "strength" in before["settings"]:
        raise RunError(
            f"--resume: the run in {record.parent} was started by loramox 0.1, which trained in another way. Start anew with --overwrite, or "
            "finish it with 0.1"
        )
    for part in ("settings", "data", "base"):
        then, now = before.get(part, {}), json.loads(json.dumps(plan[part]))
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name) and name not in MAY_DIFFER:
                what = "was trained on another base model" if part == "base" else "was started otherwise"
                raise RunError(
                    f"--resume: the run in {record.parent} {what}: {part}.{name} was {then.get(name)}, is {now.get(name)}. "
                    "Give what it was started with, or start anew with --overwrite"
                )


def _check_apart(out: Path, plan: dict[str, Any]) -> None:
    """Nothing that the new run reads is deleted with the old one."""
    read = [part["source"] for part in plan["data"].values()] + [plan["base"].get("model")]
    read += [plan["settings"].get(name) for name in ("reinforced", "refusals", "tuned_adapter", "memorize_at")]
    for source in filter(None, read):
        if Path(source).exists() and out.resolve() in Path(source).resolve().parents:
            raise RunError(
                f"--overwrite would delete {source}, which this run reads: it is in --out {out}. Move it, or choose another folder"
            )


def _check_disk(out: Path, needed: int) -> None:
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise RunError(
            f"--out {out}: {free / 1e6:,.0f} MB are free there, and the checkpoints of this run need {needed / 1e6:,.0f} MB. Free some, "
            "choose another disk, or lower --r"
        )


def read_record(out: Path) -> dict[str, Any]:
    """The run's record. Raises `RunError` when it is damaged."""
    return _read(out / RECORD, dict)


def _read(record: Path, kind: type | None = None) -> Any:
    try:
        return read_json(record, kind)
    except RunError as error:
        raise RunError(f"{error}. Restore it, or choose another folder") from error


def update_record(out: Path, **more: Any) -> None:
    """Add to the run's record, atomically."""
    write_json(out / RECORD, read_record(out) | more, private=True)


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def command() -> str:
    """The command line of this process, quoted so that a shell takes it, without the values of flags that hold a secret."""
    program = os.path.basename(sys.argv[0])
    words, hide = [], False
    for word in sys.argv[1:]:
        flag, equals, _ = word.partition("=")
        secret = bool(SECRET.fullmatch(flag))
        if hide and not word.startswith("--"):
            word = HIDDEN
        elif secret and equals:
            word = f"{flag}={HIDDEN}"
        words.append(word)
        hide = secret and not equals
    return shlex.join(["loramox" if program == "__main__.py" else program, *words])


def memory_now(device: torch.device | str = "cpu") -> int:
    """Bytes in use, allocated on the GPU or, for the CPU, resident in this process; their peak is counted from here on."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):  # where there is no such file, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at their highest since `memory_now`: allocated on the GPU or, for the CPU, resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent process had before it started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_reserved(device: torch.device | str = "cpu") -> int | None:
    """Bytes that torch has taken from the GPU at most, which is what the GPU needs to have; None for the CPU."""
    return torch.cuda.max_memory_reserved(device) if torch.device(device).type == "cuda" else None
