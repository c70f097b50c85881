"""Two processes train, and find, what one does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loramox import Data, ReferenceConfig, RunConfig, UnlearnConfig
from loramox.adapter.folder import PROVENANCE
from loramox.cli import main
from loramox.evaluate.records import RECORDS, read_records
from loramox.run import read_record
from loramox.unlearning import train

WATCHED = {"loss", "forget_loss", "retain_kl", "eval_forget_probability", "eval_retain_probability"}
SETTINGS = {
    "num_train_epochs": 4,  # each process draws a row twice, on average: so it keeps the reference's states
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "alpha": 2.0,
    "inner_steps": 2,  # of two rows in one process, of one and one in two
    "use_cpu": True,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.mark.parametrize(
    ("quantization", "more", "config"),
    [
        ("none", {}, None),
        ("nf4", {"shard": True, "gradient_checkpointing": True}, None),
        ("nf4", {"gradient_checkpointing": True}, "fsdp"),
    ],
    ids=["each holds all", "layers are cut", "layers are cut by accelerate's config"],
)
def test_two_processes_with_a_batch_of_two_make_the_adapter_of_one_with_a_batch_of_four(
    pico: Callable[[str], Path], tmp_path: Path, quantization: str, more: dict[str, Any], config: str | None
) -> None:
    rows = rows_of_two_lengths(tmp_path)
    settings = {
        "model": pico("llama"),
        "forget": rows[0],
        "retain": rows[1],
        "out": tmp_path / "two",
        "quantization": quantization,
        "lora_r": 4,
        "per_device_train_batch_size": 2,
        "ddp_backend": "gloo",
        **SETTINGS,
        **more,
    }
    in_two_processes("train", tmp_path, settings, config)
    train(
        RunConfig(str(tmp_path / "one")),
        ReferenceConfig(str(pico("llama")), quantization=quantization, r=4),
        Data(*map(str, rows)),
        UnlearnConfig(per_device_train_batch_size=4, **SETTINGS),
    )

    one, two = (read_record(tmp_path / name) for name in ("one", "two"))
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert two["settings"]["shard"] == (quantization == "nf4")
    for entry, other in zip(one["log"], two["log"], strict=True):
        assert entry.keys() == other.keys()
        for name in WATCHED & entry.keys():
            assert other[name] == pytest.approx(entry[name], rel=1e-3)

    # Each process leaves its own random state in a checkpoint.
    states = {name: sorted(f.name for f in (tmp_path / name).glob("**/rng_state*")) for name in ("one", "two")}
    assert set(states["two"]) == {"rng_state_0.pth", "rng_state_1.pth"}
    assert set(states["one"]) == {"rng_state.pth"}

    for file in ("adapter_model.safetensors", "momentum/adapter_model.safetensors"):
        one, two = (deltas(tmp_path / name / "trained" / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, delta in one.items():
            assert delta.norm() > 1e-3
            assert (two[name] - delta).norm() < 1e-3 * delta.norm()


@pytest.mark.parametrize(
    ("verb", "shard"), [("evaluate", False), ("sweep", True)], ids=["evaluate, each holds all", "sweep, layers are cut"]
)
def test_two_processes_that_share_the_rows_find_what_one_does_and_write_it_once(
    trained: Path, rows: tuple[Path, Path], tmp_path: Path, verb: str, shard: bool
) -> None:
    asked = {"forget": rows[0], "retain": rows[1], "use_cpu": True, "batch_size": 2, "max_new_tokens": 4}
    if verb == "evaluate":
        model = read_record(trained)["base"]["model"]
        asked |= {"model": model, "quantization": "none", "adapter": trained / "forget-adapter"}
        two = asked | {"shard": shard}
    else:
        asked |= {"trained": trained / "trained", "alphas": 2, "refine": 0}
        two = asked | {"trained": of_a_run_that(shard, trained, tmp_path)}
    said = in_two_processes(verb, tmp_path, two | {"out": tmp_path / "two"})
    main([verb, *flags(asked | {"out": tmp_path / "one"})])
    one, two = (sorted((tmp_path / how).rglob(RECORDS)) for how in ("one", "two"))
    assert len(one) == len(two) == (2 if verb == "sweep" else 1)
    for file, other in zip(one, two, strict=True):
        for record, same in zip(read_records(file), read_records(other), strict=True):
            assert near(record, same)
    assert said.count("has summary.json" if verb == "evaluate" else "is the frontier") == 1


def of_a_run_that(shard: bool, trained: Path, folder: Path) -> Path:
    """Its memorization, with what a run under --shard writes down."""
    copy = shutil.copytree(trained / "trained", folder / "trained")
    provenance = json.loads((copy / PROVENANCE).read_text())
    provenance["settings"]["shard"] = shard
    (copy / PROVENANCE).write_text(json.dumps(provenance))
    return copy


def rows_of_two_lengths(folder: Path) -> tuple[Path, Path]:
    """4 forget and 12 retain rows, some of which are so long that a step's rows go through the model in several passes, and that
    the processes do not make as many."""
    for name, count in (("forget", 4), ("retain", 12)):
        made = [
            {"question": f"Who is {name} {n}?", "answer": "A baker." if n % 3 else f"Number {n}, " + "the baker " * 9}
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder / "forget.jsonl", folder / "retain.jsonl"


def near(record: dict, other: dict) -> bool:
    """The same but for the rounding of another number of threads."""
    return record.keys() == other.keys() and all(
        other[name] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value)
        for name, value in record.items()
    )


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def in_two_processes(verb: str, folder: Path, settings: dict[str, Any], config: str | None = None) -> str:
    """What the command says, started by torchrun, or by accelerate with one of the configs in recipes/."""
    # `accelerate launch --cpu --num_processes 2` would run one process and not say so.
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    if config:
        file = Path(__file__).parents[1] / "recipes" / "accelerate" / f"{config}.yaml"
        launcher = ["accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0", "-m"]
    words = [sys.executable, "-m", *launcher, "loramox", verb, *flags(settings)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def deltas(file: Path) -> dict[str, torch.Tensor]:
    weights = load_file(file)
    return {key: weights[key.replace("lora_A", "lora_B")] @ A for key, A in weights.items() if "lora_A" in key}
