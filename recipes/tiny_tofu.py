"""How much is forgotten while the rest stays: the default setting and the paper's, on a small model that knows its rows.

    python recipes/tiny_tofu.py --world tiny_tofu --out runs/tiny_tofu [--seeds 0 1 2] [--settings default paper]

WORLD has `reference/` and `retrained/` (models) and `rows/{forget,forget_perturbed,retain}.jsonl`. Each setting and seed
is memorized once (not again when its run is there), then measured at a grid of strengths. Writes `results.json`, with
everything, and `results.md`: for each run the strength of most forgetting among those that keep the retain probability
at 0.98 or more, beside the reference and the model that was retrained without the forget rows.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramox import Tokenisation, encode, read_rows
from loramox.cli import main as loramox
from loramox.evaluate import forget_quality, mean_log_p, score_answers, truth_ratio
from loramox.reference import at_strength
from loramox.rows import Row

SETTINGS = {
    "default": [],
    "default-r32": ["--r", "32", "--lora_alpha", "32"],
    "paper": ["--temperature", "1", "--kl_at", "memorization", "--kl_weight", "1", "--alpha", "4"],
}
STRENGTHS = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 20, 24, 32)
KEEP = 0.98  # retain probability that a setting has to keep
FRONTIER = 0.9  # strengths below this one are not measured in full


class World:
    """The rows on which every model is measured, tokenised once: all forget rows, and every sixth retain row."""

    def __init__(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "reference")

        def tokens(rows: list[Row]) -> list[dict]:
            return encode(rows, tokenizer, Tokenisation(), context=512)

        perturbed = [json.loads(line) for line in (folder / "rows/forget_perturbed.jsonl").read_text().splitlines()]
        self.forget = tokens(read_rows(str(folder / "rows/forget.jsonl")))
        self.retain = tokens(read_rows(str(folder / "rows/retain.jsonl")))[::6]
        self.true = tokens(
            [Row("paraphrased", i, p["paraphrased_answer"], p["question"]) for i, p in enumerate(perturbed, 1)]
        )
        self.wrong = tokens(
            [Row("wrong", i, w, p["question"]) for i, p in enumerate(perturbed, 1) for w in p["perturbed_answer"]]
        )

    def retain_probability(self, model) -> float:
        return float(np.exp(mean_log_p(score_answers(model, self.retain))).mean())

    def measure(self, model) -> dict:
        forget = score_answers(model, self.forget, describe="forget rows")
        true = mean_log_p(score_answers(model, self.true, describe="paraphrased answers"))
        wrong = mean_log_p(score_answers(model, self.wrong, describe="wrong answers")).reshape(len(true), -1)
        return {
            "forget_probability": float(np.exp(mean_log_p(forget)).mean()),
            "retain_probability": self.retain_probability(model),
            "forget_right": float(np.mean([(s.first_choice == s.targets).mean() for s in forget])),
            "truth_ratios": truth_ratio(true, wrong).tolist(),
        }


def memorized(world: Path, out: Path, setting: str, seed: int) -> Path:
    run = out / f"{setting}-{seed}"
    rows = ["--forget", str(world / "rows/forget.jsonl"), "--retain", str(world / "rows/retain.jsonl")]
    if not (run / "forget-adapter").exists():
        recipe = str(Path(__file__).with_suffix(".yaml"))
        model = ["--model", str(world / "reference"), "--seed", str(seed)]
        loramox(["unlearn", recipe, *model, *rows, *SETTINGS[setting], "--out", str(run), "--overwrite"])
    return run


def frontier(world: World, reference: Path, run: Path) -> list[dict]:
    """Everything at each strength whose retain probability is worth looking at; kept, and not computed twice."""
    record = run / "frontier.json"
    if record.exists():
        return json.loads(record.read_text())
    base = AutoModelForCausalLM.from_pretrained(reference)
    model = PeftModel.from_pretrained(base, run / "memorization/momentum")
    points = []
    for strength in STRENGTHS:
        with at_strength(model, strength):
            if world.retain_probability(model) >= FRONTIER:
                points.append({"strength": strength, **world.measure(model)})
    record.write_text(json.dumps(points))
    return points


def table(results: dict) -> str:
    gold = np.array(results["retrained"]["truth_ratios"])

    def cells(m: dict) -> str:
        ratios = np.array(m["truth_ratios"])
        return (
            f"{m['forget_probability']:.4f} | {m['retain_probability']:.4f} | {m['forget_right']:.2f} | "
            f"{np.median(ratios):.3f} | {forget_quality(ratios, gold):.2g}"
        )

    lines = [
        f"Strength of most forgetting at retain probability ≥ {KEEP}; n = {len(gold)} forget rows, 150 retain rows.\n",
        "| setting | seed | α | forget probability ↓ | retain probability ↑ | forget tokens right ↓ | median truth ratio | KS p ↑ |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {name} | – | – | {cells(results[name])} |" for name in ("reference", "retrained")),
    ]
    for setting, runs in results["settings"].items():
        kept = {seed: [p for p in points if p["retain_probability"] >= KEEP] for seed, points in runs.items()}
        best = {seed: min(points, key=lambda p: p["forget_probability"]) for seed, points in kept.items() if points}
        lines += [f"| {setting} | {seed} | {p['strength']:g} | {cells(p)} |" for seed, p in best.items()]
        forgotten = [p["forget_probability"] for p in best.values()]
        if len(forgotten) > 1:
            spread = statistics.stdev(forgotten)
            lines.append(f"| {setting} | mean ± sd | | {statistics.mean(forgotten):.4f} ± {spread:.4f} | | | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default", "paper"])
    given = parser.parse_args()
    if not (given.world / "reference").is_dir():
        parser.error(f"--world {given.world} has no reference/: give a folder with reference/, retrained/ and rows/")
    world, results = World(given.world), {"settings": {}}
    for name in ("reference", "retrained"):
        results[name] = world.measure(AutoModelForCausalLM.from_pretrained(given.world / name))
    for setting in given.settings:
        runs = {seed: memorized(given.world, given.out, setting, seed) for seed in given.seeds}
        results["settings"][setting] = {
            seed: frontier(world, given.world / "reference", run) for seed, run in runs.items()
        }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results))
    (given.out / "results.md").write_text(table(results))
    print(table(results), f"\nWritten: {given.out}/results.md and results.json")


if __name__ == "__main__":
    main()
