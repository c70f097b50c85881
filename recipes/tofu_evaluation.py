"""Everything that loramox measures of an adapter, on a small model that knows its rows by heart, beside one that never saw them.

    python recipes/tofu_evaluation.py --world tiny_tofu --out runs/evaluation [--methods mox npo_mean] [--seed 0] [--samples 64]

WORLD has `reference/` and `retrained/` (models) and `rows/{forget,forget_perturbed,retain,holdout}.jsonl`, 20 rows an author.
Training gets the rows of every second retain author. The others measure general ability, with the answers of the holdout rows as
text. Each method is trained with the defaults, evaluated with `--depth` and attacked with every attack, beside 58 of the given
retain rows. The control is the retrained model, which is attacked once, with the first method. Results in OUT are reused. Writes
`evaluation.md`: every figure beside its target, and the CPU time of each command.
"""

import argparse
import json
import resource
from pathlib import Path

from loramox.cli import main as loramox

AUTHOR = 20  # rows of an author
REFERENCE, FORGET, CONTROL = "reference model", "forget model", "retrained model"  # as attacks.json names them
TARGETS = {  # of a method's value and the control's
    "": None,
    "≤ 1.5 × control": lambda value, control: value <= 1.5 * control,
    "≤ control + 0.05": lambda value, control: value <= control + 0.05,
    "≥ 0.98": lambda value, _: value >= 0.98,
    "p ≥ 0.05": lambda p, _: p >= 0.05,
    "p < 0.05": lambda p, _: p < 0.05,
}
# Name, attack, state (* is the worst of all), metric and target. {} is the model.
LINES = [
    ("forget probability", "none", "{}", "forget_probability", ""),
    ("greedy: ROUGE-L", "none", "{}", "forget_rouge_l", ""),
    ("leak@1 by ROUGE-L", "sample", "{}", "leak_at_1_by_rouge_l", ""),
    ("leak@{k} by ROUGE-L", "sample", "{}", "leak_at_{k}_by_rouge_l", "≤ 1.5 × control"),
    ("leak@1 by key words", "sample", "{}", "leak_at_1_by_key_words", ""),
    ("leak@{k} by key words", "sample", "{}", "leak_at_{k}_by_key_words", "≤ 1.5 × control"),
    ("worst form: leak", "forms", "worst of all, {}", "leak", "≤ 1.5 × control"),
    ("worst context: leak", "context", "worst of all, {}", "leak", ""),
    ("pair: ROUGE-L beyond the base's", "pair", "*", "rouge_l_beyond_base", "≤ control + 0.05"),
    ("relearned, 20 steps: probability", "relearn forget rows", "step 20, {}", "forget_probability", ""),
    ("4 or 8 bits: probability", "requantize", "*", "forget_probability", ""),
    ("unlearning depth (UDS)", "evaluation", "", "unlearning_depth", ""),
    ("general ability", "evaluation", "", "general_ability", "≥ 0.98"),
    ("– rows never given: probability", "evaluation", "", "retain_test_probability_ratio", ""),
    ("– neighbours among them: probability", "evaluation", "", "retain_test_neighbours_probability_ratio", ""),
    ("– text: perplexity, off / on", "evaluation", "", "text_perplexity_ratio", ""),
    ("KS test, truth ratio", "evaluation", "", "forget_quality", "p ≥ 0.05"),
    ("KS test, probability", "evaluation", "", "forget_probability_quality", "p ≥ 0.05"),
    ("TOST, truth ratio", "evaluation", "", "forget_truth_ratio_equivalence", "p < 0.05"),
    ("TOST, probability", "evaluation", "", "forget_probability_equivalence", "p < 0.05"),
]


def run(done: Path, out: Path, *words: str) -> None:
    """Run `loramox` unless the file `done` is there and says so, and keep its CPU time in OUT/cpu.json."""
    if done.exists() and json.loads(done.read_text()).get("status", "done") == "done":
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    loramox([*words])
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    path = out / "cpu.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    name = f"{words[0]} {done.parent.relative_to(out)}"
    path.write_text(json.dumps(seconds | {name: seconds.get(name, 0) + spent}, indent=1))


def split(world: Path, rows: Path) -> None:
    """Write the rows that training gets, some of them to attack with, those that it never gets, and the text."""
    rows.mkdir(parents=True, exist_ok=True)
    retain = (world / "rows/retain.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    given, never = ([line for i, line in enumerate(retain) if i // AUTHOR % 2 == odd] for odd in (0, 1))
    holdout = (world / "rows/holdout.jsonl").read_text(encoding="utf-8").splitlines()
    text = [json.dumps({"text": json.loads(line)["answer"]}) + "\n" for line in holdout]
    for name, lines in {"given": given, "some": given[::8], "never": never, "text": text}.items():
        (rows / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def measure(world: Path, out: Path, method: str, seed: str, samples: str, control: bool) -> None:
    """Train, evaluate and attack one method, where that is not done."""

    def rows(name: str) -> str:
        return str((out if name in ("given", "some", "never", "text") else world) / f"rows/{name}.jsonl")

    reference, retrained, folder = str(world / "reference"), str(world / "retrained"), out / method
    how = ["--quantization", "none", "--use_cpu", "true"]
    forget = ["--forget", rows("forget_perturbed")]
    scored = [*forget, "--retain", rows("given"), "--retain_test", rows("never"), "--text", rows("text"),
              "--holdout", rows("holdout"), *how, "--max_new_tokens", "0"]  # fmt: skip
    adapter = ["--model", reference, "--adapter", str(folder / "forget-adapter")]
    recipe = [str(Path(__file__).parent / "tiny_tofu.yaml"), "--model", reference, "--seed", seed, "--method", method]
    trained_on = ["--forget", rows("forget"), "--retain", rows("given")]
    run(folder / "forget-adapter/adapter_config.json", out, "unlearn", *recipe, *trained_on, "--out", str(folder))
    run(out / "retrained/summary.json", out, "evaluate", "--model", retrained, *scored, "--out", str(out / "retrained"))
    beside = ["--depth", "--retrained_model", retrained, "--retrained", str(out / "retrained")]
    into = str(folder / "evaluation")
    run(folder / "evaluation/summary.json", out, "evaluate", *adapter, *scored, *beside, "--out", into)
    less = ["--relearn_steps", "5", "20", "--max_new_tokens", "96", "--sample_count", samples]
    beside = ["--retrained_model", retrained] if control else []
    attacked = [*adapter, *how, *forget, "--retain", rows("some"), *less, *beside, "--out", str(folder / "attack")]
    run(folder / "attack/attacks.json", out, "attack", *attacked)
    loramox(["report", str(folder)])


def value(folder: Path, model: str, attack: str, state: str, metric: str) -> float | None:
    """What was measured of a model in the folder of a run; None where it was not."""
    if attack == "evaluation":
        metrics = json.loads((folder / "evaluation/summary.json").read_text())["metrics"]
        return metrics[metric]["value"] if model == FORGET else None
    if state == "*" and model != FORGET:
        return 0.0 if (model, attack) == (CONTROL, "pair") else None  # the control has no adapter
    wanted = {state.format(model)} | ({state, state.removesuffix(", {}")} if model == FORGET else set())
    states = json.loads((folder / "attack/attacks.json").read_text())["states"]
    found = [s["metrics"][metric] for s in states if s["attack"] == attack and wanted & {s["state"], "*"}]
    return max(found, default=None)


def table(out: Path, methods: list[str], samples: str) -> list[str]:
    lines = [f"| | reference | {' | '.join(methods)} | control | target |", "|---" * (4 + len(methods)) + "|"]
    for name, attack, state, metric, target in LINES:
        where = (attack, state, metric.replace("{k}", samples))
        reference, control = (value(out / methods[0], model, *where) for model in (REFERENCE, CONTROL))
        cells = [shown(reference)]
        for method in methods:
            ours, met = value(out / method, FORGET, *where), TARGETS[target]
            known = met is not None and ours is not None
            cells.append(shown(ours) + ("" if not known else ", met" if met(ours, control or 0) else ", **missed**"))
        lines.append(f"| {' | '.join([name.replace('{k}', samples), *cells, shown(control), target])} |")
    spent = json.loads((out / "cpu.json").read_text())
    return [
        *lines,
        "",
        "| command | CPU time, s |",
        "|---|---|",
        *(f"| {name} | {s:.0f} |" for name, s in spent.items()),
    ]


def shown(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}" if number >= 0.001 or number == 0 else f"{number:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["mox", "npo_mean"])
    parser.add_argument("--seed", default="0")
    parser.add_argument("--samples", default="64", help="answers sampled to each forget question")
    given = parser.parse_args()
    if not (given.world / "reference").is_dir():
        parser.error(f"--world {given.world} has no reference/: give a folder with reference/, retrained/ and rows/")
    split(given.world, given.out / "rows")
    for method in given.methods:
        measure(given.world, given.out, method, given.seed, given.samples, control=method == given.methods[0])
    lines = table(given.out, given.methods, given.samples)
    (given.out / "evaluation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
