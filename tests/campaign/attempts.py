"""Run a command of loramox as a child of this process, in its own folder, and kill it or leave it alone."""

import functools
import importlib
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from conftest import PEOPLE, byte_level, questions, write_pico

import loramox
from loramox.cli import main

CPU_SECONDS, WALL_SECONDS, MEMORY = 20, 120, 4 << 30  # for one command; more is a hang, or a file read without a limit
ROWS = "--forget rows/forget.jsonl --retain rows/retain.jsonl"
TRAINING = (
    "--model base --quantization none --r 4 --lora_alpha 8 --use_cpu true --num_train_epochs 2 --learning_rate 1e-2 --alpha 2 "
    "--per_device_train_batch_size 2 --save_strategy steps --save_steps 1 --save_total_limit 3 --logging_steps 1 "
    "--report_to none --disable_tqdm true"
)
ADD = "--forget rows/{0}.jsonl --retain rows/retain.jsonl --id {0} " + TRAINING
SCORING = f"{ROWS} --use_cpu true --max_new_tokens 2"
MODEL = f"--model base --quantization none --adapter run/forget-adapter {SCORING}"
JOBS = {  # (the command, the folder of its result, the flag that continues it)
    "unlearn": (f"unlearn {ROWS} {TRAINING} --out out", "out", "--resume"),
    "extrapolate": ("extrapolate run/trained --out out", "out", ""),
    "extrapolate --overwrite": ("extrapolate run/trained --out run/forget-adapter --overwrite", "run/forget-adapter", ""),
    "requests add": (f"requests add one {ADD.format('b')}", "one", "--resume"),
    "requests revoke": ("requests revoke ledger a", "ledger", ""),
    "requests refresh": ("requests refresh stale", "stale", "--resume"),
    "requests build": ("requests build ledger --out out", "out", ""),
    "requests build --overwrite": ("requests build ledger --out built --overwrite", "built", ""),
    "ship merge": ("ship merge --adapter run/forget-adapter --out out", "out", ""),
    "ship merge --quantize nf4": ("ship merge --adapter run/forget-adapter --quantize nf4 --force true --out out", "out", ""),
    "sweep": (f"sweep --trained run/trained {SCORING} --alphas 1 2 --refine 1 --out out", "out", ""),
    "evaluate": (f"evaluate {MODEL} --out out", "out", ""),
    "attack": (f"attack {MODEL} --relearn_share 0.25 --relearn_steps 1 2 --out out", "out", ""),
    "report": ("report run", "run", ""),
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"}
# Keys of JSON files that hold times, or checksums of files that do.
VARIES = {
    "command", "training_command", "seconds", "when", "revoked", "timings", "memory", "reused", "files", "digest", "log", "log_history",
    "trainer_state.json", "momentum.safetensors",
}  # fmt: skip


class Ended(NamedTuple):
    code: int  # below 0: the signal
    said: str
    operations: int  # on files in its folder
    seconds: float  # of CPU

    def fault(self) -> str | None:
        """The fault, if the command ended as none may."""
        last = (self.said.strip().splitlines() or [""])[-1][:160]
        if "Traceback (most recent call last)" in self.said:
            return f"traceback: {last}"
        hung = self.code in (-signal.SIGXCPU, -signal.SIGALRM)
        return "hang" if hung else f"exit code {self.code}: {last}" if self.code not in (0, 1, 2) else None


def run(folder: Path, words: str, at_operation: int = 0, after: float = 0.0) -> Ended:
    """Run a command; kill it at its n-th operation on files or after so many seconds of CPU, if either is given."""
    child = os.fork()
    if not child:
        _obey(folder, words.split(), at_operation, after)
    _, status, used = os.wait4(child, 0)
    counted = folder / ".operations"
    operations = int(counted.read_text()) if counted.exists() else 0
    counted.unlink(missing_ok=True)
    said = (folder / ".said").read_text(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), said, operations, used.ru_utime + used.ru_stime)


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
    signal.setitimer(signal.ITIMER_PROF, after)  # SIGPROF, which nothing handles, ends a process as SIGKILL does
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if (
            event in OPERATIONS
            and isinstance(args[0], str | os.PathLike)
            and (event != "open" or (args[2] or 0) & WRITES)
        ):
            seen += os.path.abspath(args[0]).startswith(str(folder))
            if seen == at_operation:
                os.kill(os.getpid(), signal.SIGKILL)

    if at_operation or not after:
        sys.addaudithook(watch)
    code = 1
    try:
        main(words)
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0
    except BaseException:
        traceback.print_exc()
    Path(".operations").write_text(str(seen))
    os._exit(code)


def build_world(folder: Path) -> None:
    """Make the folder that each attempt copies: a model, rows, a run, ledgers. Its imports are paid once, by this process."""
    for module in pkgutil.walk_packages(loramox.__path__, "loramox."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("transformers.models.llama.modeling_llama")
    (folder / "rows").mkdir(parents=True)
    for name, people in (("forget", PEOPLE[:4]), ("retain", PEOPLE[4:10]), ("a", PEOPLE[10:12]), ("b", PEOPLE[12:14])):
        (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(people)))
    child = os.fork()  # so that no thread of the tokenizer's training is left in this process
    if not child:
        write_pico("llama", folder / "base", byte_level())
        os._exit(0)
    os.waitpid(child, 0)
    _well(folder, f"unlearn {ROWS} {TRAINING} --out run")
    # A run as a kill leaves it: two checkpoints, and a step to go.
    (folder / "killed").mkdir()
    shutil.copy(folder / "run/run.json", folder / "killed")
    checkpoints = sorted((folder / "run/trained").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in checkpoints[:-1]:
        shutil.copytree(checkpoint, folder / "killed/trained" / checkpoint.name)
    for name in ("sweep", "attack"):
        _well(folder, JOBS[name][0].replace("--out out", f"--out run/{name}"))
    _well(folder, f"requests add one {ADD.format('a')}")
    shutil.copytree(folder / "one", folder / "ledger")
    _well(folder, f"requests add ledger {ADD.format('b')}")
    _well(folder, "requests build ledger --out built")
    shutil.copytree(folder / "ledger", folder / "stale")
    _well(folder, "requests revoke stale a")


def _well(folder: Path, words: str) -> Ended:
    if (ended := run(folder, words)).code:
        raise RuntimeError(f"loramox {words} must work before anything is disturbed\n{ended.said}")
    return ended


@functools.cache
def undisturbed(world: Path, words: str, result: str) -> tuple[Ended, dict[str, Any]]:
    """How a command ends that nothing disturbs, and its result."""
    folder = shutil.copytree(world, world.with_name(f"undisturbed-{os.getpid()}"))
    found = _well(folder, words), contents(folder, result)
    shutil.rmtree(folder)
    return found


def contents(folder: Path, result: str) -> dict[str, Any]:
    """The files of a result: weights whole, JSON without what varies, of all others the name."""
    found: dict[str, Any] = {}
    for path in filter(Path.is_file, (folder / result).rglob("*")):
        name, parts = str(path.relative_to(folder / result)), []
        if path.suffix == ".safetensors":  # its header has its keys in any order
            data = path.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            parts = [json.loads(data[8:end]), data[end:]]
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text().replace(str(folder), "").strip()
            texts = text.split("\n") if path.suffix == ".jsonl" else [text]
            parts = [json.loads(each, object_hook=lambda d: {k: d[k] for k in d.keys() - VARIES}) for each in texts]
        found[name] = parts
    return found


def difference(expected: Any, found: Any, place: str = "") -> str | None:
    """The first place where two results differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        every = [
            (expected.get(k, "nothing"), found.get(k, "nothing"), f"{place}/{k}") for k in sorted({*expected, *found})
        ]
        return next(filter(None, (difference(*each) for each in every)), None)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return next(filter(None, (difference(e, f, place) for e, f in zip(expected, found, strict=True))), None)
    return None if expected == found else f"{place} is {str(found)[:60]}, was {str(expected)[:60]}"


def kill(world: Path, folder: Path, kind: str, random: Random) -> tuple[str, str, str | None]:
    """Kill a command once or twice, then run it to its end: how it was killed, how it ended, and the fault."""
    (words, result, again), how = JOBS[kind], "killed "
    expected, files = undisturbed(world, words, result)
    ledger = words.split()[2] if kind.startswith("requests") else ""
    for _ in range(random.choice((1, 1, 1, 2))):
        operation, after = random.randint(1, expected.operations), round(random.uniform(0.01, expected.seconds), 2)
        by_operation = random.random() < 0.7
        killed = run(folder, words, at_operation=operation) if by_operation else run(folder, words, after=after)
        how += f"at file operation {operation}, " if by_operation else f"after {after} s, "
        if killed.code not in (-signal.SIGKILL, -signal.SIGPROF) and killed.fault():
            return how, "", f"before the kill: {killed.fault()}"
        if (folder / ledger / "ledger.json").exists() and (verified := run(folder, f"requests verify {ledger}")).code:
            return how, "", f"verify: {' '.join(verified.said.split())[:200]}"
        words = f"{JOBS[kind][0]} {again}"
    ended = run(folder, words)
    # Older checkpoints are no result, and what verify calls left over stays in staging until the next request.
    found = [
        {n: v for n, v in of.items() if not re.search("^staging/|checkpoint-", n)}
        for of in (files, contents(folder, result))
    ]
    fault = ended.fault() or difference(*found)
    return how, "same", fault and f"{fault}; it said: {' '.join(ended.said.split())[-160:]}"
