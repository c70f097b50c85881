"""Everything that loramox measures of a forget adapter, beside a model that never saw the rows, on one table and one picture.

    python recipes/tofu_evaluation.py --world tiny_tofu --out runs/evaluation [--methods mox npo_mean] [--quick]
    python recipes/tofu_evaluation.py --model M --adapter mine=runs/mine/forget-adapter --rows ROWS --out OUT [--retrained R]
    python recipes/tofu_evaluation.py --out runs/evaluation --draw

ROWS has `forget_perturbed.jsonl` or `forget.jsonl`, `retain.jsonl`, and, each if there is one, `never.jsonl` (rows to retain
that training did not get), `text.jsonl` and `holdout.jsonl` (rows like the forget rows that no model has seen). WORLD has
`reference/`, `retrained/` and `rows/`, 20 rows an author: its adapters are trained first, with the rows of every second retain
author. The others are `never`, and the answers of the holdout rows are the text.

Each adapter is evaluated with `--depth` and attacked with every attack, beside 40 of the retain rows. The control is the
retrained model, attacked once, with the first adapter; or else the holdout rows, with which every adapter is attacked. What has
a record is not computed again, so the command can be stopped and started again; other flags on the same OUT are refused. Writes
`evaluation.md`, every figure beside its target with the time of each part, and `evaluation.png`: `--draw` does so from the
records alone. `--quick` asks 20 rows, takes fewer samples and steps, and trains for 4 epochs: too little to compare methods.
Other flags go to `loramox attack`: on a larger model, `--relearn_all_weights false --relearn_rate 1e-3` saves most of the time.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loramox import colours
from loramox.cli import main as loramox
from loramox.files import replacing, write_json

HERE = Path(__file__).parent
AUTHOR, ATTACKED_RETAIN = 20, 40  # rows of an author; retain rows that are attacked
MOST = 3  # adapters, each of which has a colour of its own
REFERENCE, FORGET = "reference model", "forget model"  # as attacks.json names them
CONTROL, CONTROLS = "control", ("retrained model", "rows never known")  # the better one first
ROWS, RETRAINED = "rows", "retrained"  # folders of OUT, which no adapter may be named after
TARGETS: dict[str, Callable[[float, float], bool]] = {  # of an adapter's value and the control's
    "≤ 1.5 × control": lambda value, control: value <= 1.5 * control,
    "≤ control + 0.05": lambda value, control: value <= control + 0.05,
    "≥ 0.98": lambda value, _: value >= 0.98,
    "p ≥ 0.05": lambda p, _: p >= 0.05,
    "p < 0.05": lambda p, _: p < 0.05,
}
# Name, attack, state (* is the highest of all), metric and target. {} is the model, {k} the samples, {last} the last step.
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
    ("relearned on forget rows, {last} steps: probability", "relearn forget rows", "step {last}, {}", "forget_probability", ""),
    ("– on retain rows", "relearn retain rows", "step {last}, {}", "forget_probability", ""),
    ("– on unrelated text", "relearn unrelated text", "step {last}, {}", "forget_probability", ""),
    ("adapter in 4 bits: probability", "requantize", "adapter in 4 bits", "forget_probability", ""),
    ("NF4, int8 or GGUF, the highest: probability", "requantize", "*", "forget_probability", ""),
    ("– GGUF Q8_0", "requantize", "Q8_0, merged first", "forget_probability", ""),
    ("– GGUF Q4_K_M", "requantize", "Q4_K_M, merged first", "forget_probability", ""),
    ("unlearning depth (UDS)", "evaluation", "", "unlearning_depth", ""),
    ("general ability", "evaluation", "", "general_ability", "≥ 0.98"),
    ("– rows never given: probability", "evaluation", "", "retain_test_probability_ratio", ""),
    ("– neighbours among them: probability", "evaluation", "", "retain_test_neighbours_probability_ratio", ""),
    ("– text: perplexity, off / on", "evaluation", "", "text_perplexity_ratio", ""),
    ("KS test, truth ratio", "evaluation", "", "forget_quality", "p ≥ 0.05"),
    ("KS test, probability", "evaluation", "", "forget_probability_quality", "p ≥ 0.05"),
    ("TOST, truth ratio", "evaluation", "", "forget_truth_ratio_equivalence", "p < 0.05"),
    ("TOST, probability", "evaluation", "", "forget_probability_equivalence", "p < 0.05"),
]  # fmt: skip
DRAWN = [line for line in LINES if line[1] != "evaluation" and not line[0].startswith(("–", "leak@1", "greedy"))]


class Work:
    """What is measured, where its records are, and the parts that are done."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out, self.quick = given.out, given.quick
        self.rows = self.out / ROWS
        self.model = given.model or str(given.world / "reference")
        self.retrained = given.retrained or (str(given.world / "retrained") if given.world else None)
        self.how = ["--quantization", "none", *([] if given.gpu else ["--use_cpu", "true"])]
        self.seed, self.more = given.seed, given.more

    def run(self, done: Path, *words: str) -> None:
        """Run `loramox` unless the file `done` is there and says that it is done; keep its time in OUT/seconds.json, and its
        command in OUT/commands.json. Refuses what was done by another command."""
        name, commands = f"{words[0]} {done.parent.relative_to(self.out)}", self.out / "commands.json"
        made = read(commands)
        if done.exists() and json.loads(done.read_text()).get("status", "done") == "done":
            before, now = made.get(name, [*words]), [*words]
            if before != now:
                was, new = (
                    " ".join(w for w in some if w not in other) or "–" for some, other in ((before, now), (now, before))
                )
                raise SystemExit(
                    f"{done.parent} was made with other settings (then: {was}; now: {new}). Choose another --out, or give the flags it was "
                    "made with"
                )
            return
        # Before it runs: a stop may come between its end and the next line.
        write_json(commands, made | {name: [*words]})
        start, path = time.perf_counter(), self.out / "seconds.json"
        loramox([*words])
        held = read(path)
        write_json(path, held | {name: held.get(name, 0) + time.perf_counter() - start})

    def part(self, name: str, flag: str) -> list[str]:
        """The flag for a file of rows, if there is such a file."""
        path = next((p for p in sorted(self.rows.glob(f"{name}.*"), reverse=True)), None)
        return [flag, str(path)] if path else []

    def train(self, method: str) -> str:
        """An adapter of the world's reference, made by a method; returns its folder."""
        adapter = self.out / method / "forget-adapter"
        recipe = [str(HERE / "tiny_tofu.yaml"), "--model", self.model, "--seed", self.seed, "--method", method]
        recipe += ["--auto_retain", "120"]  # the default of mox, for every method
        less = ["--num_train_epochs", "4"] if self.quick else []
        rows = [*self.part("trained_on", "--forget"), *self.part("retain", "--retain")]
        out = ["--overwrite", "--out", str(adapter.parent)]  # a stop during training leaves a run without an adapter
        self.run(adapter / "adapter_config.json", "unlearn", *recipe, *less, *rows, *out)
        return str(adapter)

    def measure(self, name: str, adapter: str, control: bool) -> None:
        """Evaluate and attack one adapter."""
        forget = self.part("forget", "--forget")
        scored = [*forget, *self.part("retain", "--retain"), *self.part("never", "--retain_test"), *self.how,
                  *self.part("text", "--text"), *self.part("holdout", "--holdout"), "--max_new_tokens", "0"]  # fmt: skip
        adapted, folder = ["--model", self.model, "--adapter", adapter], self.out / name
        beside: list[str] = []
        if self.retrained:
            theirs = self.out / RETRAINED
            self.run(theirs / "summary.json", "evaluate", "--model", self.retrained, *scored, "--out", str(theirs))
            beside = ["--depth", "--retrained_model", self.retrained, "--retrained", str(theirs)]
        into = folder / "evaluation"
        self.run(into / "summary.json", "evaluate", *adapted, *scored, *beside, "--out", str(into))
        beside = ["--retrained_model", self.retrained] if self.retrained else self.part("holdout", "--holdout")
        beside = beside if control else []
        rows = [*forget, *self.part("some", "--retain"), *self.part("unrelated", "--relearn_text")]
        # The attacker's batches are of half the usual size, so that all rates fit into the time.
        much = ["--relearn_steps", "20", "100", "--relearn_rate", "1e-4", "3e-4", "1e-3", "--relearn_all_weights", "true",
                "--relearn_batch", "4", "--sample_count", "64", "--max_new_tokens", "64"]  # fmt: skip
        little = ["--quick", "true", "--relearn_steps", "20", "--sample_count", "8", "--max_new_tokens", "32", "--guidance", "1"]  # fmt: skip
        into = folder / "attack"
        how = [*(little if self.quick else much), *self.more, "--seed", self.seed, "--out", str(into)]
        self.run(into / "attacks.json", "attack", *adapted, *self.how, *rows, *beside, *how)
        if (folder / "run.json").exists():
            loramox(["report", str(folder)])


def collect(given: argparse.Namespace, rows: Path) -> None:
    """Write the rows of every part to a folder, under the names that `Work.part` knows. Refuses a folder with other rows."""
    source = given.rows or given.world / "rows"

    def lines(name: str) -> list[str]:
        path = source / f"{name}.jsonl"
        return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []

    retain = lines("retain")
    parts = {
        "forget": lines("forget_perturbed") or lines("forget"),
        "never": lines("never"),
        "holdout": lines("holdout"),
        "text": lines("text"),
    }
    if given.world:
        answers = (json.loads(line)["answer"] for line in parts["holdout"])
        parts |= {"never": [line for i, line in enumerate(retain) if i // AUTHOR % 2], "trained_on": lines("forget")}
        parts["text"] = [json.dumps({"text": answer}) + "\n" for answer in answers]
        retain = [line for i, line in enumerate(retain) if not i // AUTHOR % 2]
    parts |= {"retain": retain, "some": retain[:: math.ceil(len(retain) / ATTACKED_RETAIN) or 1]}
    licence = [each.strip() for each in (HERE.parent / "LICENSE").read_text(encoding="utf-8").split("\n\n")]
    files = {f"{name}.jsonl": "".join(some) for name, some in parts.items() if some}
    files["unrelated.txt"] = "\n".join(" ".join(each.split()) for each in licence)
    held = {path.name: path.read_text(encoding="utf-8") for path in rows.glob("[!.]*")}  # without what a kill has left
    if other := sorted(name for name, text in held.items() if text != files.get(name)):
        raise SystemExit(
            f"{rows} has other rows than {source} ({', '.join(other)}), and what is in {rows.parent} was measured on those. Choose "
            f"another --out, or delete {rows.parent} to measure again"
        )
    for name in files.keys() - held.keys():
        with replacing(rows / name) as partial:
            partial.write_text(files[name], encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A record, or nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def value(folder: Path, model: str, line: tuple[str, ...]) -> float | None:
    """What was measured of a model for one of `LINES`, in the folder of an adapter; None where it was not."""
    _, attack, state, metric, _ = line
    if attack == "evaluation":
        metrics = read(folder / "evaluation/summary.json").get("metrics", {})
        return metrics[metric]["value"] if model == FORGET and metric in metrics else None
    record = read(folder / "attack/attacks.json")
    settings = record.get("settings", {})
    fill = {"k": settings.get("sample_count"), "last": max(settings.get("relearn_steps", [0]))}
    states = record.get("states", ())
    if model == CONTROL:
        model = next((c for c in CONTROLS if any(s["state"].endswith(c) for s in states)), CONTROL)
    if (model, attack) == (CONTROLS[0], "pair"):
        return 0.0  # a retrained model has no adapter
    # The forget model's states of some attacks do not name it.
    wanted = {state.format(model, **fill)} | (
        {state.format("", **fill).removesuffix(", ")} if model == FORGET else set()
    )

    def counts(name: str) -> bool:
        of = next((each for each in (REFERENCE, *CONTROLS) if name.endswith(each)), FORGET)
        return of == model if state == "*" else name in wanted and ("{}" in state or model == FORGET)

    found = [
        s["metrics"].get(metric.format(**fill))
        for s in states
        # Of an attack that was made at several rates, the highest counts.
        if (s["attack"] + ",").startswith(attack + ",") and counts(s["state"])
    ]
    return max((each for each in found if each is not None), default=None)


def named(out: Path, line: tuple[str, ...], adapters: list[str]) -> str:
    settings = read(out / adapters[0] / "attack/attacks.json").get("settings", {})
    return line[0].format(k=settings.get("sample_count"), last=max(settings.get("relearn_steps", [0])))


def controls(out: Path, adapters: list[str]) -> dict[str, str]:
    """adapter → the one whose record has its control: the first for a retrained model, itself for holdout rows."""

    def has(name: str, control: str) -> bool:
        return any(s["state"].endswith(control) for s in read(out / name / "attack/attacks.json").get("states", ()))

    if has(adapters[0], CONTROLS[0]):
        return dict.fromkeys(adapters, adapters[0])
    return {name: name for name in adapters if has(name, CONTROLS[1])}


def table(out: Path, adapters: list[str]) -> list[str]:
    lines = [f"| | reference | {' | '.join(adapters)} | control | target |", "|---" * (4 + len(adapters)) + "|"]
    holders = controls(out, adapters)
    for line in LINES:
        control_of = {name: value(out / name, CONTROL, line) for name in holders.values()}
        cells, target = [shown(value(out / adapters[0], REFERENCE, line))], line[-1]
        for adapter in adapters:
            ours, control = value(out / adapter, FORGET, line), control_of.get(holders.get(adapter, ""))
            judged = ours is not None and target and (control is not None or "control" not in target)
            met = ", met" if judged and TARGETS[target](ours, control or 0) else ", **missed**" if judged else ""
            cells.append(shown(ours) + met)
        cells.append(", ".join(map(shown, control_of.values())) or "–")
        lines.append(f"| {' | '.join([named(out, line, adapters), *cells, target])} |")
    records = [read(out / adapter / "attack/attacks.json").get("absent", {}) for adapter in adapters]
    for each in records[1:]:
        each.pop("control", None)  # a retrained model is attacked with the first adapter alone
    absent = {name: why for each in records for name, why in each.items()}
    several = ["", f"Controls: of {', '.join(holders)}."] if len(set(holders.values())) > 1 else []
    lines += ["", "–: not measured.", *several, "", *(f"- not asked: {name}: {why}" for name, why in absent.items())]
    spent = [f"| {name} | {seconds:.0f} |" for name, seconds in read(out / "seconds.json").items()]
    return [*lines, "", "| part | time, s |", "|---|---|", *spent]


def draw(path: Path, out: Path, adapters: list[str]) -> None:
    """For each family of attacks a bar for each adapter, the reference and the control."""
    from matplotlib.figure import Figure

    models = [(adapter, adapter, FORGET) for adapter in adapters]
    models += [("reference", adapters[0], REFERENCE)]
    # A label that begins with _ is not in the legend.
    of_controls = dict.fromkeys(controls(out, adapters).values())
    models += [("_control" if place else "control", name, CONTROL) for place, name in enumerate(of_controls)]
    ours = (colours.FORGET, colours.RETAIN, colours.CHOSEN)
    shades = [*ours[: len(adapters)], colours.MUTED, *[colours.RETRAINED] * len(of_controls)]
    figure = Figure(figsize=(8, 0.22 * len(DRAWN) * (len(models) + 1) + 1), layout="constrained")
    axes = figure.subplots()
    for at, ((label, adapter, model), shade) in enumerate(zip(models, shades, strict=True)):
        found = [(i, value(out / adapter, model, line)) for i, line in enumerate(DRAWN)]
        known, width = [(i, v) for i, v in found if v is not None], 0.8 / len(models)
        axes.barh([i + at * width for i, _ in known], [v for _, v in known], width, color=shade, label=label)
    axes.set_yticks([i + 0.3 for i in range(len(DRAWN))], [named(out, line, adapters) for line in DRAWN])
    axes.set(xlim=(0, 1.02), xlabel="what comes back: further right is more")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=len(models))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def shown(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}" if number >= 0.001 or number == 0 else f"{number:.1e}"


def check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if given.world and not (given.world / "reference").is_dir():
        parser.error(f"--world {given.world} has no reference/: give a folder with reference/, retrained/ and rows/")
    if not given.world and not (given.model and given.adapter and given.rows):
        parser.error("give --world, or --model, --adapter and --rows")
    if odd := [each for each in given.adapter or () if not all(each.partition("="))]:
        parser.error(f"--adapter {odd[0]}: give NAME=FOLDER")
    names = [each.partition("=")[0] for each in given.adapter or given.methods]
    if taken := [
        name for name in names if name in (ROWS, RETRAINED, "..") or Path(name).name != name or names.count(name) > 1
    ]:
        parser.error(
            f"an adapter cannot be named {taken[0]}: each has a folder of its own in --out, which has {ROWS} and {RETRAINED} too. "
            "Give another name (--adapter NAME=FOLDER)"
        )
    if len(given.adapter or given.methods) > MOST:
        parser.error(f"the picture has room for {MOST} adapters: give fewer (--adapter, --methods)")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, help="a folder with reference/, retrained/ and rows/")
    parser.add_argument("--methods", nargs="+", default=["mox"], help="methods to train with, for --world")
    parser.add_argument("--model", help="instead of a world: the model")
    parser.add_argument("--adapter", nargs="+", metavar="NAME=FOLDER", help=f"its forget adapters, at most {MOST}")
    parser.add_argument("--rows", type=Path, help="the folder of its rows")
    parser.add_argument("--retrained", help="a model that never saw the forget rows: the control")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--gpu", action="store_true", help="use the GPU that is there")
    parser.add_argument("--quick", action="store_true", help="a first look")
    parser.add_argument("--draw", action="store_true", help="only write table and picture, from the records in OUT")
    given, given.more = parser.parse_known_args(words)
    if given.draw:
        adapters = read(given.out / "adapters.json")
        if not adapters:
            parser.error(f"--out {given.out} has no adapters.json: measure first, without --draw")
    else:
        check(parser, given)
        work = Work(given)
        collect(given, work.rows)
        named_ones = dict(each.partition("=")[::2] for each in given.adapter or ())
        adapters = named_ones or {method: work.train(method) for method in given.methods}
        write_json(given.out / "adapters.json", adapters)
        for place, (name, folder) in enumerate(adapters.items()):
            # Holdout rows are a control of the adapter that they are attacked with, a retrained model of all.
            work.measure(name, folder, control=place == 0 or not work.retrained)
    lines = table(given.out, list(adapters))
    (given.out / "evaluation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(given.out / "evaluation.png", given.out, list(adapters))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
