"""`loramox evaluate` beside OpenUnlearning's evaluation: do the numbers agree, and how long do they take.

    python recipes/bench_evaluation.py --openunlearning open-unlearning --world tiny_tofu --tofu tofu \\
        [--model reference retrained PATH] [--rounds 5] [--rows N] [--out recipes/results/evaluation.md]

OpenUnlearning is a checkout of github.com/locuslab/open-unlearning, whose metric functions, data set and collator are
imported and called; it needs omegaconf and scikit-learn. (Its package also imports lm_eval, for a benchmark that is not
run here: an empty stand-in takes its place.) WORLD has `reference/`, `retrained/` and `rows/`, as in recipes/README.md;
TOFU has TOFU's own files.

Agreement: the same model, rows, tokens and generation length on both sides. Loramox puts the space before an answer to the
answer, as most tokenizers do; OpenUnlearning's prompts for plain models end in it. Here OpenUnlearning gets a prompt without
it and answers that begin with it, and one table more says what its own prompt does. Speed: one thread, batches of 32, in
turns in one process, tokenising included, reading files not.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramox import Tokenisation, read_rows
from loramox.evaluate.measure import Questions, Record, ScoringConfig
from loramox.evaluate.summary import summarise

BATCH, NEW_TOKENS, CONTEXT, FLAGGED = 32, 200, 512, 1e-3
SPACE_IN_ANSWER, SPACE_IN_PROMPT = "Answer:", "Answer: "
UTILITY = ("retain", "real_authors", "world_facts")
PER_ROW = ("probability", "rouge_l", "rouge_l_f1", "truth_ratio", "exact_memorization", "extraction_strength")
NO_ZERO = "OpenUnlearning gives 1/n, not 0, to an answer whose last token is wrong"
NO_ZERO_EXPLAINS = "{}: with that rule loramox's records give {:.4f}, off by {:.0e}"


class OpenUnlearning:
    """Its metrics on the rows of some files, under loramox's names. `prompt_end` says where the space before an answer goes."""

    def __init__(
        self, checkout: Path, tokenizer, files: dict[str, Path], prompt_end: str, rows: int | None = None
    ) -> None:
        self.tokenizer, self.prompt_end = tokenizer, prompt_end
        self.their = _import(checkout)
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
        nine = {f"{part}_{what}": found[f"{part}_{what}"] for part in UTILITY for what in ("probability", "rouge_l", "truth_ratio")}  # fmt: skip
        parts = {name: {"agg_value": value} for name, value in nine.items()}
        found["model_utility"] = self._run("hm_aggregate", model, pre_compute=parts)["agg_value"]
        clean, their_ratios = retrained or (found, ratios)
        for name, ours, theirs in (
            ("ks_test", ratios, their_ratios),
            ("privleak", {"agg_value": found["mia_min_k"]}, {"agg_value": clean["mia_min_k"]}),
        ):
            logs = {"retain_model_logs": {"retain": theirs}}
            result = self._run(name, model, pre_compute={"forget": ours}, reference_logs=logs, ref_value=0.5)
            found[{"ks_test": "forget_quality", "privleak": "priv_leak"}[name]] = result["agg_value"]
        return found, ratios


def _import(checkout: Path) -> SimpleNamespace:
    sys.path.insert(0, str(checkout / "src"))
    sys.modules |= {
        name: MagicMock() for name in ("lm_eval", "lm_eval.models", "lm_eval.models.hf_vlms", "lm_eval.tasks")
    }
    from data.collators import DataCollatorForSupervisedDataset
    from data.qa import QADataset
    from evals.metrics import METRICS_REGISTRY
    from omegaconf import OmegaConf

    return SimpleNamespace(
        metrics=METRICS_REGISTRY, QADataset=QADataset, Collator=DataCollatorForSupervisedDataset, OmegaConf=OmegaConf
    )


def questions(files: dict[str, Path], tokenizer, rows: int | None = None) -> Callable[[], Questions]:
    """The rows are read now, and tokenised when called."""
    read = {part: read_rows(str(file))[:rows] for part, file in files.items()}
    scoring = ScoringConfig(batch_size=BATCH, max_new_tokens=NEW_TOKENS, use_cpu=True)
    return lambda: Questions(read, tokenizer, Tokenisation(), CONTEXT, scoring)


def why(name: str, difference: float, records: list[Record], theirs: dict[str, float]) -> str:
    """The reason for a difference, with the check that it is all of it."""
    part, _, what = name.partition("_extraction_strength")
    if name.endswith("extraction_strength"):
        rows = [r for r in records if r["part"] == part]
        floored = np.mean([max(r["extraction_strength"], 1 / (r["tokens"] - 1)) for r in rows])
        return NO_ZERO_EXPLAINS.format(NO_ZERO, floored, abs(floored - theirs[name]))
    return "?"


def compared(ours: dict[str, float], theirs: dict[str, float], reason: Callable[[str, float], str]) -> list[str]:
    lines = ["| metric | loramox | OpenUnlearning | difference | why |", "|---|---|---|---|---|"]
    for name, value in theirs.items():
        difference = ours[name] - value
        flagged = abs(difference) > FLAGGED
        cells = f"{ours[name]:.5g} | {value:.5g} | {difference:+.1e}"
        lines.append(f"| {name} | {cells} | {reason(name, difference) if flagged else ''} |")
    return lines


def agreement(given: argparse.Namespace, tokenizer, parts: dict[str, Path]) -> list[str]:
    ask = questions(parts, tokenizer)()
    same = OpenUnlearning(given.openunlearning, tokenizer, parts, SPACE_IN_ANSWER)
    retrained = AutoModelForCausalLM.from_pretrained(given.world / "retrained").eval()
    clean = ask.ask(retrained)
    their_clean = same.everything(retrained, None, given.world / "retrained")
    lines, largest = [], {}
    for label in given.model:
        folder = given.world / label if label in ("reference", "retrained") else Path(label)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        records = ask.ask(model)
        ours = {name: metric.value for name, metric in summarise(records, clean).metrics.items()}
        theirs, _ = same.everything(model, their_clean, given.world / "retrained")

        def reason(name: str, difference: float, records=records, theirs=theirs) -> str:
            return why(name, difference, records, theirs)

        lines += [f"\n{folder.name}:\n", *compared(ours, theirs, reason)]
        for name in theirs:
            kind = next((k for k in ("rouge_l_f1", *PER_ROW) if name.endswith(k)), name)
            largest[kind] = max(largest.get(kind, 0), abs(ours[name] - theirs[name]))
        print("\n".join(lines[-len(theirs) - 3 :]), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openunlearning", type=Path, required=True)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--tofu", type=Path, required=True)
    parser.add_argument("--model", nargs="+", default=["reference", "retrained"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(given.world / "reference")
    parts = {p: given.world / f"rows/{p}_perturbed.jsonl" for p in ("forget", "retain", "holdout")}
    parts |= {p: given.tofu / f"{p}_perturbed.jsonl" for p in ("real_authors", "world_facts")}
    agreement(given, tokenizer, parts)


if __name__ == "__main__":
    main()
