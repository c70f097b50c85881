"""What `loramox plan` predicts, beside what a run takes, in the same process.

    python -m recipes.bench.plan [--shapes tiny 30m 100m] [--device cpu] [--out recipes/bench/results/plan.md]

Each run is the real `UnlearnTrainer.train()` of a random Llama from a folder: two steps of the optimiser, a momentum update
after each, the forget model watched after the last. On the CPU its peak is that of torch's allocator, from the allocations and
frees that torch.profiler records during the run, on top of the model's own tensors: resident memory (VmHWM) would have Python,
the libraries and the blocks in it that malloc keeps. On a GPU it is torch.cuda.max_memory_allocated. Predictions never see the
weights: they are made from a copy of the folder without them. Seconds are those of a training step, without the profiler.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loramox import ReferenceConfig, UnlearnConfig, UnlearnTrainer, add_lora, load_reference
from loramox.extras.plan.config import choices
from loramox.extras.plan.estimate import Estimate, estimate, watch
from loramox.extras.plan.outline import Setting
from loramox.extras.plan.rows import Rows
from loramox.extras.plan.speed import measured_speed
from loramox.model.config import read_config, read_tokenizer

from .shapes import no_words
from .steps import machine, seconds_of

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 3_000},
    "tiny, 128k words": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 128_000},
    "30m": {"hidden_size": 384, "intermediate_size": 1_024, "num_hidden_layers": 8, "num_attention_heads": 6, "vocab_size": 32_000},
    "100m": {"hidden_size": 640, "intermediate_size": 1_728, "num_hidden_layers": 12, "num_attention_heads": 10, "vocab_size": 32_000},
    "1b": {"hidden_size": 2_048, "intermediate_size": 8_192, "num_hidden_layers": 16, "num_attention_heads": 32, "vocab_size": 128_000},
    "7b": {"hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000},
}  # fmt: skip
# Forget rows of a micro-batch, micro-batches of a step, tokens of a row, and other settings.
CASES = {
    "tiny": [
        (4, 1, 64, {}),
        (4, 1, 64, {"activation_checkpointing": True}),
        (2, 2, 64, {}),
        (4, 1, 64, {"quantization": "nf4"}),
        (4, 1, 64, {"bf16": True, "dtype": "bfloat16"}),
        (4, 1, 64, {"method": "npo", "retain_term": "kl"}),
        (4, 1, 64, {"lengths": "mixed"}),
    ],
    "tiny, 128k words": [(4, 1, 64, {})],
    "30m": [(2, 1, 128, {}), (2, 1, 128, {"activation_checkpointing": True})],
    "100m": [(1, 1, 96, {}), (1, 1, 96, {"activation_checkpointing": True})],
    "1b": [(4, 1, 256, {}), (4, 1, 256, {"quantization": "nf4"})],
    "7b": [(1, 1, 1024, {"quantization": "nf4", "activation_checkpointing": True})],
}


def made_up(count: int, length: int, mixed: bool) -> list[dict[str, Any]]:
    """Random rows, the second half of each its answer; mixed ones have half to all of the length, the first all."""
    rows = []
    for number in range(count):
        size = length - (number * 7 % (length // 2) if mixed else 0)
        tokens = torch.randint(1, 300, (size,), generator=torch.Generator().manual_seed(number)).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * (size // 2) + tokens[size // 2 :], "row": f"row {number}"})
    return rows


def settings(folder: Path, case: tuple, device: str) -> tuple[ReferenceConfig, UnlearnConfig, Rows]:
    size, micro_batches, length, more = case
    named = {"quantization": "none"} | {k: v for k, v in more.items() if k in ("quantization", "dtype")}
    rest = {k: v for k, v in more.items() if k not in ("quantization", "dtype", "lengths")}
    args = UnlearnConfig(
        str(folder / "out"), use_cpu=device == "cpu", report_to="none", disable_tqdm=True, max_steps=2,
        per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches, momentum_every=1, eval_rows=8,
        eval_strategy="steps", eval_steps=2, eval_on_start=False, save_strategy="no", logging_strategy="no", **rest,
    )  # fmt: skip
    args._n_gpu = min(args._n_gpu, 1)
    rows = made_up(16 * size * micro_batches, length, "lengths" in more)
    forget = 2 * size * micro_batches
    datasets = {"forget": rows[:forget], "retain": rows[forget:], "wanted": [], "protected": []}
    return ReferenceConfig(str(folder), **named), args, Rows(datasets, 3)


def predicted(reference: ReferenceConfig, args: UnlearnConfig, rows: Rows) -> Estimate:
    config, dtype = read_config(reference), reference.torch_dtype(args.device)
    tokens = args.per_device_train_batch_size * len(rows.datasets["forget"][0]["input_ids"])
    speed = measured_speed(
        args.device, torch.bfloat16 if args.bf16 else dtype, tokens, config.hidden_size, config.intermediate_size
    )
    # Of the two updates of the momentum one is before the last step.
    setting = Setting(reference, args, config, read_tokenizer(reference), dtype, speed, reference.r)
    (choice,) = choices(args, {"per_device_train_batch_size", "activation_checkpointing"})
    return estimate(setting, rows, choice, watch(setting, rows, args.per_device_eval_batch_size))


def trainer_of(reference: ReferenceConfig, args: UnlearnConfig, rows: Rows) -> UnlearnTrainer:
    model = add_lora(load_reference(reference, args.device), reference)
    return UnlearnTrainer(model, args, rows.datasets["forget"], rows.datasets["retain"], read_tokenizer(reference))


def taken(trainer: UnlearnTrainer) -> int:
    """Bytes at the highest point of a run, the model's own included."""
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return torch.cuda.max_memory_allocated()
    before = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(trainer.model)}
    return sum(before.values()) + allocated(trainer.train)


def tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, state.state2) if state else ():
            yield from (t for t in vars(part).values() if isinstance(t, torch.Tensor))


def allocated(run: Callable[[], Any]) -> int:
    """Bytes on the CPU at the highest point of `run`, of those that torch allocates during it."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            run()
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")


@contextmanager
def folders(shape: str) -> Iterator[tuple[Path, Path]]:
    """A random model, and a folder with all of it but its weights."""
    with tempfile.TemporaryDirectory() as here:
        whole, outline = Path(here) / "model", Path(here) / "outline"
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=shape != "7b")
        LlamaForCausalLM(config).to(torch.bfloat16 if shape in ("1b", "7b") else torch.float32).save_pretrained(whole)
        no_words().save_pretrained(whole)
        shutil.copytree(whole, outline, ignore=shutil.ignore_patterns("*.safetensors"))
        yield whole, outline


def compare(shape: str, number: int, device: str) -> dict[str, Any]:
    """One case, in a process of its own."""
    case = CASES[shape][number]
    with folders(shape) as (whole, outline):
        reference, args, rows = settings(outline, case, device)
        start = time.perf_counter()
        expected = predicted(reference, args, rows)
        planning = time.perf_counter() - start
        trainer = trainer_of(*settings(whole, case, device))
        peak = taken(trainer)
        batch = rows.micro_batches(case[0], args.seed)[0]
        batch = {part: trainer.data_collator(examples) for part, examples in batch.items()}
        steps = [seconds_of(lambda: trainer.training_step(trainer.model_wrapped, dict(batch))) for _ in range(4)]
    batches = len(rows.datasets["forget"]) / case[0]
    return {
        "held": expected.held,
        "when": expected.when,
        "predicted": expected.peak,
        "measured": peak,
        "step_predicted": expected.seconds / batches,
        "step": statistics.median(steps[1:]),
        "planning": planning,
    }


def report(results: list[tuple[str, tuple, dict[str, Any]]], device: str) -> str:
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {machine(device)}, torch {torch.__version__}.",
        "",
        "| shape | micro-batch × accumulation × tokens | settings | predicted, MB | measured, MB | predicted / measured | fullest | step predicted, s | step, s | planning, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, (size, micro_batches, length, more), r in results:
        words = ", ".join(f"{key} {value}" for key, value in more.items()) or "–"
        lines.append(
            f"| {shape} | {size} × {micro_batches} × {length} | {words} | {r['predicted'] / 1e6:,.1f} | {r['measured'] / 1e6:,.1f} | "
            f"{r['predicted'] / r['measured']:.3f} | {r['when']} | {r['step_predicted']:.2g} | {r['step']:.2g} | {r['planning']:.1f} |"
        )
    purposes = list(results[0][2]["held"])
    lines += ["", "Predicted, MB:", "", f"| shape, case | {' | '.join(purposes)} |", "|---" * (1 + len(purposes)) + "|"]
    for shape, (size, micro_batches, length, more), r in results:
        held = " | ".join(f"{r['held'].get(purpose, 0) / 1e6:,.1f}" for purpose in purposes)
        words = ", ".join(more) or "–"
        lines.append(f"| {shape}, {size} × {micro_batches} × {length}, {words} | {held} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "tiny, 128k words", "30m", "100m"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", help="File to write the results to.")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(compare(given.one[0], int(given.one[1]), given.device)))
        return
    results = []
    for shape in given.shapes:
        for number, case in enumerate(CASES[shape]):
            command = [
                sys.executable,
                "-m",
                "recipes.bench.plan",
                "--device",
                given.device,
                "--one",
                shape,
                str(number),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(shape, case, done.stderr[-2000:], file=sys.stderr)
                continue
            results.append((shape, case, json.loads(done.stdout.splitlines()[-1])))
            print(shape, case, results[-1][2], file=sys.stderr)
    text = report(results, given.device)
    print(text)
    if given.out:
        Path(given.out).write_text(
            f"# Planned and measured\n\n`python -m recipes.bench.plan {' '.join(sys.argv[1:])}`\n\n{text}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
