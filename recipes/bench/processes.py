"""Two processes against one, on one machine: seconds of a training step with the same rows, and of asking the same rows; and
with --shard, which cuts the frozen layers over the processes: how much of the model each then holds.

    python -m recipes.bench.processes --model M --forget F --retain R [--processes 2] [--rounds 3] \\
        [--out recipes/bench/results/processes.md]

The commands are those of a user, `loramox unlearn` and `loramox evaluate`, by themselves and under torchrun, each process with
one thread; they take turns, and given is the median of the ratios of neighbours, with the least and the most. A step's seconds
are those of ten steps less those of two, over eight; the batch is that of one process, shared out. No row is watched.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from loramox import ReferenceConfig, load_reference
from loramox.model.sharding import shard

ROWS, LONG, SHORT = 8, 10, 2  # forget rows of a step; steps
ALONE = [sys.executable, "-m", "loramox"]


def launched(processes: int) -> list[str]:
    if processes == 1:
        return ALONE
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
        "loramox",
    ]


def run(processes: int, words: list[str]) -> None:
    alone = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([*launched(processes), *words], env=alone, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def step_seconds(given: argparse.Namespace, processes: int, folder: Path, *more: str) -> float:
    seconds = []
    for steps in (LONG, SHORT):
        out = folder / f"steps-{steps}"
        run(
            processes,
            ["unlearn", *of(given, "model", "forget", "retain"), "--per_device_train_batch_size", str(ROWS // processes),
             "--max_steps", str(steps), "--eval_strategy", "no", "--eval_on_start", "false", "--overwrite", "--out", str(out), *more],
        )  # fmt: skip
        seconds.append(json.loads((out / "run.json").read_text())["timings"]["train_seconds"])
    return (seconds[0] - seconds[1]) / (LONG - SHORT)


def asking_seconds(given: argparse.Namespace, processes: int, folder: Path, *more: str) -> float:
    out = folder / "asked"
    words = ["--max_new_tokens", "0", "--batch_size", "8", "--overwrite", "--out", str(out)]
    run(processes, ["evaluate", *of(given, "model", "forget", "retain"), *words, *more])
    return json.loads((out / "summary.json").read_text())["seconds"]


def of(given: argparse.Namespace, *names: str) -> list[str]:
    words = [word for name in names for word in (f"--{name}", getattr(given, name))]
    return [*words, "--quantization", given.quantization, "--use_cpu", "true"]


def held_when_cut(given: argparse.Namespace) -> float:
    """The share of the frozen weights' bytes that one of the processes holds."""
    config = ReferenceConfig(given.model, quantization=given.quantization, shard=True)
    model = load_reference(config)
    whole = sum(p.nbytes for p in model.parameters())
    torch.distributed.init_process_group("fake", rank=0, world_size=given.processes, store=FakeStore())
    shard(model, torch.device("cpu"))
    torch.distributed.destroy_process_group()
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters()) / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "forget", "retain"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            taken["one"].append(step_seconds(given, 1, folder))
            taken["several"].append(step_seconds(given, given.processes, folder))
            taken["cut"].append(step_seconds(given, given.processes, folder, "--shard", "true"))
            taken["ask one"].append(asking_seconds(given, 1, folder))
            taken["ask several"].append(asking_seconds(given, given.processes, folder))
            taken["ask cut"].append(asking_seconds(given, given.processes, folder, "--shard", "true"))
        print({name: f"{each[-1]:.2f}" for name, each in taken.items()}, file=sys.stderr, flush=True)

    def line(what: str, one: str, several: str) -> str:
        ratios = [a / b for a, b in zip(taken[one], taken[several], strict=True)]
        medians = f"{statistics.median(taken[one]):.2f} | {statistics.median(taken[several]):.2f}"
        return f"| {what} | {medians} | {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f}) |"

    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    text = "\n".join(
        [
            f"`python -m recipes.bench.processes {' '.join(words)}`\n",
            f"{time.strftime('%Y-%m-%d')}, {platform.machine()} CPU with {os.cpu_count()} cores, {given.rounds} rounds.\n",
            f"| | one process, s | {given.processes} processes, s | times as fast |",
            "|---|---|---|---|",
            line("a training step", "one", "several"),
            line("the same, `--shard true`", "one", "cut"),
            line("`evaluate`", "ask one", "ask several"),
            line("the same, `--shard true`", "ask one", "ask cut"),
            f"\nWith `--shard true` each process holds {held_when_cut(given):.0%} of the frozen weights' bytes: its part of the "
            "layers, and all of the embeddings and the output head.",
        ]
    )
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
