"""Cost of a ledger: building one adapter for 1, 10, 100 and 1000 requests, and forgetting in a shared subspace.

    python -m recipes.bench.ledger [--out ledger.md]
    python -m recipes.bench.ledger --world tiny_tofu --runs runs/ledger_subspace

The first part builds from synthetic requests, of random ΔW (so that they have nothing in common, which is the worst case for
truncation), three times: exact, truncated to rank 64, and in a shared subspace. With --world (see tiny_tofu.py) the second is
measured instead: tiny_tofu's default setting with A trained and with A frozen, at some learning rates; RUNS/results.md has it.
"""

import argparse
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from peft import LoraConfig

from loramox.adapter.export import ShippingConfig
from loramox.adapter.folder import WEIGHTS, write_adapter
from loramox.extras.ledger.build import build
from loramox.extras.ledger.ledger import REQUESTS, Entry, Ledger, file_digests
from loramox.files import write_json
from loramox.model.algebra import Factors
from loramox.run import RECORD, memory_now, peak_memory
from recipes import tiny_tofu

COUNTS = (1, 10, 100, 1000)
LAYERS, HIDDEN, MIDDLE, RANK = 2, 256, 768, 16
WAYS = {"exact": None, "truncated to 64": 64, "shared subspace": None}
BASE = {"model": "synthetic", "revision": None, "shape": "", "weights": None, "dtype": "float32"}
RATES = ("1e-3", "3e-3", "1e-2")


def shapes() -> dict[str, tuple[int, int]]:
    """[out, in] of every linear layer of a Llama of this size."""
    attention = {f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
    mlp = {"mlp.gate_proj": (MIDDLE, HIDDEN), "mlp.up_proj": (MIDDLE, HIDDEN), "mlp.down_proj": (HIDDEN, MIDDLE)}
    return {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in (attention | mlp).items()}


def synthetic(path: Path, count: int, shared: bool) -> Ledger:
    """A ledger of `count` requests that were never trained."""
    random = torch.Generator().manual_seed(0)
    of = shapes()
    fixed = {name: torch.randn(RANK, inner, generator=random) / inner**0.5 for name, (_, inner) in of.items()}
    targets = sorted({name.rpartition(".")[2] for name in of})
    ledger = Ledger(path, BASE, {"r": RANK, "shared_subspace": shared})
    for number in range(count):
        name = f"request-{number + 1:04d}"
        factors = {
            layer: Factors(
                fixed[layer] if shared else torch.randn(RANK, inner, generator=random) / inner**0.5,
                1e-2 * torch.randn(out, RANK, generator=random),
            )
            for layer, (out, inner) in of.items()
        }
        folder = path / REQUESTS / name
        write_adapter(folder, factors, LoraConfig(target_modules=targets), BASE, torch.float32, {}, "")
        write_json(folder / RECORD, {"momentum": {}})
        ledger.entries.append(
            Entry(name, name, "", 1, "0" * 64, "", {}, False, {}, None, 8.0, [], 0.0, file_digests(folder))
        )
    ledger.write()
    return ledger


def built(ledger: Path, out: Path, rank: int | None) -> dict[str, Any]:
    """The provenance of a build, the seconds of processor time it took, and by how many bytes memory grew."""
    before = memory_now()
    start = time.process_time()
    made = build(ledger, out, ShippingConfig(rank=rank, ship_dtype="bfloat16"))
    return made | {"seconds": time.process_time() - start, "grown": peak_memory() - before}


def measured(count: int, way: str, folder: Path) -> dict[str, Any]:
    ledger, out = folder / "ledger", folder / "built"
    synthetic(ledger, count, way == "shared subspace")
    # A process of its own, as memory that was freed is not always given back.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        made = child.submit(built, ledger, out, WAYS[way]).result()
    return {
        "seconds": made["seconds"],
        "grown": made["grown"] / 1e6,
        "size": (out / WEIGHTS).stat().st_size / 1e6,
        "kept": sum(f.stat().st_size for f in ledger.rglob("*") if f.is_file()) / 1e6,
        "rank": made["rank"],
        "error": made["truncation_error"],
        "each": statistics.median(r["error"] for r in made["requests"]),
    }


def drawn(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    panels = {
        "seconds": "processor time to build, seconds",
        "grown": "memory that building takes, MB",
        "size": "shipped adapter, MB",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for (way, points), marker in zip(results.items(), "os^", strict=True):
            axis.plot(COUNTS, [p[name] for p in points], marker=marker, label=way)
        axis.set(xscale="log", yscale="log", xlabel="requests in force", title=label)
        axis.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.suptitle(f"One adapter for all requests: {LAYERS} layers of hidden size {HIDDEN}, requests of r = {RANK}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def bench(out: Path) -> None:
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for way, points in results.items():
        for count in COUNTS:
            with tempfile.TemporaryDirectory() as folder:
                points.append(measured(count, way, Path(folder)))
            print(way, count, points[-1], flush=True)
    lines = [
        "| way | requests | rank | processor seconds | memory, MB | shipped, MB | the ledger itself, MB | error of the sum | of each, median |",
        "|---" * 9 + "|",
        *(
            f"| {way} | {count} | {p['rank']} | {p['seconds']:.2f} | {p['grown']:.1f} | {p['size']:.2f} | {p['kept']:.1f} | {p['error']:.3g} | {p['each']:.3g} |"
            for way, points in results.items()
            for count, p in zip(COUNTS, points, strict=True)
        ),
    ]
    drawn(results, out.with_suffix(".png"))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\n\n{platform.machine()} CPU, torch {torch.__version__}. Written: {out}")


def subspace(world: Path, out: Path) -> None:
    """Forgetting with A trained and with A frozen, seed 0, at the alphas of tiny_tofu's default setting."""
    frozen = {f"A frozen, lr {rate}": ["--shared_subspace", "true", "--learning_rate", rate] for rate in RATES}
    tiny_tofu.SETTINGS |= frozen
    tiny_tofu.VALUES |= dict.fromkeys(frozen, tiny_tofu.VALUES["default"])
    gold = tiny_tofu.retrained(world, out)
    runs = {name: {0: tiny_tofu.swept(world, out, name, 0)["points"]} for name in ("default", *frozen)}
    lines = tiny_tofu.frontier_table(runs, gold)
    (out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ledger.md"))
    parser.add_argument("--world", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/ledger_subspace"))
    given = parser.parse_args()
    if given.world:
        subspace(given.world, given.runs)
    else:
        bench(given.out)


if __name__ == "__main__":
    main()
