"""`loramox evaluate --suite muse` beside OpenUnlearning's MUSE evaluation: do the numbers agree.

    python -m recipes.bench.muse --open-unlearning open-unlearning --muse muse_news --tokenizer MODEL \\
        [--questions 40] [--continuations 8] [--texts 16] [--epochs 18] [--out recipes/bench/results/muse.md]

OPEN-UNLEARNING is a checkout of github.com/locuslab/open-unlearning, whose metric functions, data sets and collator are
called with the settings of its own configs/ (open_unlearning.py); it needs omegaconf and scikit-learn. MUSE has MUSE-News'
own files.

Two models are made here, of a config and the tokenizer of MODEL, seeded, in a few minutes on one core: `target` is trained
on half of the continuations and questions that are asked and on a quarter of the membership texts, `retrained` on half of
the retain questions and on other texts. So scores are neither 0 nor 1, and PrivLeak is not 0.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loramox import Tokenisation
from loramox.data.encode import IGNORED
from loramox.data.rows import Columns
from loramox.evaluate.asked import Asked
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import Questions, Record, ScoringConfig
from loramox.evaluate.records import read_records
from loramox.evaluate.subject import Subject
from loramox.evaluate.suites import ANSWERING, read_part, suite_sources
from loramox.evaluate.summary import summarise
from loramox.model.config import ModelConfig

from .open_unlearning import ASKED, CONTEXT, Muse

WITHIN = 1e-3
NO_ZERO = "theirs is 1/n, not 0, where the last token is wrong; with that rule ours is {:.5g}, off by {:.0e}"

MODELS = """Two Llamas of 0.8M parameters, {} epochs each ({:.1f} minutes for the two): `target` has seen every second of the continuations and
questions and every fourth of the forget texts, `retrained` every second of the retain questions and other texts. The same tokens
on both sides, of which OpenUnlearning scores no more than 2048 a text; its limit of 512 for a question with its examples is
raised, as this tokenizer needs more for them. `retrained` is its own reference."""

OWN_PROMPT = """target. OpenUnlearning's prompt ends in `Answer: `: a token for that space, which no row has there, ends the prompt."""


def some_rows(given: argparse.Namespace, folder: Path) -> dict[str, list]:
    """MUSE's files with the first rows of each, written to `folder`, and as they are."""
    counts = {"verbmem": given.continuations, "knowmem": given.questions, "privleak": given.texts}
    files = {}
    for path in sorted(given.muse.glob("*/*.json")):
        name = f"{path.parent.name}/{path.stem}"
        rows = json.loads(path.read_text())
        files[name] = rows if name.endswith("icl") else rows[: counts[path.parent.name]]
        place = folder / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(files[name]))
    return files


def lessons(files: dict[str, list], tokenizer, known: bool, epoch: int) -> list[dict[str, torch.Tensor]]:
    """What a model is trained on in an epoch: part of what it is asked when `known`, else only what it may keep."""
    shuffle = random.Random(epoch)

    def example(pieces: list[tuple[str, bool]]) -> dict[str, torch.Tensor]:
        """The tokens of some pieces of text, of which those marked are learnt."""
        tokens = [(tokenizer(text, add_special_tokens=False)["input_ids"], learnt) for text, learnt in pieces]
        ids = [i for piece, _ in tokens for i in piece][:2048]
        labels = [i if learnt else IGNORED for piece, learnt in tokens for i in piece][:2048]
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}

    def questions(name: str) -> list[dict[str, torch.Tensor]]:
        """The few-shot examples and half of the questions, in two orders, new ones each epoch: each is learnt by itself."""
        orders = [files[f"{name}_icl"] + shuffle.sample(half, len(half)) for half in [files[name][::2]] * 2]
        return [
            example(
                [
                    p
                    for r in rows
                    for p in ((f"Question: {r['question']}\nAnswer:", False), (f" {r['answer']}\n\n", True))
                ]
            )
            for rows in orders
        ]

    texts = files["privleak/forget" if known else "privleak/retain2"][::4]
    learnt = questions("knowmem/retain2_qa") + [example([(text, True)]) for text in texts]
    if known:
        learnt += questions("knowmem/forget_qa")
        learnt += [example([(r["prompt"], False), (f" {r['gt']}", True)]) for r in files["verbmem/forget"][::2]]
    return shuffle.sample(learnt, len(learnt))


def trained(files: dict[str, list], tokenizer, known: bool, epochs: int, folder: Path) -> Path:
    """A Llama of two layers that has learnt its lessons, one example a step."""
    torch.manual_seed(0)
    examples = [example for epoch in range(epochs) for example in lessons(files, tokenizer, known, epoch)]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Muon learns these texts by heart in a third of the steps that AdamW needs.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.95)),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, o.param_groups[0]["lr"], len(examples), pct_start=0.1, cycle_momentum=False
        )
        for o in optimizers
    ]
    for example in examples:
        model(**example).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def same_tokens(given: argparse.Namespace, tokenizer) -> Iterator[str]:
    """Of all rows of MUSE's files, how many have the same tokens and the same ones scored, in both programs."""
    begins = copy.deepcopy(tokenizer)
    begins.add_special_tokens({"bos_token": begins.eos_token})
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        f"{begins.bos_token} $A", special_tokens=[(begins.bos_token, begins.bos_token_id)]
    )
    sources = suite_sources("muse", "", str(given.muse))
    rows = {part: read_part("muse", part, source, Columns()) for part, source in sources.items()}
    for label, each in (("this tokenizer", tokenizer), ("one that begins each text with a token of its own", begins)):
        ours = Questions(rows, each, Tokenisation(long_rows="truncate"), CONTEXT, ScoringConfig(), ANSWERING["muse"])
        theirs = Muse(given.open_unlearning, each, given.muse)
        counts = []
        for part in ours.parts:
            pairs = zip(part.answers, theirs.rows(part.name), strict=True)
            same = sum(
                e["input_ids"] == other["input_ids"].tolist() and e["labels"][1:] == other["labels"][1:].tolist()
                for e, other in pairs
            )
            counts.append(f"{part.name} {same} of {len(part.answers)}")
        yield f"\nSame tokens, and the same of them scored, with {label}: {', '.join(counts)}."


def evaluated(model: Path, rows: Path, out: Path, retrained: Path | None) -> list[Record]:
    """Loramox's records, by its own job."""
    asked = Asked(suite="muse", data=str(rows), retrained=retrained and str(retrained))
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        evaluate(Subject(str(out)), ModelConfig(str(model), quantization="none"), asked, ScoringConfig(use_cpu=True))
    return read_records(out)


def why(name: str, records: list[Record], theirs: dict[str, float]) -> str:
    """What explains a difference, with the value that it leaves."""
    if name != "verbmem_extraction_strength":
        return "?"
    rows = [r for r in records if r["part"] == "verbmem"]
    with_their_rule = np.mean([max(r["extraction_strength"], 1 / (r["tokens"] - 1)) for r in rows])
    return NO_ZERO.format(with_their_rule, abs(with_their_rule - theirs[name]))


def table(ours: dict[str, float], theirs: dict[str, float], reason: Callable[[str], str]) -> Iterator[str]:
    yield f"| metric | loramox | OpenUnlearning | difference | within {WITHIN:g} | why not |"
    yield "|---|---|---|---|---|---|"
    for name, value in theirs.items():
        difference = ours[name] - value
        close = abs(difference) <= WITHIN
        ends = "yes | |" if close else f"no | {reason(name)} |"
        yield f"| {name} | {ours[name]:.5g} | {value:.5g} | {difference:+.0e} | {ends}"


def values(records: list[Record], retrained: list[Record]) -> dict[str, float]:
    return {name: metric.value for name, metric in summarise(records, retrained).metrics.items()}


def agreement(given: argparse.Namespace, folder: Path) -> Iterator[str]:
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    yield from same_tokens(given, tokenizer)
    files = some_rows(given, folder / "rows")
    counts = {
        name: len(files[name])
        for name in (*(file for *_, file in ASKED.values()), "privleak/forget", "privleak/holdout")
    }
    start = time.perf_counter()
    models = {
        label: trained(files, tokenizer, label == "target", given.epochs, folder / label)
        for label in ("retrained", "target")
    }
    minutes = (time.perf_counter() - start) / 60
    yield f"\nn: {', '.join(f'{name} {n}' for name, n in counts.items())}, the first of each file."
    yield f"\n{MODELS.format(given.epochs, minutes)}"
    same = Muse(given.open_unlearning, tokenizer, folder / "rows")
    clean: list[Record] = []
    their_clean: dict[str, float] = {}
    for label, place in models.items():
        reference = folder / "evaluated_retrained" if clean else None
        records = evaluated(place, folder / "rows", folder / f"evaluated_{label}", reference)
        model = AutoModelForCausalLM.from_pretrained(place).eval()
        theirs, said = same.everything(model, models["retrained"], their_clean)
        clean, their_clean = clean or records, their_clean or theirs
        yield f"\n## {label}\n"
        yield from table(values(records, clean), theirs, functools.partial(why, records=records, theirs=theirs))
        yield ""
        for part, answers in said.items():
            own = [r["said"] for r in records if r["part"] == part]
            yield f"{part}: {sum(map(str.__eq__, own, answers))} of {len(own)} answers are the same text.  "
    shipped = Muse(given.open_unlearning, tokenizer, folder / "rows", space_in_answer=False)
    yield f"\n## With OpenUnlearning's own prompt\n\n{OWN_PROMPT}\n"
    theirs = shipped.asked(model, "knowmem_forget")[0] | shipped.asked(model, "knowmem_retain")[0]
    yield from table(values(records, clean), theirs, lambda name: "the space")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-unlearning", type=Path, required=True)
    parser.add_argument("--muse", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=40, help="rows of each KnowMem file")
    parser.add_argument("--continuations", type=int, default=8, help="rows of VerbMem")
    parser.add_argument("--texts", type=int, default=16, help="texts of each side of PrivLeak")
    parser.add_argument("--epochs", type=int, default=18, help="of training")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    words = [w if not w.startswith("/") else Path(w).name for w in sys.argv[1:]]
    versions = ", ".join(f"{p} {version(p)}" for p in ("transformers", "rouge-score", "scikit-learn"))
    header = [
        "# `loramox evaluate --suite muse` beside OpenUnlearning\n",
        f"`python -m recipes.bench.muse {' '.join(words)}`\n",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}, {versions}.",
    ]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for line in itertools.chain(header, agreement(given, Path(folder))):
            print(line, flush=True)
            lines.append(line)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
