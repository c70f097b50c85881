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


# Runs commands one after the other: a process imports everything once.
COMMANDS = "import json, sys; from loramox.cli import main; [main(words) for words in json.loads(sys.argv[1])]"
CUT = {"quantization": "nf4", "gradient_checkpointing": True}
TRAINED = {"each holds all": {"quantization": "none"}, "layers are cut": CUT | {"shard": True}}


@pytest.fixture(scope="module")
def two(
    pico: Callable[[str], Path], trained: Path, rows: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A folder with what two processes made by four commands, started by torchrun; and what they said."""
    folder = tmp_path_factory.mktemp("two")
    rows_of_two_lengths(folder)
    commands = [["train", *flags(training(pico, folder, name) | more)] for name, more in TRAINED.items()]
    commands += [[verb, *flags(asking(verb, trained, rows, folder / verb, folder))] for verb in ("evaluate", "sweep")]
    (folder / "commands.py").write_text(COMMANDS)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return folder, launched(folder, [*launcher, str(folder / "commands.py"), json.dumps(commands)])


@pytest.fixture(scope="module")
def by_config(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same for a training that accelerate starts with one of the configs in recipes/."""
    folder = tmp_path_factory.mktemp("config")
    rows_of_two_lengths(folder)
    file = Path(__file__).parents[1] / "recipes" / "accelerate" / "fsdp.yaml"
    # `accelerate launch --cpu --num_processes 2` would run one process and not say so.
    launcher = ["accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0", "-m", "loramox"]
    settings = training(pico, folder, "layers are cut by accelerate's config") | CUT
    return folder, launched(folder, [*launcher, "train", *flags(settings)])


@pytest.fixture(scope="module")
def one(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """one("nf4") → what one process trains on the same rows."""
    made: dict[str, Path] = {}

    def make(quantization: str) -> Path:
        if quantization not in made:
            folder = made[quantization] = tmp_path_factory.mktemp(quantization)
            train(
                RunConfig(str(folder / "run")),
                ReferenceConfig(str(pico("llama")), quantization=quantization, r=4),
                Data(*map(str, rows_of_two_lengths(folder))),
                UnlearnConfig(per_device_train_batch_size=4, **SETTINGS),
            )
        return made[quantization] / "run"

    return make


@pytest.mark.parametrize("name", [*TRAINED, "layers are cut by accelerate's config"])
def test_two_processes_with_a_batch_of_two_make_the_adapter_of_one_with_a_batch_of_four(
    name: str, one: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    folder, _ = request.getfixturevalue("two" if name in TRAINED else "by_config")
    quantization = "none" if name == "each holds all" else "nf4"
    runs = {"one": one(quantization), "two": folder / name}
    alone, both = map(read_record, runs.values())
    assert (alone["settings"]["processes"], both["settings"]["processes"]) == (1, 2)
    assert both["settings"]["shard"] == (quantization == "nf4")
    for entry, other in zip(alone["log"], both["log"], strict=True):
        assert entry.keys() == other.keys()
        for watched in WATCHED & entry.keys():
            assert other[watched] == pytest.approx(entry[watched], rel=1e-3)

    # Each process leaves its own random state in a checkpoint.
    states = {which: {f.name for f in run.glob("**/rng_state*")} for which, run in runs.items()}
    assert states == {"one": {"rng_state.pth"}, "two": {"rng_state_0.pth", "rng_state_1.pth"}}

    for file in ("adapter_model.safetensors", "momentum/adapter_model.safetensors"):
        alone, both = (deltas(run / "trained" / file) for run in runs.values())
        assert alone.keys() == both.keys()
        for layer, delta in alone.items():
            assert delta.norm() > 1e-3
            assert (both[layer] - delta).norm() < 1e-3 * delta.norm()


@pytest.mark.parametrize(
    ("verb", "ends"), [("evaluate", "has summary.json"), ("sweep", "is the frontier")], ids=["evaluate", "sweep, cut"]
)
def test_two_processes_that_share_the_rows_find_what_one_does_and_write_it_once(
    two: tuple[Path, str], trained: Path, rows: tuple[Path, Path], tmp_path: Path, verb: str, ends: str
) -> None:
    main([verb, *flags(asking(verb, trained, rows, tmp_path / "one"))])
    here, there = (sorted(folder.rglob(RECORDS)) for folder in (tmp_path / "one", two[0] / verb))
    assert len(here) == len(there) == (2 if verb == "sweep" else 1)
    for file, other in zip(here, there, strict=True):
        for record, same in zip(read_records(file), read_records(other), strict=True):
            assert near(record, same)
    assert two[1].count(ends) == 1


def training(pico: Callable[[str], Path], folder: Path, name: str) -> dict[str, Any]:
    """Of each of two processes."""
    return {
        "model": pico("llama"),
        "forget": folder / "forget.jsonl",
        "retain": folder / "retain.jsonl",
        "out": folder / name,
        "lora_r": 4,
        "per_device_train_batch_size": 2,
        "ddp_backend": "gloo",
        **SETTINGS,
    }


def asking(verb: str, trained: Path, rows: tuple[Path, Path], out: Path, cut_in: Path | None = None) -> dict[str, Any]:
    """What evaluate asks of the adapter, and sweep of its memorization: in `cut_in` that of a run whose layers were cut."""
    asked = {"forget": rows[0], "retain": rows[1], "use_cpu": True, "batch_size": 2, "max_new_tokens": 4, "out": out}
    if verb == "evaluate":
        model = read_record(trained)["base"]["model"]
        return asked | {"model": model, "quantization": "none", "adapter": trained / "forget-adapter"}
    memorized = trained / "trained" if cut_in is None else of_a_run_that_cut(trained, cut_in)
    return asked | {"trained": memorized, "alphas": 2, "refine": 0}


def of_a_run_that_cut(trained: Path, folder: Path) -> Path:
    """Its memorization, with what a run under --shard writes down."""
    copy = shutil.copytree(trained / "trained", folder / "trained")
    provenance = json.loads((copy / PROVENANCE).read_text())
    provenance["settings"]["shard"] = True
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


def launched(folder: Path, words: list[str]) -> str:
    """What the commands say."""
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def deltas(file: Path) -> dict[str, torch.Tensor]:
    weights = load_file(file)
    return {key: weights[key.replace("lora_A", "lora_B")] @ A for key, A in weights.items() if "lora_A" in key}
