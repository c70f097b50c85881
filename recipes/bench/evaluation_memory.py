"""What evaluating and attacking take beside what `loramox plan` says of a sweep and of training.

    python -m recipes.bench.evaluation_memory [--shapes tiny 30m] [--out recipes/bench/results/evaluation_memory.md]

A random Llama with a fresh adapter is asked rows of one length, 16 at a time, on the CPU: scored and answered (evaluate),
sampled, under guidance away from itself (pair), and trained for two steps (relearn). Measured is the highest point of torch's
allocator, on top of the model's own tensors, as in `recipes.bench.plan`.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loramox import ReferenceConfig, Tokenisation, add_lora, load_reference
from loramox.data.row import Row
from loramox.evaluate.attacks import pair, relearn, sample
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.extras.plan.estimate import sweeping
from loramox.extras.plan.outline import Setting
from loramox.extras.plan.rows import Rows
from loramox.extras.plan.speed import measured_speed
from loramox.model.config import read_config, read_tokenizer

from .plan import SHAPES, allocated, folders, predicted, settings, tensors_of
from .steps import machine

ROWS, LENGTH, ANSWER = 16, 64, 48  # asked at a time; tokens of a row; most tokens of an answer


def measure(shape: str) -> dict[str, int]:
    """Bytes at the highest point, by what was done; and what was predicted for a sweep and for training."""
    with folders(shape) as (whole, outline):
        reference, args, rows = settings(outline, (4, 1, LENGTH, {}), "cpu")
        expected = predicted(reference, args, rows)
        few = Rows(
            {"forget": rows.datasets["forget"], "retain": rows.datasets["retain"][:ROWS]}, rows.retain_per_forget
        )
        config, tokenizer = read_config(reference), read_tokenizer(reference)
        speed = measured_speed(args.device, torch.float32, LENGTH, config.hidden_size, config.intermediate_size)
        setting = Setting(reference, args, config, tokenizer, torch.float32, speed, reference.r)
        swept = sum(sweeping(setting, few, ROWS, ANSWER).held.values())
        model = add_lora(load_reference(ReferenceConfig(str(whole), quantization="none")), reference)
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(model)}
        asked = Questions({"forget": [Row("f", i, "a", "b") for i in range(ROWS)]}, read_tokenizer(reference), Tokenisation(), LENGTH,
                          ScoringConfig(ROWS, ANSWER))  # fmt: skip
        (part,) = asked.parts
        part.asked[:] = [
            each._replace(answer=example | {"row": each.answer["row"]})
            for example, each in zip(rows.datasets["retain"], part.asked, strict=False)
        ]
        model.generation_config.eos_token_id = None  # every answer has its full length
        jobs: dict[str, Callable[[], Any]] = {
            "evaluate": lambda: asked.ask(model),
            "sample": lambda: sample.sample(model, asked, ROWS, 1.0, 0.8, seed=0),
            "pair": lambda: pair.guided(model, asked, 1.0, 1.0, "guided"),
        }
        found = {name: sum(own.values()) + allocated(job) for name, job in jobs.items()}
        with relearn.attacker(model, rank=16, seed=0) as attacked:
            steps = relearn.train(attacked, part.answers, [2], 1e-3, batch_size=8, pad_token_id=0, seed=0)
            found["relearn"] = sum(own.values()) + allocated(lambda: list(steps))
    return {"sweep, predicted": swept, "training, predicted": expected.peak} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "30m"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = {shape: measure(shape) for shape in given.shapes}
    names = list(next(iter(found.values())))
    lines = ["# Evaluating and attacking, beside what is planned", "", "`python -m recipes.bench.evaluation_memory`", "",
             f"{time.strftime('%Y-%m-%d')}, {machine('cpu')}, torch {torch.__version__}; MB, {ROWS} rows of {LENGTH} tokens at a time, "
             f"answers of {ANSWER} tokens.", "",
             f"| shape | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]  # fmt: skip
    lines += [
        f"| {shape} | {' | '.join(f'{size / 1e6:,.1f}' for size in sizes.values())} |" for shape, sizes in found.items()
    ]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
