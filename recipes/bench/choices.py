"""What attention, compilation, checkpointing and the optimiser change in our step: time and memory, each beside the default.

    python -m recipes.bench.choices [--shape 100m] [--rounds 5] [--out recipes/bench/results/choices.md]
    python -m recipes.bench.choices --device cuda --shape llama-2-7b --rows 1 --lengths 1024 \\
        --out recipes/bench/results/choices_gpu.md

Steps, models and rows are those of `step.py`. The choices take turns; given is the median of their times as a share of the
default's beside them, with quartiles, and what the first step of each takes besides, which is where compilation happens. Memory
is the peak of a process of its own, above the model. Where this machine cannot run a choice, the error is given.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loramox.errors import LoramoxError
from loramox.run import memory_now, peak_memory

from .shapes import FORGET, RETAIN_PER_FORGET, SHAPES, folder_of, rows_of
from .steps import Case, Step, machine, ours, seconds_of

# Flag, and what is set: of the model, and of the training.
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default: sdpa, adamw_torch_fused": ({}, {}),
    "--attn_implementation eager": ({"attn_implementation": "eager"}, {}),
    "--attn_implementation flash_attention_2": ({"attn_implementation": "flash_attention_2"}, {}),
    "--torch_compile true": ({}, {"torch_compile": True}),
    "--activation_checkpointing true": ({}, {"activation_checkpointing": True}),
    "--activation_checkpointing true, every second layer": (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    ),
    "--activation_checkpointing true, offloaded": (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
    ),
    "--optim adamw_bnb_8bit": ({}, {"optim": "adamw_bnb_8bit"}),
    "--optim paged_adamw_8bit": ({}, {"optim": "paged_adamw_8bit"}),
    "--optim adafactor": ({}, {"optim": "adafactor"}),
    "--bf16 true": ({}, {"bf16": True}),
}
DEFAULT = next(iter(CHOICES))


def step_of(given: argparse.Namespace, model: Any, choice: str) -> Step:
    of_model, of_training = CHOICES[choice]
    rows = rows_of(given.lengths, given.rows * (1 + RETAIN_PER_FORGET), SHAPES[given.shape]["vocab_size"])
    settings = {"disable_tqdm": True, "bf16": given.device != "cpu"} | of_training
    case = Case(model=replace(model, **of_model), rows=rows, forget=given.rows, device=given.device, settings=settings)
    return ours(case)[1]


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Of each choice: the first step's seconds and the others'; or why it cannot run here, in a line."""
    with folder_of(given.shape, given.device) as model:
        found: dict[str, Any] = {}
        steps: dict[str, Step] = {}
        for choice in CHOICES:
            try:
                steps[choice] = step_of(given, model, choice)
                found[choice] = {"first": seconds_of(steps[choice]), "seconds": []}
            except (LoramoxError, RuntimeError) as error:
                steps.pop(choice, None)
                found[choice] = {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
            print(f"{choice}: {found[choice]}", file=sys.stderr, flush=True)
        for _ in range(given.rounds):
            for choice, step in steps.items():
                found[choice]["seconds"].append(seconds_of(step))
    return found


def memory(given: argparse.Namespace) -> int:
    """Bytes above the model at the peak of three steps of one choice."""
    with folder_of(given.shape, given.device) as model:
        step = step_of(given, model, given.memory_of)
        before = memory_now(given.device)
        for _ in range(3):
            step()
    return peak_memory(given.device) - before


def in_its_own_process(given: argparse.Namespace, choice: str) -> int:
    same = ["--shape", given.shape, "--device", given.device, "--rows", str(given.rows), "--lengths", given.lengths]
    command = [sys.executable, "-m", "recipes.bench.choices", *same, "--memory-of", choice]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(given: argparse.Namespace) -> str:
    found = compare(given)
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    lines = [
        f"`python -m recipes.bench.choices {' '.join(words)}`\n",
        f"{time.strftime('%Y-%m-%d')}, {machine(given.device)}, torch {torch.__version__}; {given.shape}, {given.rows} forget + "
        f"{given.rows * RETAIN_PER_FORGET} retain rows of {given.lengths} a step, {given.rounds} rounds.\n",
        "| | time / default's (quartiles) | the first step takes longer, s | memory above the model, MB |",
        "|---|---|---|---|",
    ]
    for choice, of in found.items():
        if "why" in of:
            lines.append(f"| `{choice}` | cannot run here: {of['why']} | | |")
            continue
        ratios = [a / b for a, b in zip(of["seconds"], found[DEFAULT]["seconds"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        longer = max(0.0, of["first"] - statistics.median(of["seconds"]))
        used = in_its_own_process(given, choice) / 1e6
        lines.append(f"| `{choice}` | {middle:.2f} ({low:.2f} … {high:.2f}) | {longer:.1f} | {used:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--rows", type=int, default=FORGET, help="forget rows of a step; three times as many retain rows"
    )
    parser.add_argument("--lengths", default="TOFU's lengths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=CHOICES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        print(json.dumps(memory(given)))
        return
    text = report(given)
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
