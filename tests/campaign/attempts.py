"""One attempt: a command of loramox in its own folder, as a child of this process, killed or left alone."""

import functools
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from conftest import PEOPLE, byte_level, questions, write_pico

# A child inherits these imports, so that each attempt costs only its own work.
import loramox
from loramox.cli import main

CPU_SECONDS, WALL_SECONDS, MEMORY = 20, 120, 4 << 30  # of one command; more is a hang, or a file read without a limit
ROWS = "--forget rows/forget.jsonl --retain rows/retain.jsonl"
TRAINING = (
    "--model base --quantization none --r 4 --lora_alpha 8 --use_cpu true --num_train_epochs 2 --learning_rate 1e-2 --alpha 2 "
    "--per_device_train_batch_size 2 --save_strategy steps --save_steps 1 --save_total_limit 3 --logging_steps 1 --report_to none "
    "--disable_tqdm true"
)
ADD = "--forget rows/{0}.jsonl --retain rows/retain.jsonl --id {0} " + TRAINING
SCORING = f"{ROWS} --use_cpu true --max_new_tokens 2"


class Job(NamedTuple):
    words: str
    result: str = "out"  # the folder that holds it
    again: str = ""  # added to the command after a kill


JOBS = {
    "unlearn": Job(f"unlearn {ROWS} {TRAINING} --out out", again="--resume"),
    "extrapolate": Job("extrapolate run/trained --out out"),
    "extrapolate --overwrite": Job("extrapolate run/trained --out run/forget-adapter --overwrite", "run/forget-adapter"),
    "requests add": Job(f"requests add one {ADD.format('b')}", "one", "--resume"),
    "requests revoke": Job("requests revoke ledger a", "ledger"),
    "requests refresh": Job("requests refresh stale", "stale", "--resume"),
    "requests build": Job("requests build ledger --out out"),
    "requests build --overwrite": Job("requests build ledger --out built --overwrite", "built"),
    "ship merge": Job("ship merge --adapter run/forget-adapter --out out"),
    "ship merge --quantize nf4": Job("ship merge --adapter run/forget-adapter --quantize nf4 --force true --out out"),
    "sweep": Job(f"sweep --trained run/trained {SCORING} --alphas 1 2 --refine 1 --out out"),
    "evaluate": Job(f"evaluate --model base --quantization none --adapter run/forget-adapter {SCORING} --out out"),
    "attack": Job(
        f"attack --model base --quantization none --adapter run/forget-adapter {SCORING} --relearn_share 0.25 --relearn_steps 1 2 --out out"
    ),
    "report": Job("report run", "run"),
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod")
# Of JSON: times, paths of this attempt, and digests of files that hold such.
VARIES = {
    "command", "training_command", "seconds", "when", "revoked", "timings", "memory", "reused", "files", "digest", "log_history",
    "train_runtime", "eval_runtime", "log",
}  # fmt: skip


class Ended(NamedTuple):
    """How a command ended."""

    code: int  # of its exit; below 0: the signal that ended it
    said: str
    operations: int  # on files of its folder
    seconds: float  # of CPU

    def fault(self) -> str | None:
        """The fault, if it ended as no command may."""
        lines = self.said.strip().splitlines() or [""]
        if "Traceback (most recent call last)" in self.said:
            return f"traceback: {lines[-1][:160]}"
        if self.code in (-signal.SIGXCPU, -signal.SIGALRM):
            return f"hang: over {CPU_SECONDS} s of CPU, or {WALL_SECONDS} s"
        return f"exit code {self.code}: {lines[-1][:160]}" if self.code not in (0, 1, 2) else None


def run(folder: Path, words: str, at_operation: int = 0, after: float = 0.0) -> Ended:
    """Run a command in a folder. It dies at its n-th operation on files, or after so many seconds of CPU, where that is given."""
    child = os.fork()
    if not child:
        _obey(folder, words.split(), at_operation, after)
    _, status, used = os.wait4(child, 0)
    said = (folder / ".said").read_text(errors="replace")
    counted = folder / ".operations"
    count = int(counted.read_text()) if counted.exists() else 0
    counted.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), said, count, used.ru_utime + used.ru_stime)


def _obey(folder: Path, words: list[str], at_operation: int, after: float) -> None:
    os.chdir(folder)
    said = os.open(".said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    sys.argv = ["loramox", *words]
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    if after:
        signal.setitimer(signal.ITIMER_PROF, after)  # SIGPROF, which nothing handles, ends a process as SIGKILL does
    count = _die_at(at_operation, str(folder))
    code = 1
    try:
        main(words)
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        Path(".operations").write_text(str(count()))
        os._exit(code)


def _die_at(operation: int, folder: str) -> Callable[[], int]:
    """Kill this process at its n-th operation on a file of the folder; return a function that gives their number so far."""
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in OPERATIONS or not isinstance(args[0], str | os.PathLike):
            return
        path, opened = os.fspath(args[0]), event == "open"
        if (os.path.isabs(path) and not path.startswith(folder)) or (opened and not (args[2] or 0) & WRITES):
            return
        seen += 1
        if seen == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return lambda: seen


def build_world(folder: Path) -> None:
    """The folder that each attempt gets a copy of: a pico model, rows, and a result of every command."""
    for module in pkgutil.walk_packages(loramox.__path__, "loramox."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("transformers.models.llama.modeling_llama")
    (folder / "rows").mkdir(parents=True)
    parts = {"forget": PEOPLE[:4], "retain": PEOPLE[4:10], "a": PEOPLE[10:12], "b": PEOPLE[12:14]}
    for name, people in parts.items():
        (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in questions(people)))
    child = os.fork()  # no thread that training a tokenizer starts is left in this process
    if not child:
        write_pico("llama", folder / "base", byte_level())
        os._exit(0)
    os.waitpid(child, 0)
    _well(folder, f"unlearn {ROWS} {TRAINING} --out run")
    # A run as a kill leaves it: two checkpoints, and steps to go.
    shutil.copytree(folder / "run", folder / "killed")
    shutil.rmtree(folder / "killed" / "forget-adapter")
    *_, last = checkpoints = sorted((folder / "killed/trained").glob("checkpoint-*"), key=lambda c: c.stat().st_mtime)
    for path in (folder / "killed" / "trained").iterdir():
        if path not in checkpoints or path == last:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("sweep", "attack"):
        _well(folder, JOBS[name].words.replace("--out out", f"--out run/{name}"))
    _well(folder, f"requests add one {ADD.format('a')}")
    shutil.copytree(folder / "one", folder / "ledger")
    _well(folder, f"requests add ledger {ADD.format('b')}")
    shutil.copytree(folder / "ledger", folder / "stale")
    _well(folder, "requests revoke stale a")
    _well(folder, "requests build ledger --out built")
    (folder / ".said").unlink()


def _well(folder: Path, words: str) -> Ended:
    if (ended := run(folder, words)).code:
        raise RuntimeError(f"loramox {words} must work before anything is disturbed\n{ended.said}")
    return ended


@functools.cache
def undisturbed(world: Path, words: str, result: str) -> tuple[Ended, dict[str, Any]]:
    """How a command ends that nobody disturbs, and its result."""
    folder = world.with_name(f"undisturbed-{os.getpid()}")
    shutil.copytree(world, folder)
    ended, files = _well(folder, words), contents(folder / result)
    shutil.rmtree(folder)
    return ended, files


def contents(folder: Path) -> dict[str, Any]:
    """The files of a folder: weights as bytes, JSON without times; of all others the name counts."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".json", ".jsonl") and path.is_file():
            text = path.read_text()
            found[name] = [
                _steady(json.loads(each)) for each in (text.strip().split("\n") if "jsonl" in name else [text])
            ]
        elif not path.is_dir():
            found[name] = path.read_bytes() if path.suffix == ".safetensors" else None
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(each) for key, each in value.items() if key not in VARIES}
    return [_steady(each) for each in value] if isinstance(value, list) else value


def difference(expected: Any, found: Any, place: str = "") -> str | None:
    """Where two results differ first."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if key not in found or key not in expected:
                return f"{place}/{key} is {'missing' if key in expected else 'left over'}"
            if differs := difference(expected[key], found[key], f"{place}/{key}"):
                return differs
        return None
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return next(filter(None, map(difference, expected, found, [place] * len(found))), None)
    return None if expected == found else f"{place} differs"


def kill(world: Path, folder: Path, kind: str, random: Random) -> tuple[str, str, str | None]:
    """Kill a command once or twice, then run it to its end: how it was killed, how it ended, and the fault."""
    job, how = JOBS[kind], []
    expected, result = undisturbed(world, job.words, job.result)
    words, ledger = job.words, job.words.split()[2:3]
    for _ in range(random.choice((1, 1, 1, 2))):
        operation, after = random.randint(1, expected.operations), random.uniform(0.01, expected.seconds)
        by_operation = random.random() < 0.7
        killed = run(folder, words, operation) if by_operation else run(folder, words, after=after)
        how.append(f"at operation {operation}" if by_operation else f"after {after:.2f} s")
        if killed.code not in (-signal.SIGKILL, -signal.SIGPROF) and killed.fault():
            return ", ".join(how), "", f"before the kill: {killed.fault()}"
        if kind.startswith("requests") and (folder / ledger[0] / "ledger.json").exists():
            verified = run(folder, f"requests verify {ledger[0]}")
            if verified.code:
                return ", ".join(how), "", f"verify: {' '.join(verified.said.split())[:200]}"
        words = f"{job.words} {job.again}"
    ended = run(folder, words)
    fault = ended.fault() or difference(result, contents(folder / job.result))
    return ", ".join(how), "same", fault and f"{fault}; it said: {' '.join(ended.said.split())[-160:]}"
