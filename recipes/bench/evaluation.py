"""`loramox evaluate` beside OpenUnlearning's evaluation: do the numbers agree, and how long do they take.

    python -m recipes.bench.evaluation --openunlearning open-unlearning --world tiny_tofu --tofu tofu \\
        [--model reference retrained PATH] [--rounds 5] [--rows N] [--out recipes/bench/results/evaluation.md]

OpenUnlearning is a checkout of github.com/locuslab/open-unlearning, whose metric functions, data set and collator are
called (open_unlearning.py); it needs omegaconf and scikit-learn. WORLD has `reference/`, `retrained/` and `rows/`, as in
recipes/README.md; TOFU has TOFU's own files.

Agreement: the same model, rows, tokens and generation length on both sides. Loramox puts the space before an answer to the
answer, as most tokenizers do; OpenUnlearning's prompts for plain models end in it. Here OpenUnlearning gets a prompt without
it and answers that begin with it, and one table more says what its own prompt does. Speed: one thread, batches of 32, in
turns in one process, tokenising included, reading files not.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramox import Tokenisation, read_rows
from loramox.evaluate.measure import Questions, Record, ScoringConfig
from loramox.evaluate.summary import summarise

from .open_unlearning import imported

BATCH, NEW_TOKENS, CONTEXT, FLAGGED = 32, 200, 512, 1e-3
SPACE_IN_ANSWER, SPACE_IN_PROMPT = "Answer:", "Answer: "
UTILITY = ("retain", "real_authors", "world_facts")
PER_ROW = ("probability", "rouge_l", "rouge_l_f1", "truth_ratio", "exact_memorization", "extraction_strength")
NO_ZERO = "theirs is 1/n, not 0, where the last token is wrong; with that rule ours is {:.5g}, off by {:.0e}"

OWN_PROMPT = """{}, two parts. OpenUnlearning's prompt for plain models ends in `Answer: `: a token for that space, which the whole
row does not have, ends the prompt; the first token of every answer is not scored, and answers are generated from there."""

SPEED = """TOFU's own 400 forget (forget10) and 400 retain rows with one paraphrase and five wrong answers each: probability, ROUGE-L
(batches of {} answers, at most {} tokens generated), truth ratio, exact memorization and extraction strength on both sides, in
turns. Median over rounds, with the range. `reference` knows some of the rows by heart, `retrained` fewer.

| model | rows | rounds | loramox, rows/s | OpenUnlearning, rows/s | ratio, wall-clock | ratio, CPU time | where OpenUnlearning's time goes |
|---|---|---|---|---|---|---|---|"""


class OpenUnlearning:
    """Its metrics on the rows of some files, under loramox's names. `prompt_end` says where the space before an answer goes."""

    def __init__(
        self, checkout: Path, tokenizer, files: dict[str, Path], prompt_end: str, rows: int | None = None
    ) -> None:
        self.tokenizer, self.prompt_end = tokenizer, prompt_end
        self.their = imported(checkout)
        self.folder = tempfile.TemporaryDirectory()
        self.data = {part: self._data(part, file, rows) for part, file in files.items()}
        self.collate = {side: self.their.Collator(tokenizer, side, "index") for side in ("left", "right")}
        self.seconds: dict[str, float] = {}  # by metric, of the last call

    def _data(self, part: str, file: Path, rows: int | None) -> dict:
        space = " " if self.prompt_end == SPACE_IN_ANSWER else ""
        records = [json.loads(line) for line in file.read_text().splitlines()][:rows]
        for record in records:
            for column in {"answer", "paraphrased_answer"} & record.keys():
                record[column] = space + record[column]
            record["perturbed_answer"] = [space + answer for answer in record["perturbed_answer"]]
        copy = Path(self.folder.name) / f"{part}.jsonl"
        copy.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = {"path": "json", "data_files": str(copy), "split": "train", "cache_dir": self.folder.name}
        template = {"apply_chat_template": False, "user_start_tag": "Question: ", "user_end_tag": "\n"}
        template |= {"asst_start_tag": self.prompt_end, "asst_end_tag": ""}

        def answers(column: str, generate: bool = False):
            more = {"answer_key": column, "max_length": CONTEXT, "predict_with_generate": generate}
            return self.their.QADataset(source, template, self.tokenizer, **more)

        true = "paraphrased_answer" if "paraphrased_answer" in records[0] else "answer"
        return {"answer": answers("answer"), "asked": answers("answer", True), "wrong": answers("perturbed_answer")} | (
            {"true": answers(true)} if true != "answer" else {}
        )

    def _run(self, name: str, model, **given) -> dict:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            result = self.their.metrics[name].evaluate_metric(model, name, batch_size=BATCH, **given)
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start
        return result

    def per_row(self, model) -> tuple[dict[str, float], dict]:
        """Means over each part, and the truth ratios of the forget rows."""
        self.seconds = {}
        found: dict[str, float] = {}
        ratios = {}
        greedy = self.their.OmegaConf.create(
            {"do_sample": False, "top_p": None, "temperature": None, "max_new_tokens": NEW_TOKENS, "use_cache": True}
        )
        for part, data in self.data.items():
            answer, wrong, *true = (
                self._run("probability", model, data=data[which], collators=self.collate["right"])
                for which in ("answer", "wrong", "true")
                if which in data
            )
            options = {"pre_compute": {"correct": true[0] if true else answer, "wrong": wrong}}
            if part in ("real_authors", "world_facts"):
                found[f"{part}_probability"] = self._run("probability_w_options", model, **options)["agg_value"]
            else:
                found[f"{part}_probability"] = answer["agg_value"]
            said = self._run("rouge", model, data=data["asked"], collators=self.collate["left"], tokenizer=self.tokenizer,
                             generation_args=greedy, rouge_type="rougeL_recall")  # fmt: skip
            found[f"{part}_rouge_l"] = said["agg_value"]
            found[f"{part}_rouge_l_f1"] = np.mean([row["rougeL_f1"] for row in said["value_by_index"].values()])
            better = "closer_to_1_better" if part == "forget" else "true_better"
            ratio = self._run("truth_ratio", model, aggregator=better, **options)
            ratios = ratio if part == "forget" else ratios
            found[f"{part}_truth_ratio"] = ratio["agg_value"]
            for name in ("exact_memorization", "extraction_strength"):
                result = self._run(name, model, data=data["answer"], collators=self.collate["right"])
                found[f"{part}_{name}"] = result["agg_value"]
        return found, ratios

    def everything(self, model, retrained: tuple[dict, dict] | None, reference: Path) -> tuple[dict[str, float], dict]:
        """Also what compares: with the holdout rows, and with `retrained`, this function's result for the retrained model."""
        found, ratios = self.per_row(model)
        attacked = {part: self.data[part]["answer"] for part in ("forget", "holdout")}
        for name in ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_reference"):
            more = {"k": 0.4, "tokenizer": self.tokenizer, "reference_model_path": str(reference)}
            attack = self._run(name, model, data=attacked, collators=self.collate["right"], **more)
            found[name] = attack["agg_value"]
        nine = [f"{part}_{what}" for part in UTILITY for what in ("probability", "rouge_l", "truth_ratio")]
        together = {name: {"agg_value": found[name]} for name in nine}
        found["model_utility"] = self._run("hm_aggregate", model, pre_compute=together)["agg_value"]
        clean, their_ratios = retrained or (found, ratios)
        for name, ours, theirs in (
            ("ks_test", ratios, their_ratios),
            ("privleak", {"agg_value": found["mia_min_k"]}, {"agg_value": clean["mia_min_k"]}),
        ):
            logs = {"retain_model_logs": {"retain": theirs}}
            result = self._run(name, model, pre_compute={"forget": ours}, reference_logs=logs, ref_value=0.5)
            found[{"ks_test": "forget_quality", "privleak": "priv_leak"}[name]] = result["agg_value"]
        return found, ratios


def questions(files: dict[str, Path], tokenizer, rows: int | None = None) -> Callable[[], Questions]:
    """The rows are read now, and tokenised when called."""
    read = {part: read_rows(str(file))[:rows] for part, file in files.items()}
    scoring = ScoringConfig(batch_size=BATCH, max_new_tokens=NEW_TOKENS, use_cpu=True)
    return lambda: Questions(read, tokenizer, Tokenisation(), CONTEXT, scoring)


def why(name: str, records: list[Record], theirs: dict[str, float]) -> str:
    """The reason for a difference, with the check that it is all of it."""
    part, _, what = name.rpartition("_extraction_strength")
    if what or not part:
        return "?"
    rows = [r for r in records if r["part"] == part]
    with_their_rule = np.mean([max(r["extraction_strength"], 1 / (r["tokens"] - 1)) for r in rows])
    return NO_ZERO.format(with_their_rule, abs(with_their_rule - theirs[name]))


def compared(ours: dict[str, float], theirs: dict[str, float], reason: Callable[[str], str]) -> str:
    lines = ["| metric | loramox | OpenUnlearning | difference | why |", "|---|---|---|---|---|"]
    for name, value in theirs.items():
        difference = ours[name] - value
        because = reason(name) if abs(difference) > FLAGGED else ""
        lines.append(f"| {name} | {ours[name]:.5g} | {value:.5g} | {difference:+.0e} | {because} |")
    return "\n".join(lines)


def agreement(given: argparse.Namespace, tokenizer) -> Iterator[str]:
    parts = {p: given.world / f"rows/{p}_perturbed.jsonl" for p in ("forget", "retain", "holdout")}
    parts |= {p: given.tofu / f"{p}_perturbed.jsonl" for p in ("real_authors", "world_facts")}
    same = OpenUnlearning(given.openunlearning, tokenizer, parts, SPACE_IN_ANSWER)
    ask = questions(parts, tokenizer)()
    counts = ", ".join(f"{part} {sum(r['part'] == part for r in ask.identities())}" for part in parts)
    yield f"\n## Agreement\n\nn: {counts} rows. The same tokens on both sides; differences above {FLAGGED:g} are explained."
    gold = given.world / "retrained"
    retrained = AutoModelForCausalLM.from_pretrained(gold).eval()
    clean, their_clean = asked(ask, retrained), same.everything(retrained, None, gold)
    models = [given.world / m if m in ("reference", "retrained") else Path(m) for m in given.model]
    for folder in models:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        records = clean if folder == gold else asked(ask, model)
        theirs, _ = their_clean if folder == gold else same.everything(model, their_clean, gold)
        reason = functools.partial(why, records=records, theirs=theirs)
        yield f"\n### {folder.name}\n\n" + compared(values(records, clean), theirs, reason)
    some = {part: parts[part] for part in ("forget", "world_facts")}
    model = AutoModelForCausalLM.from_pretrained(models[0]).eval()
    shipped, _ = OpenUnlearning(given.openunlearning, tokenizer, some, SPACE_IN_PROMPT).per_row(model)
    ours = values(asked(questions(some, tokenizer)(), model))
    yield "\n## With OpenUnlearning's own prompt\n\n" + OWN_PROMPT.format(models[0].name) + "\n"
    yield compared(ours, shipped, lambda name: "the space" + (", and 1/n for 0" if "strength" in name else ""))


def values(records: list[Record], retrained: Sequence[Record] = ()) -> dict[str, float]:
    return {name: metric.value for name, metric in summarise(records, retrained).metrics.items()}


def asked(ask: Questions, model) -> list[Record]:
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        return ask.ask(model)


def speed(given: argparse.Namespace, tokenizer) -> Iterator[str]:
    files = {"forget": given.tofu / "forget10_perturbed.jsonl", "retain": given.tofu / "retain_perturbed.jsonl"}
    yield "\n## Speed\n\n" + SPEED.format(BATCH, NEW_TOKENS)
    for label in ("reference", "retrained"):
        model = AutoModelForCausalLM.from_pretrained(given.world / label).eval()
        for rows, rounds in ((given.rows, given.rounds), (None, 1)):
            theirs = OpenUnlearning(given.openunlearning, tokenizer, files, SPACE_IN_ANSWER, rows)
            ours = questions(files, tokenizer, rows)
            taken: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
            sides = {"ours": lambda f=ours, m=model: summarise(asked(f(), m)), "theirs": lambda t=theirs, m=model: t.per_row(m)}  # fmt: skip
            for round_ in range(rounds):
                for side in sorted(sides, reverse=round_ % 2 == 1):
                    wall, own = time.perf_counter(), time.process_time()
                    sides[side]()
                    taken[side].append((time.perf_counter() - wall, time.process_time() - own))
            n = sum(len(data["answer"]) for data in theirs.data.values())
            rate = {side: statistics.median(n / wall for wall, _ in times) for side, times in taken.items()}
            ratios = [[b[i] / a[i] for a, b in zip(taken["ours"], taken["theirs"], strict=True)] for i in (0, 1)]
            spread = [f"{statistics.median(r):.2f} ({min(r):.2f} … {max(r):.2f})" for r in ratios]
            share = ", ".join(f"{name} {s / sum(theirs.seconds.values()):.0%}" for name, s in theirs.seconds.items() if s > 0.1)  # fmt: skip
            yield f"| {label} | {n} | {rounds} | {rate['ours']:.1f} | {rate['theirs']:.1f} | {spread[0]} | {spread[1]} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openunlearning", type=Path, required=True)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--tofu", type=Path, required=True)
    parser.add_argument("--model", nargs="+", default=["reference", "retrained"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, default=100, help="rows of each part in every round; one round more has all"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(given.world / "reference")
    words = [w if not w.startswith("/") else Path(w).name for w in sys.argv[1:]]
    versions = ", ".join(f"{p} {version(p)}" for p in ("transformers", "rouge-score", "scikit-learn", "scipy"))
    header = [
        "# `loramox evaluate` beside OpenUnlearning\n",
        f"`python -m recipes.bench.evaluation {' '.join(words)}`\n",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}, {versions}.",
    ]
    lines = []
    for line in itertools.chain(header, speed(given, tokenizer), agreement(given, tokenizer)):
        print(line, flush=True)
        lines.append(line)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
