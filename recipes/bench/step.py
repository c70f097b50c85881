"""Time and memory of a training step, beside a plain PEFT step, TRL's, OpenUnlearning's and the arithmetic floor.

    python -m recipes.bench.step [--shapes tiny 100m] [--openunlearning DIR] [--rounds 8] [--out recipes/bench/results/step.md]
    python -m recipes.bench.step --device cuda --shapes llama-2-7b llama-3.1-8b qwen3-8b --rows 1 --checkpointing \\
        --lengths "TOFU's lengths" 256 1024 2048 --out recipes/bench/results/step_gpu.md

A step is forward and backward over the same forget rows and three times as many retain rows, of random tokens on a random model
with a LoRA of r = 16 on all linear layers, the gradients' clipping and AdamW's step (`steps.py`). In micro-batches it is the same
step in four parts, as `--gradient_accumulation_steps 4` has it, where the rows can be divided. The contenders take turns;
given is the median of their times as a share of the plain step's beside them, with quartiles. Memory is the peak of a process of
its own for each: resident on the CPU, allocated on a GPU. `--cap 8` holds these processes to 8 GB (of 1024³ bytes). The hours of
a request are those of 24 epochs over TOFU's 400 forget rows; the first three, in which retain rows are new, ask the reference.

The floor is FLOPs over the rate at which this device multiplies matrices of that size, measured beside: forward and backward
with respect to activations of every token that is no padding, through frozen linear layers, LoRA and causal attention, and the
head for answer tokens, of the model and of the reference. The plain step and TRL's have no reference; mox has a second
LoRA adapter, the one that memorizes, on the forget rows. TRL needs `pip install trl`, `--openunlearning` a checkout.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from loramox import UnlearnTrainer
from loramox.extras.plan.speed import measured_speed
from loramox.model.head import backbone
from loramox.model.lora import current_factors
from loramox.run import memory_now, peak_memory

from .losses_memory import LOSSES, loss_memory
from .shapes import FORGET, LENGTHS, RETAIN_PER_FORGET, SHAPES, config_of, folder_of, rows_of
from .steps import CONTENDERS, MICRO_BATCHES, Case, Step, machine, seconds_of

WARM_UP = 1  # rounds
EPOCH = 100  # forget rows in the epoch that a momentum update is spread over
REQUEST = {"forget": 400, "retain": 3_600, "epochs": 24}  # TOFU's forget10, and our default


def case_of(given: argparse.Namespace, shape: str, lengths: str, model: Any) -> Case:
    count = given.rows * (1 + RETAIN_PER_FORGET)
    rows = rows_of(lengths, count, SHAPES[shape]["vocab_size"])
    settings = {"disable_tqdm": True, "activation_checkpointing": given.checkpointing, "bf16": given.device != "cpu"}
    return Case(
        model=model, rows=rows, forget=given.rows, device=given.device, settings=settings, openunlearning=given.openunlearning
    )  # fmt: skip


def contenders(given: argparse.Namespace, shape: str) -> list[str]:
    """Who can be measured: with what is installed, and, in full weights with two copies of them, where they fit."""
    there = {
        "mox, in micro-batches": given.rows % MICRO_BATCHES == 0,
        "TRL": importlib.util.find_spec("trl") is not None,
        "OpenUnlearning": given.openunlearning is not None and config_of(shape).hidden_size < 4_096,
    }
    return [name for name in CONTENDERS if there.get(name, True)]


def times(given: argparse.Namespace, shape: str, lengths: str) -> dict[str, Any]:
    """Seconds of each contender's step by round, of the parts of mox's, of a momentum update, and of the floor."""
    with folder_of(shape, given.device) as model:
        case = case_of(given, shape, lengths, model)
        made = {name: CONTENDERS[name](case) for name in contenders(given, shape)}
        trainer, _ = made["mox"]
        for _ in range(5):  # from then on the momentum has its full rank and is truncated at each update
            trainer.momentum.tick(current_factors(trainer.model))
        taken: dict[str, list[float]] = {name: [] for name in [*made, "floor", "momentum"]}
        for round_ in range(given.rounds + WARM_UP):
            for name, (_, step) in made.items():
                taken[name].append(seconds_of(step))
            taken["momentum"].append(seconds_of(lambda: trainer.momentum.tick(current_factors(trainer.model))))
            taken["floor"].append(floor(case, shape))
            print(f"{shape}, {lengths}: round {round_ + 1} of {given.rounds + WARM_UP}", file=sys.stderr, flush=True)
        parts = [_parts(*made["mox"]) for _ in range(given.rounds)]
    return {
        "seconds": {name: each[WARM_UP:] for name, each in taken.items()},
        "parts": {part: statistics.median(p[part] for p in parts) for part in parts[0]},
        "tokens": sum(len(row["input_ids"]) for row in case.rows),
    }


def _parts(trainer: UnlearnTrainer, step: Step) -> dict[str, float]:
    """Seconds of one step by what it was doing."""
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append((name, time.perf_counter()))

    def after(module: Any, args: Any, output: Any) -> None:
        mark("loss")
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: mark("backward"))

    layers = backbone(trainer.causal_lm)
    hooks = [layers.register_forward_pre_hook(lambda *_: mark("forward")), layers.register_forward_hook(after)]
    optimizer = trainer.optimizer.register_step_pre_hook(lambda *_: mark("optimiser"))
    mark("batch")
    step()
    mark("end")
    for hook in (*hooks, optimizer):
        hook.remove()
    parts = dict.fromkeys(("forward", "loss", "backward", "optimiser"), 0.0)
    for (name, start), (_, end) in itertools.pairwise(marks):
        parts[name] = parts.get(name, 0.0) + end - start
    return parts


def floor(case: Case, shape: str) -> float:
    """Seconds of the arithmetic that no step with these terms can avoid."""
    config = config_of(shape)
    dtype = torch.float32 if case.device == "cpu" else torch.bfloat16
    tokens = sum(len(row["input_ids"]) for row in case.rows)
    speed = measured_speed(torch.device(case.device), dtype, tokens, config.hidden_size, config.intermediate_size)
    return floor_flops(case, config) / speed.flops


def floor_flops(case: Case, config: PretrainedConfig) -> int:
    """Of forward and backward through layers and head, of every token that is no padding, and of the reference's head."""
    hidden, between, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * (config.num_key_value_heads or config.num_attention_heads)
    sizes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    sizes += [(hidden, between), (hidden, between), (between, hidden)]
    lengths = [len(row["input_ids"]) for row in case.rows]
    answers = sum(label != -100 for row in case.rows for label in row["labels"])
    a_token = sum(4 * i * o + 6 * case.model.r * (i + o) for i, o in sizes)  # two passes of W; three of A and B
    attention = 3 * sum(2 * queries * length**2 for length in lengths)  # scores and values, half of them masked
    # No gradient goes on from the first layer's inputs.
    unneeded = sum(2 * i * (o + case.model.r) for i, o in sizes[:3])
    return (
        layers * (a_token * sum(lengths) + attention)
        - unneeded * sum(lengths)
        + 6 * answers * hidden * config.vocab_size
    )


def request(step: float, first: float, rows: int) -> float:
    """Seconds of a request, at most: a row's first time costs a pass of the reference, which is cached from then on."""
    steps = REQUEST["forget"] / rows
    new = REQUEST["retain"] / (RETAIN_PER_FORGET * REQUEST["forget"])  # epochs until every retain row has been drawn
    return steps * (new * first + (REQUEST["epochs"] - new) * step)


def memory(given: argparse.Namespace, shape: str, lengths: str, name: str) -> dict[str, int]:
    if given.cap:
        torch.cuda.set_per_process_memory_fraction(given.cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    with folder_of(shape, given.device) as model:
        _, step = CONTENDERS[name](case_of(given, shape, lengths, model))
        before = memory_now(given.device)
        for _ in range(3):
            step()
    return {"before": before, "peak": peak_memory(given.device)}


def in_its_own_process(given: argparse.Namespace, *words: str) -> dict[str, int] | None:
    """What it printed; None where it ran out of memory."""
    same = ["--device", given.device, "--rows", str(given.rows), *(["--checkpointing"] if given.checkpointing else [])]
    same += ["--cap", str(given.cap)] if given.cap else []
    same += ["--openunlearning", str(given.openunlearning)] if given.openunlearning else []
    command = [sys.executable, "-m", "recipes.bench.step", *same, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "OutOfMemoryError" not in done.stderr:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def _ratio(over: list[float], under: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} … {high:.2f})"


def report(given: argparse.Namespace) -> str:
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    lines = [
        f"`python -m recipes.bench.step {' '.join(words)}`\n",
        f"{time.strftime('%Y-%m-%d')}, {machine(given.device)}, torch {torch.__version__}; {given.rows} forget + {given.rows * RETAIN_PER_FORGET} "
        f"retain rows a step, activation checkpointing {'on' if given.checkpointing else 'off'}; {given.rounds} rounds.\n",
        "| shape | rows of | who | time / plain PEFT's (quartiles) | time / floor | tokens a second | peak memory, MB | above the model, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    parts = []
    for shape, lengths in itertools.product(given.shapes, given.lengths):
        found = times(given, shape, lengths)
        seconds = found["seconds"]
        for who in contenders(given, shape):
            used = in_its_own_process(given, "--shapes", shape, "--lengths", lengths, "--memory-of", who)
            held = (
                f"{used['peak'] / 1e6:,.0f} | {(used['peak'] - used['before']) / 1e6:,.0f}" if used else "none left |"
            )
            lines.append(
                f"| {shape} | {lengths} | {who} | {_ratio(seconds[who], seconds['plain PEFT'])} | {_ratio(seconds[who], seconds['floor'])} | "
                f"{found['tokens'] / statistics.median(seconds[who]):,.0f} | {held} |"
            )
        step = statistics.median(seconds["mox"])
        shares = [f"{found['parts'][part] / sum(found['parts'].values()):.0%}" for part in found["parts"]]
        update = statistics.median(seconds["momentum"]) / (step * EPOCH / given.rows)
        hours = request(step, statistics.median(seconds["mox, reference not cached"]), given.rows) / 3600
        parts.append(
            (
                list(found["parts"]),
                f"| {shape} | {lengths} | {step:.2f} | {' | '.join(shares)} | {update:.2%} | {hours:.2f} |",
            )
        )
    lines += [
        f"\n| shape | rows of | a step of mox, s | {' | '.join(parts[0][0])} | momentum, of the steps of {EPOCH} forget rows | a request of forget10, hours |",
        "|---|---|---|" + "---|" * (len(parts[0][0]) + 2),
        *(line for _, line in parts),
        "\n| loss of 2,048 answer tokens at a vocabulary of 128,000 | adds, forward and backward, MB |",
        "|---|---|",
    ]
    for loss in LOSSES:
        used = in_its_own_process(given, "--memory-of", loss)
        lines.append(
            f"| {loss} | {(used['peak'] - used['before']) / 1e6:,.0f} |" if used else f"| {loss} | none left |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "100m"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--rows", type=int, default=FORGET, help="forget rows of a step; three times as many retain rows"
    )
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), help="tokens of a row, or one of the defaults")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, for all contenders")
    parser.add_argument("--cap", type=float, help="GB of GPU memory for each process whose memory is measured")
    parser.add_argument("--openunlearning", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=[*CONTENDERS, *LOSSES], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        of = (
            loss_memory(given.memory_of, given.device)
            if given.memory_of in LOSSES
            else memory(given, given.shapes[0], given.lengths[0], given.memory_of)
        )
        print(json.dumps(of))
        return
    text = report(given)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)


if __name__ == "__main__":
    main()
