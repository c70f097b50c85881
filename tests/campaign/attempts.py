"""Disturb a command, run it again, and compare its result with that of one left alone."""

import errno
import functools
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from campaign.processes import VICTIMS, Disturbance, Ended, run, run_two, start, torchrun, wait
from conftest import PEOPLE, byte_level, questions, write_pico

import loramox

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
    "attack": (f"attack {MODEL} --attacks relearn requantize pair --relearn_share 0.25 --relearn_steps 1 2 --out out", "out", ""),
    "report": ("report run", "run", ""),
}  # fmt: skip
# The same for two processes, as torchrun starts them.
PAIRS = {
    "unlearn": (f"{JOBS['unlearn'][0]} --ddp_backend gloo", "out", "--resume"),
    "sweep": JOBS["sweep"],
    "evaluate": JOBS["evaluate"],
}
# The same under torchrun itself, and the files at whose sight it is killed: not as many as `VICTIMS`, so that all pairs come.
# torchrun takes --r for one of its own flags.
TORCHRUN = {"unlearn": (f"{PAIRS['unlearn'][0]} --num_train_epochs 4".replace("--r ", "--lora_r "), "out", "--resume")}
MOMENTS = (
    "trained/checkpoint-1",
    "trained/checkpoint-3/momentum.safetensors",
    "run.json",
    "trained/provenance.json",
    "trained/checkpoint-2",
)
# Keys of JSON files that hold times, or checksums of files that do.
VARIES = {
    "command", "training_command", "seconds", "when", "revoked", "timings", "memory", "reused", "files", "digest", "log", "log_history",
    "trainer_state.json", "momentum.safetensors",
}  # fmt: skip


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


def _well(folder: Path, words: str, how: Callable[[Path, str], Ended] = run) -> Ended:
    if (ended := how(folder, words)).code:
        raise RuntimeError(f"loramox {words} must work before anything is disturbed\n{ended.said}")
    return ended


@functools.cache
def undisturbed(world: Path, words: str, result: str, processes: int = 1) -> tuple[Ended, dict[str, Any]]:
    """How a command ends that nothing disturbs, and its result."""
    folder = shutil.copytree(world, world.with_name(f"undisturbed-{os.getpid()}"))
    found = _well(folder, words, run if processes == 1 else run_two), contents(folder, result)
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


def kill(world: Path, folder: Path, kind: str, number: int, random: Random) -> tuple[str, str, str | None]:
    """Kill a command once or twice, then run it to its end: how it was killed, how it ended, and the fault."""
    (words, result, again), how = JOBS[kind], "killed "
    expected, files = undisturbed(world, words, result)
    for _ in range(random.choice((1, 1, 1, 2))):
        operation, after = random.randint(1, expected.operations), round(random.uniform(0.01, expected.seconds), 2)
        by_operation = random.random() < 0.7
        killed = run(folder, words, Disturbance(operation) if by_operation else Disturbance(kill_after=after))
        how += f"at file operation {operation}, " if by_operation else f"after {after} s, "
        if killed.code not in (-signal.SIGKILL, -signal.SIGPROF) and killed.fault():
            return how, "", f"before the kill: {killed.fault()}"
        if fault := _ledger_fault(folder, words):
            return how, "", fault
        words = f"{JOBS[kind][0]} {again}"
    return how, "same", _finish(folder, words, result, files)


def fill(world: Path, folder: Path, kind: str, number: int, random: Random) -> tuple[str, str, str | None]:
    """Fill the disk under a command, at an operation or within a file; then make room and run it to its end."""
    words, result, again = JOBS[kind]
    expected, files = undisturbed(world, words, result)
    if random.random() < 0.7:
        full = Disturbance(full_at=random.randint(1, expected.operations))
        how = f"full at file operation {full.full_at}"
    else:
        full = Disturbance(largest=round(2 ** random.uniform(13, 19)))
        how = f"no file over {full.largest} bytes"
    filled = run(folder, words, full)
    if fault := filled.fault() or _ledger_fault(folder, words):
        return how, "", f"while the disk is full: {fault}"
    if filled.code and not ("the disk filled up" in filled.said or os.strerror(errno.ENOSPC) in filled.said):
        return how, "", f"it does not say that the disk is full: {' '.join(filled.said.split())[-160:]}"
    return how, "same", _finish(folder, f"{words} {again}", result, files)


def twice(world: Path, folder: Path, kind: str, number: int, random: Random) -> tuple[str, str, str | None]:
    """Run a command twice at once: one does its work, the other is refused or finds it done."""
    words, result, _ = JOBS[kind]
    expected, files = undisturbed(world, words, result)
    pause = round(random.uniform(0, expected.seconds), 2)
    first = start(folder, words)
    time.sleep(pause)
    second = start(folder, words)
    both = [wait(folder, child) for child in (first, second)]
    fault = next((fault for each in both if (fault := each.fault())), None)
    if all(each.code for each in both):
        fault = fault or f"neither did it: {' '.join(both[1].said.split())[-160:]}"
    return (
        f"the second {pause} s later",
        "same",
        fault or difference(*map(_compared, (files, contents(folder, result)))),
    )


def kill_torchrun(world: Path, folder: Path, kind: str, number: int, random: Random) -> tuple[str, str, str | None]:
    """Kill torchrun or its processes when a file is there, each pair of the two in its turn; then start it again."""
    words, result, again = TORCHRUN[kind]
    files = undisturbed(world, words, result, processes=2)[1]
    victim, moment = [*VICTIMS][number % len(VICTIMS)], MOMENTS[number % len(MOMENTS)]
    torchrun(folder, words, victim, f"{result}/{moment}")
    fault = _finish(folder, f"{words} {again}", result, files, torchrun)
    return f"{victim} killed when {moment} was there", "same", fault


def kill_pair(world: Path, folder: Path, kind: str, number: int, random: Random) -> tuple[str, str, str | None]:
    """Kill one of the two processes of a command, and with it the other as torchrun does; then run both to their end."""
    words, result, again = PAIRS[kind]
    expected, files = undisturbed(world, words, result, processes=2)
    after = round(random.uniform(0.01, expected.seconds), 2)
    killed = run_two(folder, words, after, random)
    if killed.code not in (-signal.SIGKILL, -signal.SIGPROF) and killed.fault():
        return f"killed after {after} s", "", f"before the kill: {killed.fault()}"
    return f"killed after {after} s", "same", _finish(folder, f"{words} {again}", result, files, run_two)


def _finish(
    folder: Path, words: str, result: str, files: dict[str, Any], how: Callable[[Path, str], Ended] = run
) -> str | None:
    """Run a command to its end; the fault, if its result is not that of an undisturbed one."""
    ended = how(folder, words)
    fault = ended.fault() or difference(*map(_compared, (files, contents(folder, result))))
    return fault and f"{fault}; it said: {' '.join(ended.said.split())[-160:]}"


def _compared(files: dict[str, Any]) -> dict[str, Any]:
    """Older checkpoints are no result, and what verify calls left over stays in staging until the next request."""
    return {name: parts for name, parts in files.items() if not re.search("^staging/|checkpoint-", name)}


def _ledger_fault(folder: Path, words: str) -> str | None:
    ledger = words.split()[2] if words.startswith("requests") else ""
    if (
        not (folder / ledger / "ledger.json").exists()
        or not (verified := run(folder, f"requests verify {ledger}")).code
    ):
        return None
    return f"verify: {' '.join(verified.said.split())[:200]}"
