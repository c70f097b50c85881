"""Files that loramox reads, damaged: the command ends with the same result, or with an error that says why."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from campaign.attempts import JOBS, ROWS, TRAINING, contents, difference, undisturbed
from campaign.processes import run
from peft import PeftModel
from signing import sign
from transformers import AutoModelForCausalLM

VALUES = [
    None, True, False, 0, -1, 3, 16, 0.5, 1e308, float("nan"), 10**400, "", "x", "none", "(", "../../x", "\u001b[31m", "\ud800", [], {}, [0], ["q_proj"],
    [[0, 1]], {"q_proj": 4}, {"(": 4}, {"": None}, "a" * 100_000,
]  # fmt: skip


WAYS = (
    "another value", "cut", "a pipe", "bytes lost", "endless", "bytes put in", "empty", "other bytes", "missing", "another bit", "a folder",
    "nested deeply",
)  # fmt: skip
COMPARED = (".safetensors", "records.jsonl", "frontier.json", "attacks.json")


class Target(NamedTuple):
    files: tuple[str, ...]  # one of them is damaged
    commands: tuple[str, ...]
    result: str | None = "out"  # of the last command; None where it may be another one
    adapter: str | None = None  # which may make another result, if PEFT makes another model of it


COMMANDS = {name: words for name, (words, _, _) in JOBS.items()}
MERGE, EVALUATE, RESUME = (
    COMMANDS["ship merge"],
    COMMANDS["evaluate"],
    f"unlearn {ROWS} {TRAINING} --out killed --resume",
)
SWEEP, ATTACK = (COMMANDS[name].replace("--out out", f"--out run/{name}") for name in ("sweep", "attack"))
SHIPPED, TRAINED = "run/forget-adapter", "run/trained/momentum"
TARGETS = {
    "adapter, ship check": Target((f"{SHIPPED}/*",), (f"ship check {SHIPPED} --base base",), None),
    "adapter, ship merge": Target((f"{SHIPPED}/*",), (MERGE,), adapter=SHIPPED),
    "adapter, evaluate": Target((f"{SHIPPED}/*",), (EVALUATE,), adapter=SHIPPED),
    "trained, extrapolate": Target(("run/trained/*.json", f"{TRAINED}/*"), (COMMANDS["extrapolate"],), adapter=TRAINED),
    "rows, evaluate": Target(("rows/forget.jsonl", "rows/retain.jsonl"), (EVALUATE,)),
    "ledger, verify and build": Target(("ledger/*.json", "ledger/requests/*/*"), ("requests verify ledger", COMMANDS["requests build"])),
    "ledger, add": Target(("one/*.json", "one/requests/*/*"), (COMMANDS["requests add"],), None),
    "checkpoint, unlearn --resume": Target(("killed/trained/checkpoint-*/*",), (RESUME,), "killed/forget-adapter"),
    "run.json, unlearn --resume": Target(("killed/run.json",), (RESUME,), "killed/forget-adapter"),
    "sweep, sweep again": Target(("run/sweep/*.json", "run/sweep/*/*"), (SWEEP,), "run/sweep"),
    "attack, attack again": Target(("run/attack/*.json", "run/attack/*/*"), (ATTACK,), "run/attack"),
    "run, report": Target(("run/*.json", "run/sweep/*.json", "run/sweep/*/*", "run/attack/*"), ("report run",), None),
}  # fmt: skip


def way_of(target: str, number: int) -> str:
    """How an attempt damages a file: each target meets all ways in as many attempts, and begins elsewhere than its neighbours."""
    return WAYS[(number + 5 * list(TARGETS).index(target)) % len(WAYS)]


def damage(path: Path, way: str, random: Random) -> str:
    """Change a file in one of `WAYS`, and say how: one value of a JSON file, or bytes, or everything."""
    if way == "another value":
        return f"{way}: {path.name}, {_other_value(path, random)}"
    old, garbage = path.read_bytes(), random.randbytes(random.randrange(1, 64))
    at = random.randrange(len(old) or 1)
    before, after = old[:at], old[at:]
    bytes_instead = {
        "cut": before,
        "bytes lost": before + after[len(garbage) :],
        "bytes put in": before + garbage + after,
        "other bytes": before + garbage + after[len(garbage) :],
        "another bit": before + bytes(byte ^ 1 << random.randrange(8) for byte in after[:1]) + after[1:],
        "empty": b"",
        "nested deeply": b"[" * 100_000,
    }
    if way in bytes_instead:
        path.write_bytes(bytes_instead[way])
        return f"{way}: {path.name}, {len(garbage)} bytes at {at}"
    path.unlink()
    other_things: dict[str, Callable[[Path], Any]] = {
        "missing": bool,
        "a folder": Path.mkdir,
        "a pipe": os.mkfifo,
        "endless": lambda new: new.symlink_to("/dev/zero"),
    }
    other_things[way](path)
    return f"{way}: {path.name}"


def _other_value(path: Path, random: Random) -> str:
    lines = path.read_text().strip().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    number, value, place = random.randrange(len(lines)), random.choice(VALUES), ""
    whole = inside = json.loads(lines[number])
    while isinstance(inside, dict | list) and inside and (not place or random.random() < 0.6):
        holder, key = inside, random.choice([*inside] if isinstance(inside, dict) else range(len(inside)))
        place, inside = f"{place}/{key}", holder[key]
    if place:
        holder[key] = value
    lines[number] = json.dumps(whole)
    path.write_text("\n".join(lines) + "\n")
    return f"{place} is {str(value)[:20]!r}"


def mutate(world: Path, folder: Path, kind: str, number: int, random: Random) -> tuple[str, str, str | None]:
    """Damage a file and run what reads it: how it was damaged, how the last command ended, and the fault."""
    target = TARGETS[kind]
    way = way_of(kind, number)
    suffixes = (".json", ".jsonl") if way == "another value" else ("",)
    paths = sorted({path for pattern in target.files for path in folder.glob(pattern) if path.is_file()})
    path = random.choice([path for path in paths if path.name.endswith(suffixes)])
    before = path.read_bytes()
    how = damage(path, way, random)
    if target.adapter and path.name == "adapter_model.safetensors" and path.is_file() and random.random() < 0.5:
        sign(folder / target.adapter)
        how += ", signed"
    for words in target.commands:
        ended = run(folder, words)
        if ended.fault():
            return how, "", ended.fault()
    if ended.code or not target.result:
        return how, "refused" if ended.code else "done", None
    expected, found = undisturbed(world, target.commands[-1], target.result)[1], contents(folder, target.result)
    fault = difference(*({n: v for n, v in files.items() if n.endswith(COMPARED)} for files in (expected, found)))
    if fault and kind == "rows, evaluate":
        fault = _lost_row(path, before, found["records.jsonl"])
    elif fault and target.adapter:
        fault = _unlike_peft(world, folder, target.adapter, merged=words == MERGE)
    return how, "same" if not fault else "", fault


def _lost_row(path: Path, before: bytes, records: list[dict[str, Any]]) -> str | None:
    """The rows that were not touched have to be in the records."""
    kept = set(before.split(b"\n")) & set(path.read_bytes().split(b"\n")) - {b""}
    lost = {json.loads(line)["answer"] for line in kept} - {
        r["answer"].strip() for r in records if r["part"] == path.stem
    }
    return f"lost {lost}" if lost else None


def _unlike_peft(world: Path, folder: Path, adapter: str, merged: bool) -> str | None:
    """A changed adapter may have another result, if PEFT makes another model of it; what is merged is PEFT's model."""
    try:
        ours = AutoModelForCausalLM.from_pretrained(folder / "out") if merged else _by_peft(world, adapter)
        theirs = _by_peft(folder, adapter).state_dict()
    except Exception as error:
        return f"accepted, and PEFT refuses it: {type(error).__name__}: {str(error)[:100]}"
    alike = all(torch.allclose(w, theirs[name], rtol=1e-4, atol=1e-5) for name, w in ours.state_dict().items())
    return None if alike == merged else "another result, and PEFT has " + ("a third" if merged else "the same")


def _by_peft(folder: Path, adapter: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, folder / adapter).merge_and_unload()
