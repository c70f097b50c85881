"""Time and memory of `loramox ship merge`, and how much of ΔW quantizing leaves.

    python -m recipes.bench.merge --work SCRATCH [--shapes 100m llama-2-7b] [--quantize nf4] [--survival tiny]
        [--trained FORGET_ADAPTER --base M --forget F --retain R] [--out recipes/bench/results/merge.md]

For each shape a Llama of random bfloat16 weights is written to SCRATCH, shard by shard, with a forget adapter (r = 16, all
linear layers, ‖ΔW‖ = 0.1·‖W‖); the command runs in a process of its own, and its peak resident memory is the kernel's
(VmHWM). llama-2-7b needs 27 GB of disk, with --quantize 31 GB; SCRATCH is emptied after each shape. Logits are compared for
shapes that fit in memory. Survival is measured on random weights of --survival's shape at several ‖ΔW‖/‖W‖.
"""

import argparse
import gc
import json
import platform
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from loramox.adapter.folder import write_adapter
from loramox.adapter.streaming.shards import Entry, size_in, write_header, write_tensor
from loramox.extras.merge.job import merge
from loramox.extras.merge.merge import MergeConfig
from loramox.extras.merge.quantize import dequantized, quantized_like
from loramox.model.algebra import Factors
from loramox.model.config import ModelConfig, identify, read_config, skeleton
from loramox.model.load import keep_4bit_weights_in_place, load_reference

SHAPES = {
    "tiny": {"hidden_size": 512, "intermediate_size": 1_376, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 4_000},
    "100m": {"hidden_size": 640, "intermediate_size": 1_728, "num_hidden_layers": 12, "num_attention_heads": 10, "vocab_size": 32_000},
    "tinyllama-1.1b": {"hidden_size": 2_048, "intermediate_size": 5_632, "num_hidden_layers": 22, "num_attention_heads": 32, "vocab_size": 32_000},
    "llama-2-7b": {"hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000},
}  # fmt: skip
FITS = ("tiny", "100m")
RATIOS = (0.003, 0.01, 0.03, 0.1, 0.3)
RANK, SPREAD = 16, 0.02
SHARD = 5_000_000_000
RUN = "import sys; from loramox.cli import main; main(sys.argv[1:]); from loramox.run import peak_memory; print(peak_memory())"


def write_model(shape: str, folder: Path) -> int:
    """A model of random weights, a block in memory at a time; its size in bytes."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        **SHAPES[shape], dtype="bfloat16", architectures=["LlamaForCausalLM"], max_position_embeddings=4_096
    )
    config.save_pretrained(folder)
    model = skeleton(config, ModelConfig(shape))
    entries = [Entry(n, "BF16", tuple(p.shape), 0, 2 * p.numel()) for n, p in model.named_parameters()]
    files: list[list[Entry]] = [[]]
    for entry in entries:
        if files[-1] and sum(e.bytes for e in [*files[-1], entry]) > SHARD:
            files.append([])
        files[-1].append(entry)
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name, some in zip(names, files, strict=True):
        with (folder / name).open("wb") as file:
            write_header(file, some, ["BF16"] * len(some), {"format": "pt"})
            for entry in some:
                _write_random(file, entry)
    total = sum(size_in(e, "BF16") for e in entries)
    where = {e.name: name for name, some in zip(names, files, strict=True) for e in some}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_random(file, entry: Entry) -> None:
    for start in range(0, entry.numbers, 1 << 22):
        numbers = min(1 << 22, entry.numbers - start)
        block = torch.ones(numbers) if len(entry.shape) == 1 else torch.randn(numbers).mul_(SPREAD)
        write_tensor(file, block.bfloat16())


def write_random_adapter(base: Path, folder: Path, ratio: float) -> None:
    """A forget adapter of random factors, ‖ΔW‖ = ratio·‖W‖ in every layer."""
    named = ModelConfig(str(base), quantization="none")
    config = read_config(named)
    factors = {}
    for name, layer in skeleton(config, named).named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            out, into = layer.weight.shape
            # ‖B·A‖ is √(r·out·in) for normal factors, ‖W‖ is SPREAD·√(out·in).
            factors[name] = Factors(torch.randn(RANK, into), torch.randn(out, RANK) * (ratio * SPREAD / RANK**0.5))
    made_for = identify(named, config)
    provenance = {
        "kind": "forget", "alpha": None, "method": "random", "command": "random", "base": made_for, "momentum": {}, "settings": {},
        "data": {part: {"rows": 0, "source": "none", "sha256": "0" * 64} for part in ("forget", "retain")},
    }  # fmt: skip
    trained = LoraConfig(target_modules=sorted({name.rpartition(".")[2] for name in factors}))
    write_adapter(folder, factors, trained, made_for, torch.float32, provenance, "random")


def run(*words: object) -> dict[str, float]:
    """The command in a process of its own: seconds, and its peak resident memory in bytes."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, "ship", "merge", *map(str, words)], check=True, capture_output=True, text=True
    )
    return {"seconds": time.perf_counter() - start, "peak": int(done.stdout.splitlines()[-1])}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return model.eval()(torch.randint(model.config.vocab_size, (4, 32))).logits.float()


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits_error(base: Path, adapter: Path, merged: Path) -> str:
    """How far merged logits are at most from those with the adapter on, in both arithmetics; and how much the adapter does."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        on = logits(PeftModel.from_pretrained(load(base, dtype), adapter))
        found.append((on - logits(load(merged, dtype))).abs().max().item())
        effect = (on - logits(load(base, dtype))).abs().max().item()
    return f"{found[0]:.3f} / {found[1]:.3f} of {effect:.2f}"


def cost(shape: str, work: Path, quantize: list[str]) -> list[str]:
    base, adapter, out = (work / name for name in ("base", "adapter", "merged"))
    total = write_model(shape, base)
    write_random_adapter(base, adapter, 0.1)
    lines = []
    for kind in [None, *quantize]:
        used = run("--adapter", adapter, "--out", out, *(["--quantize", kind, "--force", "--use_cpu"] if kind else []))
        error = logits_error(base, adapter, out) if shape in FITS and kind is None else "–"
        lines.append(
            f"| {shape} | {total / 1e9:.2f} | {kind or 'bfloat16'} | {used['seconds']:.0f} | {used['peak'] / 1e6:,.0f} | "
            f"{size_of(out) / 1e9:.2f} | {error} |"
        )
        print(lines[-1], flush=True)
        shutil.rmtree(out)
    shutil.rmtree(work)
    return lines


def survival(shape: str, work: Path) -> list[str]:
    base, adapter, out = (work / name for name in ("base", "adapter", "merged"))
    write_model(shape, base)
    reference = load(base, torch.bfloat16)
    off, weight = logits(reference), reference.model.layers[0].mlp.up_proj.weight.data.clone()
    del reference
    lines = []
    for ratio in RATIOS:
        shutil.rmtree(adapter, ignore_errors=True)
        write_random_adapter(base, adapter, ratio)
        on = logits(PeftModel.from_pretrained(load(base, torch.bfloat16), adapter))
        for kind in ("nf4", "int8"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that little is left is what is measured
                config = MergeConfig(str(adapter), str(out), quantize=kind, force=True, overwrite=True)
                made = merge(config, progress=False)["survived"]
            merged = AutoModelForCausalLM.from_pretrained(out)
            keep_4bit_weights_in_place(merged)
            quantized = load_reference(ModelConfig(str(base), quantization=kind, dtype="bfloat16"))
            example = quantized.model.layers[0].mlp.up_proj.weight
            there = on_grid_share(example, weight, ratio)
            unmerged = logits(PeftModel.from_pretrained(quantized, adapter))
            # How far from the 16-bit model with the adapter on, in units of what the adapter changes.
            apart = [((each - on).norm() / (on - off).norm()).item() for each in (logits(merged), unmerged)]
            lines.append(
                f"| {ratio:.1%} | {kind} | {made['overall']:.3f} | {made['share']:.3f} | {made['rounding']:.2f} | {there:.3f} | "
                f"{apart[0]:.2f} | {apart[1]:.2f} |"
            )
            print(lines[-1], flush=True)
            del merged, quantized
            gc.collect()
    shutil.rmtree(work)
    return lines


def on_grid_share(example: nn.Parameter, weight: Tensor, ratio: float) -> float:
    """⟨D, ΔW⟩ / ‖ΔW‖² of merging into weights that are quantized already, which `loramox` does not do."""
    old = dequantized(quantized_like(example, weight))
    delta = torch.randn(len(old), RANK) @ torch.randn(RANK, old.shape[1])
    delta *= ratio * old.norm() / delta.norm()
    return (((dequantized(quantized_like(example, old + delta)) - old) * delta).sum() / delta.square().sum()).item()


def forgetting(given: argparse.Namespace) -> list[str]:
    """Score a trained adapter's rows in the five states of each quantization."""
    lines = []
    for kind in ("nf4", "int8"):
        out = given.work / "merged"
        words = [word for part in ("base", "forget", "retain") for word in (f"--{part}", getattr(given, part))]
        run("--adapter", given.trained, "--out", out, "--quantize", kind, "--use_cpu", "--force", *words)
        made = json.loads((out / "provenance.json").read_text())
        survived, measured = made["survived"], made["forgetting"]
        for state in measured["states"]:
            numbers = ["", "", ""]
            if state["state"] == f"{kind}, merged":
                numbers = [f"{measured['share']:.3f}", f"{survived['overall']:.3f}", f"{survived['rounding']:.2f}"]
            p = [state["metrics"].get(f"{part}_probability", float("nan")) for part in ("forget", "retain")]
            lines.append(f"| {state['state']} | {p[0]:.4f} | {p[1]:.4f} | {' | '.join(numbers)} |")
        print(*lines, sep="\n", flush=True)
        shutil.rmtree(out)
    return list(dict.fromkeys(lines))


def report(given: argparse.Namespace) -> str:
    words = ["python -m recipes.bench.merge --work SCRATCH --shapes", *given.shapes]
    words += ["--quantize", *given.quantize] if given.quantize else []
    words += ["--survival", given.survival]
    words += ["--trained FORGET_ADAPTER --base M --forget F --retain R"] if given.trained else []
    left = survival(given.survival, given.work / "survival")
    states = forgetting(given) if given.trained else []
    lines = [
        f"# Merging\n\n`{' '.join(words)}`\n",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}.\n",
        "Peak is the process's largest resident memory, Python and libraries included. Logits: the largest difference to the adapter",
        "unmerged, in fp32 / bf16 arithmetic, and what the adapter changes.\n",
        "| shape | base, GB | merged into | s | peak, MB | output, GB | logits |\n|---|---|---|---|---|---|---|",
    ]
    for shape in given.shapes:
        lines += cost(shape, given.work / shape, given.quantize)
    lines += [
        f"\n## What quantizing leaves of ΔW\n\nRandom weights ({given.survival}), r = {RANK}, all linear layers. `overall`, `share` and `rounding` are "
        "those of `loramox/extras/merge/quantize.py`;\nunmerged, ΔW is all there. `into 4 or 8 bits` is the share left by merging into "
        "weights that are quantized already, which\n`loramox` does not do. Apart: ‖logits − logits of the 16-bit model, adapter "
        "on‖ / ‖what the adapter changes‖.\n",
        "| ‖ΔW‖/‖W‖ | kind | overall | share | rounding | into 4 or 8 bits | apart, merged | apart, unmerged |\n|---|---|---|---|---|---|---|---|",
        *left,
    ]
    if given.trained:
        lines += [
            "\n## What it leaves of the forgetting\n\nA trained forget adapter on its own model, all its rows: mean probability of the answers.\n",
            "| state | forget | retain | forgetting left | overall | rounding |\n|---|---|---|---|---|---|",
            *states,
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["100m"])
    parser.add_argument("--quantize", nargs="*", choices=["nf4", "int8"], default=[])
    parser.add_argument("--survival", choices=FITS, default="tiny")
    for name in ("trained", "base", "forget", "retain"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.trained and not (given.base and given.forget and given.retain):
        parser.error("--trained needs --base, --forget and --retain")
    given.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    text = report(given)
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
