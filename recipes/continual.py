"""Continual unlearning, as in the MOX paper: 1 %, 5 % and 10 % of the rows that a model knows, one request after another.

    python recipes/continual.py --world tiny_tofu --out runs/continual [--epochs 30]

WORLD is as for tiny_tofu.py. Its first 10 forget rows are the first request, the next 40 the second, the next 50 the third.
After each, the adapter for all requests so far is built and scored on all rows: those of each request and the retain rows; as it
ships, and at lower scales until the retain rows keep a probability of 0.98. This is done twice: with the defaults of `requests
add`, each request on top of those in force, and each alone, with `--protect false`. `retrained` is a model trained from scratch,
with the reference's config, without the rows requested so far (the world's own for the last step). Results in OUT are reused.
Writes results.md and continual.png, which shows the last of these scales.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from loramox import Tokenisation, encode, read_rows
from loramox.cli import main as loramox
from loramox.data.pairs import Collator

ENDS = (10, 50, 100)  # forget rows requested after each step
STEPS = ("1 %", "5 %", "10 %")
WAYS = {"default": (), "alone": ("--protect", "false")}
TITLES = {"default": "default: each on top of those before", "alone": "each alone (--protect false)"}
PASSES = 1200  # over forget rows, in each request, but at most 60 epochs
SETTINGS = [  # as in tiny_tofu.yaml
    *("--quantization", "none", "--dtype", "float32", "--use_cpu", "true", "--eval_strategy", "no"),
    *("--save_strategy", "no", "--report_to", "none"),
]
SCALES, KEPT = (1.0, 0.75, 0.6, 0.45, 0.3), 0.98  # 1 is as shipped; retain probability to keep
QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def split(world: Path, out: Path) -> None:
    """OUT/rows/request-{1,2,3}.jsonl, and for each step what a retrained model learns from."""
    (out / "rows").mkdir(parents=True, exist_ok=True)
    forget, retain = (lines(world / f"rows/{part}.jsonl") for part in ("forget", "retain"))
    start = 0
    for step, end in enumerate(ENDS, 1):
        (out / f"rows/request-{step}.jsonl").write_text("\n".join(forget[start:end]) + "\n", encoding="utf-8")
        (out / f"rows/left-{step}.jsonl").write_text("\n".join([*forget[end:], *retain]) + "\n", encoding="utf-8")
        start = end


def request(world: Path, out: Path, way: str, step: int) -> None:
    """Enter the request, and build the adapter for all requests so far."""
    forget, out = out / f"rows/request-{step}.jsonl", out / way
    if (out / f"adapter-{step}").exists():
        return
    rows = len(lines(forget))
    files = ["--forget", str(forget), "--retain", str(world / "rows/retain.jsonl"), *WAYS[way]]
    ledger = json.loads((out / "ledger/ledger.json").read_text()) if (out / "ledger/ledger.json").exists() else {}
    if f"step-{step}" not in [entry["id"] for entry in ledger.get("entries", ())]:
        # Small requests get as many steps, up to 60 epochs.
        epochs = ["--num_train_epochs", str(min(60, math.ceil(PASSES / rows)))]
        model = ["--model", str(world / "reference"), "--id", f"step-{step}"]
        loramox(["requests", "add", str(out / "ledger"), *model, *files, *epochs, *SETTINGS])
    build = ["requests", "build", str(out / "ledger"), "--out", str(out / f"adapter-{step}")]
    loramox([*build, "--ship_dtype", "float32"])


def retrain(world: Path, out: Path, step: int, epochs: int) -> Path:
    """A model that never saw the rows requested so far."""
    if step == len(ENDS):
        return world / "retrained"
    folder = out / f"retrained-{step}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config, tokenizer = (kind.from_pretrained(world / "reference") for kind in (AutoConfig, AutoTokenizer))
        rows = encode(
            read_rows(str(out / f"rows/left-{step}.jsonl")), tokenizer, Tokenisation(), config.max_position_embeddings
        )
        settings = {
            "per_device_train_batch_size": 16,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 50,
        }
        args = TrainingArguments(str(folder), num_train_epochs=epochs, remove_unused_columns=False, **settings, **QUIET)
        pad = Collator(tokenizer.pad_token_id or 0)
        trainer = Trainer(
            AutoModelForCausalLM.from_config(config), args, train_dataset=rows,
            data_collator=lambda some: {k: v for k, v in pad(some).items() if k != "rows"},
        )  # fmt: skip
        trainer.train()
        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def probabilities(world: Path, folder: Path, model: Path, *adapter: str) -> dict[str, float]:
    """Mean probability of the true answers, of each request's rows and of the retain rows."""
    if not (folder / "summary.json").exists():
        rows = ["--forget", str(world / "rows/forget.jsonl"), "--retain", str(world / "rows/retain.jsonl")]
        what = ["--model", str(model), "--quantization", "none", *adapter]
        loramox(["evaluate", *what, *rows, "--max_new_tokens", "0", "--use_cpu", "true", "--out", str(folder)])
    records = [json.loads(line) for line in lines(folder / "records.jsonl")]
    forget = [r["probability"] for r in records if r["part"] == "forget"]
    starts = (0, *ENDS)
    found = {f"request {i}": mean(forget[a:b]) for i, (a, b) in enumerate(zip(starts, ENDS, strict=False), 1)}
    return found | {"retain": mean(r["probability"] for r in records if r["part"] == "retain")}


def scaled(world: Path, out: Path, way: str, step: int) -> dict[float, dict[str, float]]:
    """Scores of the adapter that was built, at ever lower scales until it keeps the retain rows."""
    points: dict[float, dict[str, float]] = {}
    for scale in SCALES:
        adapter = ["--adapter", str(out / way / f"adapter-{step}"), "--scale", str(scale)]
        points[scale] = probabilities(world, out / way / f"scored-{step}-{scale:g}", world / "reference", *adapter)
        if points[scale]["retain"] >= KEPT:
            break
    return points


def draw(path: Path, ours: dict[str, list[dict[str, float]]], theirs: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from loramox.colours import RETAIN

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", sharey=True)
    looks = {
        "request 1": ("#D55E00", "o"),
        "request 2": ("#CC79A7", "^"),
        "request 3": ("#E69F00", "v"),
        "retain": (RETAIN, "s"),
    }
    for axes, (way, points) in zip(panels, ours.items(), strict=True):
        for name, (color, marker) in looks.items():
            label = f"{name} rows" if name == "retain" else name
            axes.plot([p[name] for p in points], color=color, marker=marker, label=label)
            axes.plot([p[name] for p in theirs], color=color, linestyle=":", linewidth=1.5, label=f"{label}, retrained")
        axes.set_xticks(range(4), ["–", *(f"{i}: {name}" for i, name in enumerate(STEPS, 1))])
        axes.set(xlabel="after request", ylim=(-0.02, 1.02))
        axes.set_title(TITLES[way], fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean probability of the true answers")
    figure.suptitle(f"at the scale that keeps retain rows at {KEPT}", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30, help="Of retraining (default: 30).")
    given = parser.parse_args()
    split(given.world, given.out)
    reference = probabilities(given.world, given.out / "scored-reference", given.world / "reference")
    table = ["| after | | " + " | ".join(reference) + " |", "|---|---|" + "---|" * len(reference)]

    def line(after: str, what: str, point: dict[str, float]) -> None:
        table.append(f"| {after} | {what} | " + " | ".join(f"{each:.4f}" for each in point.values()) + " |")

    line("–", "reference", reference)
    ours: dict[str, list[dict[str, float]]] = {way: [reference] for way in WAYS}
    theirs = [reference]
    for step, name in enumerate(STEPS, 1):
        for way, points in ours.items():
            request(given.world, given.out, way, step)
            found = scaled(given.world, given.out, way, step)
            points.append(list(found.values())[-1])
            for scale, point in found.items():
                line(f"request {step}, {name}", f"{way}, scale {scale:g}", point)
        model = retrain(given.world, given.out, step, given.epochs)
        theirs.append(probabilities(given.world, given.out / f"scored-retrained-{step}", model))
        line(f"request {step}, {name}", "retrained", theirs[-1])
    print("\n".join(table))
    (given.out / "results.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    draw(given.out / "continual.png", ours, theirs)


if __name__ == "__main__":
    main()
