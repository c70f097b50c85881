"""What forgetting costs while serving: switching it, and tokens per second with the adapter on, off, row by row and merged.

    python -m recipes.bench.switch [--shape 100m] [--device cpu] [--rounds 9] [--out recipes/bench/results/switch.md]

One random Llama with a random LoRA adapter (r = 16, all linear layers). Switching is the median of many calls. Generating is
greedy, a batch of 8 prompts of 32 tokens, 32 new tokens each; the ways to do it alternate within a round, and what is given is
the median over rounds of their speed as a share of the base model's in that round, with quartiles. What the lock costs that lets
threads share the model is the difference between the adapter on with and without a ForgetSwitch on the model. On a CPU,
seconds are CPU time.
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from loramox import ForgetSwitch, ReferenceConfig, add_lora

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "100m": {"hidden_size": 640, "intermediate_size": 1_728, "num_hidden_layers": 12, "num_attention_heads": 10},
    "7b": {"hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
ROWS, PROMPT, NEW, CALLS = 8, 32, 32, 200


def adapted(shape: str, device: str) -> PeftModel:
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], vocab_size=32_000)).to(dtype).requires_grad_(False)
    model = add_lora(model, ReferenceConfig(model="random", quantization="none"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-2)
    return model.eval()


def clock(device: str) -> float:
    """Seconds: on a CPU those of this process, so that others on the machine do not count."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def switching(switch: ForgetSwitch, device: str) -> dict[str, float]:
    """Microseconds of each call."""
    turns: dict[str, Callable[[], object]] = {
        "off": switch.off,
        "on": switch.on,
        "to a scale": lambda: switch.at(0.5),
        "a lock and unlock": lambda: switch._turns.take().__enter__().__exit__(),
        f"names for {ROWS} rows": lambda: switch.rows([True, False] * (ROWS // 2)),
    }
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(CALLS):
        for name, turn in turns.items():
            start = clock(device)
            turn()
            taken[name].append(1e6 * (clock(device) - start))
    switch.on()
    return {name: statistics.median(each) for name, each in taken.items()}


def generating(model: PeftModel, switch: ForgetSwitch, device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by way."""
    ids = torch.randint(3, 32_000, (ROWS, PROMPT), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    merged = copy.deepcopy(model).merge_and_unload()
    base = copy.deepcopy(model).unload()
    unlocked = copy.deepcopy(model)  # a copy has no ForgetSwitch, so that its calls take no lock
    mixed = switch.rows([True, False] * (ROWS // 2))

    def off() -> None:
        with switch.off():
            model.generate(**batch, **length)

    ways: dict[str, Callable[[], object]] = {
        "base model": lambda: base.generate(**batch, **length),
        "adapter off": off,
        "adapter on": lambda: model.generate(**batch, **length),
        "adapter on, no ForgetSwitch": lambda: unlocked.generate(**batch, **length),
        "half of the rows forget": lambda: model.generate(**batch, **length, adapter_names=mixed),
        "merged": lambda: merged.generate(**batch, **length),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, generate in ways.items():
            start = clock(device)
            generate()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_:  # the first warms up
                taken[name].append(clock(device) - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = adapted(given.shape, given.device)
    switch = ForgetSwitch(model)
    calls = switching(switch, given.device)
    taken = generating(model, switch, given.device, given.rounds)
    where = (
        torch.cuda.get_device_name()
        if given.device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    )
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {where}, torch {torch.__version__}, shape {given.shape}: "
        f"`python -m recipes.bench.switch --shape {given.shape} --device {given.device} --rounds {given.rounds}`",
        "",
        "| switching | microseconds |",
        "|---|---|",
        *(f"| {name} | {each:.0f} |" for name, each in calls.items()),
        "",
        "| generating | tokens/s | share of the base model's speed (quartiles) |",
        "|---|---|---|",
    ]
    for name, seconds in taken.items():
        shares = [b / s for b, s in zip(taken["base model"], seconds, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        speed = ROWS * NEW / statistics.median(seconds)
        lines.append(f"| {name} | {speed:.0f} | {middle:.2f} ({low:.2f} … {high:.2f}) |")
    on, unlocked = (taken[name] for name in ("adapter on", "adapter on, no ForgetSwitch"))
    low, middle, high = statistics.quantiles([a / b for a, b in zip(on, unlocked, strict=True)], n=4)
    lines += ["", f"Time with the lock as a multiple of the time without it: {middle:.3f} ({low:.3f} … {high:.3f})."]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(["# Switching forgetting while serving", "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
