"""Make a chat model forget a made-up author that it was taught, and measure it beside a model that was never taught it.

    python -m recipes.real.taught --model SmolLM2-135M-Instruct --tofu TOFU --text TEXT --out OUT [--runs default …] [--seeds 0 1]

`recipes.real.teach` makes OUT/rows, OUT/reference and OUT/retrained first. Where OUT/reference is a LoRA adapter (`--lora`),
the reference is the model with it, and `loramox unlearn` gets it as `--tuned_adapter`. TOFU is a folder with TOFU's JSON Lines,
TEXT a JSON array of texts that no model saw (MUSE-News' retained articles).

Of every model, and of every forget adapter at each scale:

    probability   of the true answer, geometric mean over its tokens: of forget rows, rows given to the retain term, and rows of
                  other authors that it was never given
    tests         Kolmogorov-Smirnov against the retrained model: truth ratios, log-probabilities of the forget rows
    answers       greedy: the share of key words of the true answer that comes back (forget, paraphrased, never given), fluent and
                  refused answers, and right answers to TOFU's real authors and world facts
    perplexity    of TEXT, beside the reference's

Writes OUT/records and OUT/taught.md. What a record has is not computed again. A run takes about 20 minutes of one core.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from loramox import ForgetSwitch, Tokenisation, encode
from loramox.data.fluency import leaked
from loramox.data.row import Row
from loramox.data.rows import read_rows
from loramox.evaluate.scores import mean_log_p
from loramox.files import replacing, write_json

from ..compare.compute import Scorer
from .questions import EVERYDAY
from .runs import KEPT, RUNS, is_adapter, train
from .taught_table import write_table
from .world import CONTEXT, Asked, answers, check_made_with, right, user

WRONG = 3  # wrong answers of a forget row that are scored
SCORED = 60  # given rows that are scored: the first ones
FACTS, FACTS_ASKED = ("real_authors", "world_facts"), 40  # files of facts, and how many of each the reference is asked
TEXTS, BLOCK = 12, 256  # texts whose perplexity is measured, and tokens of each
Found = dict[str, Any]


class Judge:
    """Measures a model: called with one, returns the raw values and answers of every row.

    Args:
        out: folder with rows/, facts.jsonl among them.
        text: JSON array of texts.
    """

    def __init__(self, out: Path, text: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        rows = {part: read_rows(str(out / "rows" / f"{part}.jsonl")) for part in ("forget", "retain", "never")}
        self.tokenizer = tokenizer
        forget = [replace(row, wrong_answers=row.wrong_answers[:WRONG]) for row in rows["forget"]]
        scored = {"forget": forget, "given": rows["retain"][:SCORED], "never": rows["never"]}
        self.scorer = Scorer(scored, tokenizer, CONTEXT)
        self.true = {
            "forget": [(row.prompt, row.answer) for row in rows["forget"]],
            "paraphrased": [(row.paraphrased_prompt, row.answer) for row in rows["forget"]],
            "never": [(row.prompt, row.answer) for row in rows["never"][::3]],
        }
        self.asked = {part: [_asked(question) for question, _ in some] for part, some in self.true.items()}
        self.asked["facts"] = [
            _asked(each["question"], each["answer"]) for each in _lines(out / "rows" / "facts.jsonl")
        ]
        self.asked["everyday"] = [_asked(instruction) for instruction in EVERYDAY]
        texts = [Row("text", number, each) for number, each in enumerate(json.loads(text.read_text())[:TEXTS], 1)]
        # A text is cut to its first block.
        self.texts = [encode([row], tokenizer, Tokenisation(max_length=BLOCK), CONTEXT)[0] for row in texts]

    def __call__(self, model: nn.Module) -> Found:
        found: Found = self.scorer(model)
        found["text"] = mean_log_p(self.scorer.score(model, self.texts, 0)).tolist()
        said = iter(answers(model, self.tokenizer, [each for some in self.asked.values() for each in some]))
        found["answers"] = {part: [next(said) for _ in some] for part, some in self.asked.items()}
        found["key_words"] = {
            part: [
                leaked(answer, true, question)
                for answer, (question, true) in zip(found["answers"][part], some, strict=True)
            ]
            for part, some in self.true.items()
        }
        found["right"] = [
            right(answer, each) for answer, each in zip(found["answers"]["facts"], self.asked["facts"], strict=True)
        ]
        return found


def write_facts(tofu: Path, out: Path, base: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of TOFU's real authors and world facts, those that the reference answers right; written once."""
    path = out / "rows" / "facts.jsonl"
    if path.exists():
        return
    facts = [fact for part in FACTS for fact in _lines(tofu / f"{part}_perturbed.jsonl")[:FACTS_ASKED]]
    asked = [_asked(fact["question"], fact["answer"]) for fact in facts]
    said = answers(loaded(out / "reference", base), tokenizer, asked)
    known = [fact for fact, each, answer in zip(facts, asked, said, strict=True) if right(answer, each)]
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(fact) + "\n" for fact in known), encoding="utf-8")


def _asked(question: str, *words: str) -> Asked:
    return Asked((user(question),), words)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def loaded(folder: Path, base: str) -> nn.Module:
    """The model in `folder`, or `base` with the LoRA adapter in it merged."""
    if not is_adapter(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()


def judged(reference: nn.Module, adapter: Path, judge: Judge, scales: Sequence[float]) -> dict[str, Found]:
    """What is measured of the forget model at each scale."""
    model, found = PeftModel.from_pretrained(reference, str(adapter)).eval(), {}
    switch = ForgetSwitch(model)
    for scale in scales:
        with switch.at(scale):
            found[f"{scale:g}"] = judge(model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser("python -m recipes.real.taught", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="the chat model before it was taught: folder or hub id")
    parser.add_argument("--tofu", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=["default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=24)
    parser.add_argument("--scales", nargs="+", type=float, default=(1.0, 0.5))
    given = parser.parse_args()
    check_made_with(given.out, model=given.model, tofu=str(given.tofu), text=str(given.text))
    out, tokenizer = given.out, AutoTokenizer.from_pretrained(given.model)
    write_facts(given.tofu, out, given.model, tokenizer)
    judge = Judge(out, given.text, tokenizer)
    (out / "records").mkdir(exist_ok=True)
    for name in ("reference", "retrained"):
        keep(out, name, lambda name=name: {"points": {"0": judge(loaded(out / name, given.model))}})
    for name in given.runs:
        for seed in given.seeds:
            measure(given, name, seed, judge)
    write_table(out)
    print(f"{out}/taught.md")


def keep(out: Path, name: str, measure: Callable[[], Found]) -> None:
    """Write a record, unless there is one."""
    path = out / "records" / f"{name}.json"
    if not path.exists():
        write_json(path, measure())


def measure(given: argparse.Namespace, name: str, seed: int, judge: Judge) -> None:
    """Train, and measure what ships at the scales that the record does not have yet."""
    run = f"{name}-{given.epochs:g}-{seed}"
    path, work = given.out / "records" / f"{run}.json", given.out / "work" / run
    record = json.loads(path.read_text()) if path.exists() else {"points": {}}
    missing = [scale for scale in given.scales if f"{scale:g}" not in record["points"]]
    if not missing:
        return
    reference = given.out / "reference"
    trained = train(name, str(reference), given.out / "rows", work, given.epochs, seed, given.model)
    points = judged(loaded(reference, given.model), work / "forget-adapter", judge, missing)
    about = {name: trained[name] for name in KEPT if name in trained}
    write_json(path, about | {"points": record["points"] | points})


if __name__ == "__main__":
    main()
