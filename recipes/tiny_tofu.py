"""Unlearn, sweep and attack by the command line, with several methods, on a small model that knows its rows by heart.

    python recipes/tiny_tofu.py --world tiny_tofu --out runs/tiny_tofu [--seeds 0 1 2] [--settings default paper] [--attack]

WORLD has `reference/` and `retrained/` (models) and `rows/{forget,forget_perturbed,retain,holdout}.jsonl`. Each setting and seed
is trained and swept once; results in OUT are reused. The sweep varies alpha, or the scale for a method without alpha. Writes
`results.md`: for each run the value nearest to the retrained model, by forget quality, among those that keep the retain
probability at 0.98 or more, and the value that was trained for, at which it ships; the value that each rule chooses; and with
--attack what the attacks recover from the first setting's adapter. `python -m recipes.compare` compares more methods.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from loramox.cli import main as loramox

SETTINGS = {
    "default": [],
    "npo_mean": ["--method", "npo_mean"],
    "paper": ["--method", "mox_static"],
}
VALUES = {"default": (4, 6, 7, 8, 9, 10, 12), "npo_mean": (0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5), "paper": (2, 4, 5, 6, 8)}
UNIT = {"npo_mean": "scale"}  # others: alpha
SHIPPED = {"npo_mean": 1, "paper": 4}  # others: 8
KEEP = 0.98  # retain probability that a setting has to keep
COLUMNS = {
    "forget_probability": "forget probability ↓",
    "retain_probability": "retain probability ↑",
    "forget_exact_memorization": "forget tokens right ↓",
    "forget_truth_ratio": "truth ratio",
    "forget_quality": "KS p ↑",
    "mia_min_k": "AUC, 0.5",
}
Points = list[dict[str, float]]


def scored(world: Path) -> list[str]:
    """The flags of the rows on which every model is scored."""
    files = {"forget": "forget_perturbed", "retain": "retain", "holdout": "holdout"}
    rows = [word for part, name in files.items() for word in (f"--{part}", str(world / f"rows/{name}.jsonl"))]
    return [*rows, "--max_new_tokens", "0", "--use_cpu", "true"]


def retrained(world: Path, out: Path) -> dict[str, float]:
    """The retrained model's metrics; its records are in OUT/retrained."""
    if not (out / "retrained/summary.json").exists():
        model = ["--model", str(world / "retrained"), "--quantization", "none"]
        loramox(["evaluate", *model, *scored(world), "--out", str(out / "retrained")])
    metrics = json.loads((out / "retrained/summary.json").read_text())["metrics"]
    return {name: metric["value"] for name, metric in metrics.items()} | {"forget_quality": 1.0}


def swept(world: Path, out: Path, setting: str, seed: int) -> dict[str, Any]:
    """The frontier of one setting and seed, trained and measured where it does not exist yet."""
    run = out / f"{setting}-{seed}"
    if not (run / "forget-adapter").exists():
        recipe = str(Path(__file__).with_suffix(".yaml"))
        model = ["--model", str(world / "reference"), "--seed", str(seed)]
        rows = ["--forget", str(world / "rows/forget.jsonl"), "--retain", str(world / "rows/retain.jsonl")]
        alike = ["--auto_retain", "0"]  # retain rows that the model writes are the default of mox alone
        loramox(["unlearn", recipe, *model, *rows, *alike, *SETTINGS[setting], "--out", str(run), "--overwrite"])
    record = run / "sweep/frontier.json"
    if not record.exists() or json.loads(record.read_text())["status"] != "done":
        values = [f"--{UNIT.get(setting, 'alpha')}s", *map(str, VALUES[setting])]
        more = [*values, "--refine", "0", "--model", str(world / "reference")]
        compared = ["--retrained", str(out / "retrained"), "--out", str(run / "sweep")]
        loramox(["sweep", "--trained", str(run / "trained"), *scored(world), *more, *compared])
    return json.loads(record.read_text())


def attacked(world: Path, run: Path) -> list[dict[str, Any]]:
    """The states of a run's adapter under every attack."""
    rows = ["--forget", str(world / "rows/forget_perturbed.jsonl"), "--retain", str(world / "rows/retain.jsonl")]
    model = ["--model", str(world / "reference"), "--quantization", "none", "--use_cpu", "true"]
    adapter = ["--adapter", str(run / "forget-adapter"), "--out", str(run / "attack")]
    loramox(["attack", *model, *adapter, *rows])
    return json.loads((run / "attack/attacks.json").read_text())["states"]


def frontier_table(runs: dict[str, dict[int, Points]], gold: dict[str, float]) -> list[str]:
    def cells(point: dict[str, float]) -> str:
        return " | ".join(f"{point[name]:.2g}" if point[name] < 1e-3 else f"{point[name]:.4f}" for name in COLUMNS)

    first = next(iter(next(iter(runs.values())).values()))[0]
    lines = [
        f"For each run first the alpha or scale of highest KS p at retain probability ≥ {KEEP} (of most forgetting, where none reaches 0.05), "
        "then, where it differs, the one at which it ships; 100 forget, 900 retain, 100 holdout rows.\n",
        f"| setting | seed | alpha or scale | {' | '.join(COLUMNS.values())} |",
        "|---" * (3 + len(COLUMNS)) + "|",
        f"| reference | – | – | {cells(first)} |",
        f"| retrained | – | – | {cells(gold)} |",
    ]
    for setting, seeds in runs.items():
        kept = {seed: [p for p in points if p["retain_probability"] >= KEEP] for seed, points in seeds.items()}
        nearest = {seed: nearest_of(points) for seed, points in kept.items()}
        at = SHIPPED.get(setting, 8)
        shipped = {seed: next(p for p in points if p["at"] == at) for seed, points in seeds.items()}
        for some in (nearest, shipped) if shipped != nearest else (nearest,):
            lines += [f"| {setting} | {seed} | {p['at']:g} | {cells(p)} |" for seed, p in some.items()]
            if len(some) > 1:
                spread = {name: [p[name] for p in some.values()] for name in COLUMNS}
                means = " | ".join(f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in spread.values())
                lines.append(f"| {setting} | mean ± sd | | {means} |")
    return lines


def nearest_of(points: Points) -> dict[str, float]:
    """The point nearest to the retrained model; of most forgetting where each can be told from it."""
    nearest = max(points, key=lambda p: p["forget_quality"])
    return nearest if nearest["forget_quality"] >= 0.05 else min(points, key=lambda p: p["forget_probability"])


def choice_table(frontiers: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    lines = ["| setting | seed | rule | alpha or scale (5 % … 95 %) | why |", "|---|---|---|---|---|"]
    for setting, seeds in frontiers.items():
        for seed, frontier in seeds.items():
            for c in frontier["choices"]:
                at = f"{c['at']:g} ({c['low']:g} … {c['high']:g})" if c["at"] else "none"
                lines.append(f"| {setting} | {seed} | {c['rule']} | {at} | {c['reason']} |")
            if frontier["warning"]:
                lines.append(f"| {setting} | {seed} | warning | | {frontier['warning']} |")
    return lines


def attack_table(states: list[dict[str, Any]]) -> list[str]:
    columns = ("forget_probability", "forget_exact_memorization", "forget_rouge_l", "retain_probability")
    lines = [
        "| attack | state | forget probability | forget tokens right | forget ROUGE-L | retain probability |",
        "|---" * 6 + "|",
    ]
    for state in states:
        numbers = " | ".join(f"{state['metrics'][n]:.3f}" if n in state["metrics"] else "" for n in columns)
        lines.append(f"| {state['attack']} | {state['state']} | {numbers} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default", "paper"])
    parser.add_argument(
        "--attack", action="store_true", help="attack the first setting's adapter of the first seed too"
    )
    given = parser.parse_args()
    if not (given.world / "reference").is_dir():
        parser.error(f"--world {given.world} has no reference/: give a folder with reference/, retrained/ and rows/")
    gold = retrained(given.world, given.out)
    frontiers = {
        setting: {seed: swept(given.world, given.out, setting, seed) for seed in given.seeds}
        for setting in given.settings
    }
    points = {setting: {seed: f["points"] for seed, f in seeds.items()} for setting, seeds in frontiers.items()}
    lines = [*frontier_table(points, gold), "", *choice_table(frontiers)]
    if given.attack:
        lines += ["", *attack_table(attacked(given.world, given.out / f"{given.settings[0]}-{given.seeds[0]}"))]
    (given.out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\n\nWritten: {given.out}/results.md")


if __name__ == "__main__":
    main()
