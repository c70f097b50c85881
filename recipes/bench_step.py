"""What a step of `MemorizeTrainer` costs, beside a plain PEFT step over the same tokens, in the same run.

    python recipes/bench_step.py [--shapes tiny 100m] [--device cpu] [--rounds 8] [--out recipes/results/bench_step.md]

The plain step is one forward and backward pass over the forget and the retain rows in one padded batch, as `model(..., labels=...)`
does it: no reference. Ours is the default objective, with what the reference says of the rows on disk, as from the second time on that
a row comes round, and without. All use the same random Llama, the same LoRA (r = 16, all linear layers) and the same rows, all of
one length, or of lengths like those of TOFU's rows. Times are taken in turns, and given as the median of the ratios of neighbours,
with their quartiles; momentum is updated once an epoch of 100 forget rows. Memory is the peak of a process of its own for each. The
last table is the memory that a loss alone adds, in chunks as here, and with all its logits at once.
"""

import argparse
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loramox import MemorizeConfig, MemorizeTrainer, ReferenceConfig, add_lora
from loramox.head import Head, per_token
from loramox.memorize.known import Known
from loramox.memorize.objectives import cross_entropy, kl_divergence
from loramox.reference import current_factors
from loramox.run import memory_now, peak_memory

SHAPES = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 3_000,
    },
    "100m": {
        "hidden_size": 640,
        "intermediate_size": 1_728,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "vocab_size": 32_000,
    },
    "1b": {
        "hidden_size": 2_048,
        "intermediate_size": 8_192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "vocab_size": 128_000,
    },
}
LOSSES = ("cross-entropy", "KL", "cross-entropy of all logits at once", "KL of all logits at once")
WARM_UP = 2  # rounds
EPOCH = 100  # forget rows in the epoch that a momentum update is spread over
FORGET_ROWS, RETAIN_PER_FORGET = 8, 3
PROMPT, ANSWER = 21, 44  # tokens, on average
LENGTHS = ("one length", "TOFU's lengths")


def answer_lengths(lengths: str, rows: int) -> list[int]:
    """Tokens of each answer: all 44, or log-normal around that with the spread of TOFU's answers (σ = 0.46 with the tokenizer of
    the tiny TOFU model)."""
    if lengths == "one length":
        return [ANSWER] * rows
    draw = random.Random(0)
    drawn = [draw.lognormvariate(0, 0.46) for _ in range(rows)]
    return [max(4, round(ANSWER * length * rows / sum(drawn))) for length in drawn]


def setting(shape: str, device: str, lengths: str) -> dict[str, Callable[[], None]]:
    """A step of ours with and without the reference on disk, a plain step, and a momentum update on one random model; no optimiser
    step is taken."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)).to(device).requires_grad_(False)
    model = add_lora(model, ReferenceConfig(model="random", quantization="none"))
    vocabulary = SHAPES[shape]["vocab_size"]
    answers = answer_lengths(lengths, FORGET_ROWS * (1 + RETAIN_PER_FORGET))
    tokens = [torch.randint(3, vocabulary, (PROMPT + answer,)).tolist() for answer in answers]
    rows = [{"input_ids": t, "labels": [-100] * PROMPT + t[PROMPT:], "row": f"row {i}"} for i, t in enumerate(tokens)]
    forget, retain = rows[:FORGET_ROWS], rows[FORGET_ROWS:]
    with tempfile.TemporaryDirectory() as folder:
        args = MemorizeConfig(folder, retain_per_forget=RETAIN_PER_FORGET, use_cpu=device == "cpu", report_to="none")
        trainer = MemorizeTrainer(model, args, forget, retain, _no_tokenizer())
        trainer.reference.remember(rows, trainer.data_collator, Path(folder), 1e10)
    kept, none = trainer.reference, Known(model, trainer.reference.still)
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(FORGET_ROWS)])
    together = {k: v.to(device) for k, v in trainer.data_collator(rows).items() if isinstance(v, torch.Tensor)}

    def step(reference: Known) -> None:
        trainer.reference = reference
        trainer.training_step(model, batch)

    def plain() -> None:
        model.train()
        with trainer.compute_loss_context_manager():
            loss = model(**together).loss
        loss.backward()
        loss.item()

    for _ in range(5):  # from then on the momentum has its full rank and is truncated at each update
        trainer.momentum.tick(current_factors(model))

    def update() -> None:
        trainer.momentum.tick(current_factors(model))

    return {"ours": lambda: step(kept), "without": lambda: step(none), "plain": plain, "update": update}


def _no_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
    )


def times(shape: str, device: str, lengths: str, rounds: int) -> dict[str, str]:
    steps = setting(shape, device, lengths)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + WARM_UP):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_ >= WARM_UP:
                taken[name].append(time.perf_counter() - start)

    def ratio(which: str) -> str:
        ratios = [a / b for a, b in zip(taken[which], taken["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return f"{middle:.2f} ({low:.2f} … {high:.2f})"

    step, update = statistics.median(taken["ours"]), statistics.median(taken["update"])
    share = f"{update / (step * EPOCH / FORGET_ROWS):.2%}"
    return {"ours": ratio("ours"), "without": ratio("without"), "seconds": f"{step:.2f}", "momentum": share}


def memory(shape: str, device: str, lengths: str, which: str) -> dict[str, int]:
    step = setting(shape, device, lengths)[which]
    before = memory_now()
    for _ in range(3):
        step()
    return {"before": before, "peak": peak_memory()}


def loss_memory(which: str, device: str, tokens: int = 2_048, vocabulary: int = 128_000) -> dict[str, int]:
    """What the loss of `tokens` answer tokens adds to hidden states and head, forward and backward."""
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=1_024, num_hidden_layers=0, tie_word_embeddings=True)
    head = Head(LlamaForCausalLM(config).to(device).requires_grad_(False))
    hidden, known = (torch.randn(tokens, config.hidden_size, device=device) for _ in range(2))
    hidden.requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    losses = {
        "cross-entropy": lambda: per_token(cross_entropy, head, [hidden], targets),
        "KL": lambda: per_token(kl_divergence, head, [known, hidden]),
        "cross-entropy of all logits at once": lambda: cross_entropy(head(hidden), targets),
        "KL of all logits at once": lambda: kl_divergence(head(known), head(hidden)),
    }
    head(hidden[:8].detach())  # the matrix library's own buffers are not the loss's
    before = memory_now()
    losses[which]().mean().backward()
    return {"before": before, "peak": peak_memory()}


def in_its_own_process(*words: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(given: argparse.Namespace) -> str:
    name = (
        torch.cuda.get_device_name()
        if given.device != "cpu"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    rows = (
        f"{FORGET_ROWS} forget + {FORGET_ROWS * RETAIN_PER_FORGET} retain rows of {PROMPT} + {ANSWER} tokens on average"
    )
    lines = [
        f"`python recipes/bench_step.py --shapes {' '.join(given.shapes)} --device {given.device} --rounds {given.rounds}`\n",
        f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}; {rows} a step.\n",
        "| shape | rows of | time, ours / plain (quartiles) | without the reference on disk | our step, s | momentum, share of our steps | peak memory, ours / plain | ours above the model, MB | plain above the model, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, lengths in itertools.product(given.shapes, LENGTHS):
        t = times(shape, given.device, lengths, given.rounds)
        of = ["--shapes", shape, "--lengths", lengths, "--device", given.device]
        ours, plain = (in_its_own_process("--memory-of", which, *of) for which in ("ours", "plain"))
        above = [(m["peak"] - m["before"]) / 1e6 for m in (ours, plain)]
        lines.append(
            f"| {shape} | {lengths} | {t['ours']} | {t['without']} | {t['seconds']} | {t['momentum']} | "
            f"{ours['peak'] / plain['peak']:.2f} | {above[0]:,.0f} | {above[1]:,.0f} |"
        )
    lines += [
        "\n| loss of 2,048 answer tokens at a vocabulary of 128,000 | adds, forward and backward, MB |",
        "|---|---|",
    ]
    for loss in LOSSES:
        used = in_its_own_process("--memory-of", loss, "--device", given.device)
        lines.append(f"| {loss} | {(used['peak'] - used['before']) / 1e6:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "100m"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", choices=LENGTHS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", choices=["ours", "plain", *LOSSES], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        of = (
            loss_memory(given.memory_of, given.device)
            if given.memory_of in LOSSES
            else memory(given.shapes[0], given.device, given.lengths, given.memory_of)
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
