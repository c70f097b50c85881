"""How long a command takes until the first training step begins, and where the time goes.

    python -m recipes.bench.startup --model M --forget F --retain R [--quantization none] [--rounds 5] \\
        [--out recipes/bench/results/startup.md]

`loramox --help` beside a Python that does nothing; `loramox unlearn` beside a Python that imports what any PEFT training
imports: transformers' Trainer, peft and bitsandbytes. Each in a process of its own, in turns; medians of the wall clock, from
the first line that Python runs, and of processor time, from the start of the process. Watching rows before the first step is a
measurement, and counted by itself; `--eval_on_start false` does without.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Marks are (what is over, seconds since the process started, its processor time), written when the first step begins.
TRAINING = """
import json, sys, time
start = time.perf_counter()
marks = []
def mark(name):
    marks.append((name, time.perf_counter() - start, time.process_time()))
from loramox.cli import main
from loramox import unlearning as job
from loramox.train import trainer
mark("imports")
def around(holder, name, before=None, after=None):
    inner = getattr(holder, name)
    def outer(*args, **kwargs):
        if before: before()
        try:
            return inner(*args, **kwargs)
        finally:
            if after: after()
    setattr(holder, name, outer)
around(job, "prepare", after=lambda: mark("flags, rows, tokenizer, config"))
around(job, "load_reference", after=lambda: mark("loading the model"))
kind = trainer.UnlearnTrainer
around(kind, "train", lambda: mark("adapter, trainer"))
around(kind, "evaluate", lambda: mark("optimiser, loader, TensorBoard"), lambda: mark("watching rows before the first step"))
def first():
    mark("to the first step")
    print("MARKS", json.dumps(marks), flush=True)
    sys.exit(0)
around(kind, "training_step", first)
main()
"""
PEER = """
import time, json
from transformers import Trainer, AutoModelForCausalLM, AutoTokenizer
import peft, bitsandbytes, torch.utils.tensorboard
print('MARKS', json.dumps([('imports', 0, time.process_time())]))
"""


def run(code: str, words: list[str]) -> tuple[float, list]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    marks = next((line for line in done.stdout.splitlines() if line.startswith("MARKS ")), None)
    if marks is None and "MARKS" in code:
        raise SystemExit(f"no step was reached:\n{done.stderr[-2000:]}")
    return seconds, json.loads(marks.removeprefix("MARKS ")) if marks else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "forget", "retain"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    taken: dict[str, list[float]] = {"nothing": [], "help": [], "peer": []}
    stages: dict[str, list[tuple[float, float]]] = {}
    for _ in range(given.rounds):
        taken["nothing"].append(run("pass", [])[0])
        taken["help"].append(run("from loramox.cli import main; main()", ["--help"])[0])
        taken["peer"].append(run(PEER, [])[1][0][2])
        with tempfile.TemporaryDirectory() as folder:
            words = [
                "unlearn",
                *(w for n in ("model", "forget", "retain", "quantization") for w in (f"--{n}", getattr(given, n))),
            ]
            _, found = run(TRAINING, [*words, "--use_cpu", "true", "--out", f"{folder}/run"])
        before = (0.0, 0.0)
        for name, *at in found:
            stages.setdefault(name, []).append((at[0] - before[0], at[1] - before[1]))
            before = tuple(at)
    middle = {name: [statistics.median(each) for each in zip(*pairs, strict=True)] for name, pairs in stages.items()}
    apart = ("imports", "loading the model", "watching rows before the first step")
    own = [sum(of[i] for name, of in middle.items() if name not in apart) for i in (0, 1)]
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    text = "\n".join(
        [
            f"`python -m recipes.bench.startup {' '.join(words)}`\n",
            f"{time.strftime('%Y-%m-%d')}, {platform.machine()} CPU; medians of {given.rounds} rounds.\n",
            f"`loramox --help`: {statistics.median(taken['help']):.2f} s; a Python that does nothing: {statistics.median(taken['nothing']):.2f} s.\n",
            "| `loramox unlearn`, until the first step begins | seconds | of the processor |",
            "|---|---|---|",
            *(f"| {name} | {wall:.2f} | {cpu:.2f} |" for name, (wall, cpu) in middle.items()),
            f"| **beyond imports, loading and watching** | **{own[0]:.2f}** | **{own[1]:.2f}** |",
            f"\nImporting Trainer, peft, bitsandbytes and TensorBoard alone: {statistics.median(taken['peer']):.2f} s of the processor.",
        ]
    )
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
