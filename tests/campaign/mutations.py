"""Files that loramox reads, damaged: the command ends with the same result, or with an error that says why."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from campaign.attempts import JOBS, ROWS, TRAINING, contents, difference, run, undisturbed
from peft import PeftModel
from signing import sign
from transformers import AutoModelForCausalLM

VALUES = [
    None, True, False, 0, -1, 3, 16, 0.5, 1e308, float("nan"), 10**400, "", "x", "none", "(", "../../x", "\u001b[31m", "\ud800", [], {}, [0], ["q_proj"],
    [[0, 1]], {"q_proj": 4}, {"(": 4}, {"": None}, "a" * 100_000,
]  # fmt: skip


COMPARED = (".safetensors", "records.jsonl")


class Target(NamedTuple):
    """Files to damage, the commands that read them, and whether the result of the last one is compared."""

    files: tuple[str, ...]
    commands: tuple[str, ...]
    result: str | None = "out"
    adapter: str | None = None  # may have another result where PEFT makes another model of it


MERGE, EVALUATE = JOBS["ship merge"].words, JOBS["evaluate"].words
SHIPPED, TRAINED = "run/forget-adapter", "run/trained/momentum"
TARGETS = {
    "adapter, ship check": Target((f"{SHIPPED}/*",), (f"ship check {SHIPPED} --base base",), None),
    "adapter, ship merge": Target((f"{SHIPPED}/*",), (MERGE,), adapter=SHIPPED),
    "adapter, evaluate": Target((f"{SHIPPED}/*",), (EVALUATE,), adapter=SHIPPED),
    "trained, extrapolate": Target(("run/trained/*.json", f"{TRAINED}/*"), (JOBS["extrapolate"].words,), adapter=TRAINED),
    "rows, evaluate": Target(("rows/forget.jsonl", "rows/retain.jsonl"), (EVALUATE,)),
    "ledger, verify and build": Target(("ledger/*.json", "ledger/requests/*/*"), ("requests verify ledger", JOBS["requests build"].words)),
    "ledger, add": Target(("one/*.json", "one/requests/*/*"), (JOBS["requests add"].words,), None),
    "checkpoint, unlearn --resume": Target(("killed/trained/checkpoint-*/*",), (f"unlearn {ROWS} {TRAINING} --out killed --resume",), "killed/forget-adapter"),
    "run.json, unlearn --resume": Target(("killed/run.json",), (f"unlearn {ROWS} {TRAINING} --out killed --resume",), "killed/forget-adapter"),
    "frontier and records, sweep": Target(("run/sweep/*.json", "run/sweep/*/*"), (JOBS["sweep"].words.replace("--out out", "--out run/sweep"),), None),
    "attacks and records, attack": Target(("run/attack/*.json", "run/attack/*/*"), (JOBS["attack"].words.replace("--out out", "--out run/attack"),), None),
    "run, report": Target(("run/*.json", "run/sweep/*.json", "run/sweep/*/*", "run/attack/*"), ("report run",), None),
}  # fmt: skip


def damage(path: Path, random: Random) -> str:
    """Do something to a file, and say what."""
    content = path.read_bytes()
    at, length = random.randrange(len(content) or 1), random.randrange(1, 64)
    garbage = random.randbytes(length)
    changes: dict[str, Callable[[], Any]] = {
        f"cut at {at}": lambda: path.write_bytes(content[:at]),
        f"{length} bytes lost at {at}": lambda: path.write_bytes(content[:at] + content[at + length :]),
        f"{length} bytes put in at {at}": lambda: path.write_bytes(content[:at] + garbage + content[at:]),
        f"{length} other bytes at {at}": lambda: path.write_bytes(content[:at] + garbage + content[at + length :]),
        f"a bit turned at {at}": lambda: path.write_bytes(content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]) if content else None,
        "empty": lambda: path.write_bytes(b""),
        "missing": path.unlink,
        "a folder": lambda: [path.unlink(), path.mkdir()],
        "a pipe": lambda: [path.unlink(), os.mkfifo(path)],
        "endless": lambda: [path.unlink(), path.symlink_to("/dev/zero")],
        "nested deeply": lambda: path.write_text("[" * 100_000),
    }  # fmt: skip
    if path.suffix in (".json", ".jsonl") and random.random() < 0.6:
        return _other_value(path, random)
    how = random.choice(list(changes))
    changes[how]()
    return f"{path.name}: {how}"


def _other_value(path: Path, random: Random) -> str:
    """Replace or remove one value of a JSON file, at any depth."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = random.randrange(len(lines))
    whole = inside = json.loads(lines[number])
    place = ""
    while isinstance(inside, dict | list) and inside:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key, holder = random.choice(keys), inside
        place, inside = f"{place}/{key}", holder[key]
        if random.random() < 0.4:
            break
    value = random.choice(VALUES)
    if random.random() < 0.2:
        del holder[key]
    else:
        holder[key] = value
    lines[number] = json.dumps(whole)
    path.write_text("\n".join(lines) + "\n")
    return f"{path.name}: {place} = {str(value)[:20]!r} or removed"


def mutate(world: Path, folder: Path, kind: str, random: Random) -> tuple[str, str, str | None]:
    """Damage a file and run what reads it: how it was damaged, how the last command ended, and the fault."""
    target = TARGETS[kind]
    paths = sorted({path for pattern in target.files for path in folder.glob(pattern) if path.is_file()})
    path = random.choice(paths)
    before = path.read_bytes()
    how = damage(path, random)
    if target.adapter and path.name == "adapter_model.safetensors" and path.is_file() and random.random() < 0.5:
        sign(folder / target.adapter)
        how += ", signed"
    for words in target.commands:
        ended = run(folder, words)
        if ended.fault():
            return how, "", ended.fault()
    if ended.code or not target.result:
        return how, "refused" if ended.code else "done", None
    expected, found = undisturbed(world, target.commands[-1], target.result)[1], contents(folder / target.result)
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
