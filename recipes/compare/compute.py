"""One run: train with loramox's own code, score what ships at several scales, and attack it by relearning."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from loramox import (
    Columns,
    Data,
    ReferenceConfig,
    Tokenisation,
    UnlearnConfig,
    UnlearnTrainer,
    add_lora,
    encode,
    load_reference,
)
from loramox.adapter.export import forget_change
from loramox.adapter.factors import read_factors
from loramox.adapter.folder import PROVENANCE, at_rank, served_rank
from loramox.adapter.provenance import read_provenance
from loramox.data.encode import Example
from loramox.data.row import Row
from loramox.evaluate.attacks import relearn
from loramox.evaluate.scores import AnswerScores, mean_log_p, score_answers
from loramox.evaluate.truth_ratio import truth_ratio
from loramox.model.algebra import Factors
from loramox.model.config import context_of, read_config, read_tokenizer
from loramox.model.lora import at_scale, with_factors
from loramox.train.prepare import prepare, with_generated

from .methods import R, Size
from .runs import Record, Run
from .world import Split, World

BATCH = 50  # answers scored at a time
RELEARN_RATE, RELEARN_BATCH = 1e-3, 8
QUIET: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "report_to": "none",
                         "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "auto_retain": 0}  # fmt: skip


def compute(run: Run, world: World, work: Path, size: Size) -> Record:
    """Train where needed, score and attack.

    Returns:
        `points`: for each scale the raw values of every row (`Scorer`); `relearn`: step → the other rows' probabilities, from
        scale 1; `relearn_below`, where the reference writes rows: scale → the same from that scale.
    """
    split = world.split(run.split)
    is_trained = run.method not in ("reference", "retrained")
    reference = ReferenceConfig(
        str(world.path / ("reference" if is_trained else run.method)), quantization="none", dtype="float32", r=R,
        lora_alpha=dict(run.settings).get("lora_alpha"),
    )  # fmt: skip
    shipped = train(run, reference, split, work) if is_trained else None
    tokenizer = read_tokenizer(reference)
    model = add_lora(load_reference(reference, "cpu"), reference).eval()
    scorer = Scorer(split.scored, tokenizer, context_of(read_config(reference)))
    # A model without an adapter is θ_ref + 0·ΔW; a scale of 1 or 0 says on which side of the comparison it is.
    wide = size.wide if run.split == "overlap" else ()
    scales = (*wide, *size.scales) if is_trained else (float(run.method == "retrained"),)
    found: Record = {"points": []}
    for scale in scales:
        with shipped_at(model, shipped, scale):
            found["points"].append({"scale": scale} | scorer(model))
    if run.split == "whole" and run.method != "reference":
        below = size.below if "auto_retain" in dict(run.settings) else ()
        curves = {}
        for scale in (1.0, *below):
            with shipped_at(model, shipped, scale):
                curves[scale] = relearned(model, scorer, size, run.seed)
        found["relearn"] = curves.pop(1.0)
        found |= {"relearn_below": {f"{scale:g}": curve for scale, curve in curves.items()}} if curves else {}
    return found


def train(run: Run, reference: ReferenceConfig, split: Split, work: Path) -> dict[str, Factors]:
    """Train, unless the adapter is in `work` already; return what ships: the average of ΔW, scaled and truncated as shipped."""
    folder = work / "trained"
    if not (folder / PROVENANCE).exists():
        settings = {name: value for name, value in run.settings if name not in ("r", "lora_alpha")}
        args = UnlearnConfig(method=run.method, seed=run.seed, output_dir=str(folder), **(QUIET | settings))
        data = Data(str(work / "forget.jsonl"), str(work / "given.jsonl"))
        for path, lines in ((data.forget, split.forget), (data.retain, split.given)):
            Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        prepared = prepare(reference, data, args, Columns(), Tokenisation())
        set_seed(args.seed)
        model = add_lora(load_reference(reference, args.device), reference)
        prepared = with_generated(prepared, work, model, args)
        trainer = UnlearnTrainer(
            model, args, **prepared.datasets, processing_class=prepared.tokenizer, plan=prepared.plan
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
    delta, _ = at_rank(read_factors(folder / "momentum")[0], served_rank(R))
    return forget_change(delta, read_provenance(folder, "trained")["alpha"])


@contextmanager
def shipped_at(model: PeftModel, shipped: dict[str, Factors] | None, scale: float) -> Iterator[None]:
    """Within it the model is the forget model at a scale of what ships, or the model itself where nothing ships."""
    if shipped is None:
        yield
        return
    with with_factors(model, shipped), at_scale(model, scale):
        yield


class Scorer:
    """Scores the rows of a split under a model.

    Called with a model it returns one value a row, in the order of the rows: of forget rows `log_p` (mean log-probability of
    the answer per token, nats), `right` (share of its tokens that are the model's first choice, without the end of sequence)
    and, where rows have wrong answers, `truth_ratio`; of every other part the probability of the answer per token.
    """

    def __init__(self, rows: dict[str, list[Row]], tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self.tokenizer = tokenizer

        def tokens(some: list[Row]) -> list[Example]:
            return encode(some, tokenizer, Tokenisation(), context)

        self.forget = tokens(rows["forget"])
        self.variants = [
            tokens([replace(row, answer=answer) for answer in (row.paraphrase, *row.wrong_answers)])
            for row in rows["forget"] if row.paraphrase and row.wrong_answers
        ]  # fmt: skip
        self.others = {part: tokens(some) for part, some in rows.items() if part != "forget"}

    def __call__(self, model: PeftModel) -> dict[str, list[float]]:
        variants = [example for of_row in self.variants for example in of_row]
        brief = [*variants, *(example for some in self.others.values() for example in some)]
        scores = iter(self.score(model, [*self.forget, *brief], len(brief)))
        forget = [next(scores) for _ in self.forget]
        found = {"log_p": mean_log_p(forget), "right": np.array([self._right(each) for each in forget])}
        means = [mean_log_p([next(scores) for _ in of_row]) for of_row in self.variants]
        if means:
            found["truth_ratio"] = np.array([truth_ratio(each[:1], each[None, 1:])[0] for each in means])
        found |= {part: np.exp(mean_log_p([next(scores) for _ in some])) for part, some in self.others.items()}
        return {name: [float(f"{value:.5g}") for value in values] for name, values in found.items()}

    def score(self, model: PeftModel, examples: list[Example], log_p_only: int) -> list[AnswerScores]:
        return score_answers(model, examples, self.tokenizer.pad_token_id or 0, BATCH, log_p_only=log_p_only)

    def _right(self, scores: AnswerScores) -> float:
        end = len(scores.targets) - int(scores.targets[-1] == self.tokenizer.eos_token_id)
        return float((scores.first_choice == scores.targets)[:end].mean())


def relearned(model: PeftModel, scorer: Scorer, size: Size, seed: int) -> dict[str, list[float]]:
    """Train a fresh LoRA on some forget rows; the probability of each of the others before and after some steps."""
    rows = range(len(scorer.forget))
    chosen = set(random.Random(seed).sample(rows, max(1, round(size.share * len(rows)))))
    known, others = ([scorer.forget[i] for i in rows if (i in chosen) == attackers] for attackers in (True, False))

    def probabilities() -> list[float]:
        return [float(f"{p:.5g}") for p in np.exp(mean_log_p(scorer.score(model, others, len(others))))]

    curve = {"0": probabilities()}
    pad = scorer.tokenizer.pad_token_id or 0
    with relearn.attacker(model, R, seed):
        for step in relearn.train(model, known, size.relearn, RELEARN_RATE, RELEARN_BATCH, pad, seed):
            curve[str(step)] = probabilities()
    return curve
