"""Table 2, MUSE-News at tiny scale: what unlearning does to small models of some of its rows, as in bench/muse.py."""

import argparse
import itertools
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import AutoTokenizer

from loramox import Columns, Tokenisation
from loramox.evaluate.evaluate import questions_of
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.suites import read_part, suite_sources
from loramox.evaluate.summary import summarise
from loramox.files import sha256_of
from loramox.model.config import ModelConfig, read_config
from loramox.model.load import load_reference

from .bench import Bench, asked_quietly
from .methods import DEFAULT, KL5, PAPER, Scale, Settings
from .runs import Read, Record, Run, Runs
from .show import Shown, Table, cell, found, markdown, mean, number, verdict
from .world import Split, World, lines, once

METHODS: dict[str, tuple[str, Settings]] = {
    "loramox": DEFAULT,
    "MOX, paper's setting": PAPER,
    "task vector": ("task_vector", {"strength": 4.0}),
    "GA": ("ga", {}),
    "GradDiff": ("graddiff", {}),
    "NPO": ("npo", KL5),
}
ROWS = {"batch": 4, "retain_per_forget": 1}  # blocks of articles
SHARES = (1.0, 2.0)  # of the strength as shipped
BLOCK = 512  # tokens; MUSE has 2048
SHOWN = {
    "verbmem_rouge_l": "VerbMem ↓",
    "knowmem_forget_rouge_l": "KnowMem, forget ↓",
    "knowmem_retain_rouge_l": "KnowMem, retain ↑",
    "priv_leak": "PrivLeak, 0",
}
PAPER_SAYS = (
    "The paper: MOX takes VerbMem from 58.4 to 0.2 and KnowMem of forget rows from 63.9 to 0.8 and keeps KnowMem of retain rows "
    "(54.8 of 55.2); the task vector forgets next to nothing (57.2, 66.2). "
)
SIZES = {
    60: {"continuations": 8, "questions": 40, "texts": 16},
    3: {"continuations": 2, "questions": 8, "texts": 4},
}  # by epochs of the models


class MuseWorld(World):
    """A world of MUSE's rows: `reference` has learnt what it is to forget, `retrained` has not."""

    def __init__(self, muse: Path, tokenizer: Path, work: Path, epochs: int) -> None:
        from recipes.bench.muse import some_rows, trained

        folder = work / f"muse-{epochs}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            self.files = some_rows(argparse.Namespace(muse=muse, **SIZES[epochs]), folder / "rows")
            self.data = {file.name: sha256_of(file) for file in sorted((folder / "rows").glob("*/*.json"))}
            for name in ("retrained", "reference"):
                if not (folder / name / "tokenizer.json").exists():
                    trained(
                        self.files, AutoTokenizer.from_pretrained(tokenizer), name == "reference", epochs, folder / name
                    )
        super().__init__(folder, folder)

    def split(self, name: str, asked: int) -> Split:
        """What the reference alone has learnt, to be forgotten, and what both have."""
        files, folder = self.files, self.work / "muse"

        def said(file: str) -> list[dict[str, Any]]:
            return [{"text": f"Question: {r['question']}\nAnswer: {r['answer']}"} for r in files[file][::2]]

        forget = [{"text": text} for text in files["privleak/forget"][::4]] + said("knowmem/forget_qa")
        forget += [{"text": f"{r['prompt']} {r['gt']}"} for r in files["verbmem/forget"][::2]]
        retain = [{"text": text} for text in files["privleak/retain2"][::4]] + said("knowmem/retain2_qa")
        return Split(once(folder / "forget.jsonl", lines(forget)), once(folder / "retain.jsonl", lines(retain)), {})


class Muse(Bench):
    """Trains and asks on such a world."""

    tokenisation = Tokenisation(max_length=BLOCK)

    def __init__(self, world: MuseWorld, runs: Runs) -> None:
        super().__init__(world, runs)
        self.rows = world.path / "rows"

    def questions(self, run: Run, parts: Any = None) -> Questions:
        key = ("muse",)
        if key not in self._questions:
            sources = suite_sources("muse", "", str(self.rows))
            rows = {part: read_part("muse", part, source, Columns()) for part, source in sources.items()}
            reference = self.reference(run)
            self._questions[key] = questions_of(
                rows, reference, read_config(reference), Tokenisation(), ScoringConfig(), "muse"
            )
        return self._questions[key]

    def compute(self, run: Run) -> Record:
        """One line of the table: the metrics of one model, beside the retrained one's records."""
        data: dict[str, Any] = {"data": self.world.data}
        if run.method in ("reference", "retrained"):
            model = load_reference(ModelConfig(str(self.world.path / run.method), quantization="none"))
            records = asked_quietly(self.questions(run), model)
            parts = ("part", "mia_min_k", "mia_loss")
            data["records"] = [{k: r[k] for k in parts} for r in records if r["part"] in ("forget", "holdout")]
            gold = [] if run.method == "retrained" else self._gold(run)
        else:
            gold = self._gold(run)
            trained = self.train(run)
            points = {}
            for share in SHARES:
                with trained.at(share * trained.strength) as model:
                    points[f"{share:g}"] = _shown(asked_quietly(self.questions(run), model), gold)
            return data | {"points": points}
        return data | {"points": {"1": _shown(records, gold)}}

    def _gold(self, run: Run) -> list[dict[str, Any]]:
        retrained = Run.of("muse", "retrained", {k: v for k, v in run.settings if k == "models"})
        records = self.runs.result(retrained, self.compute)["records"]
        return [record | {"plain_text": False} for record in records]


def _shown(records: list[dict[str, Any]], gold: list[dict[str, Any]]) -> dict[str, float]:
    metrics = summarise(records, gold).metrics
    return {name: metrics[name].value for name in SHOWN if name in metrics}


def plan(scale: Scale, read: Read) -> list[Run]:
    models = {"models": models_epochs(scale)}
    plain = [Run.of("muse", name, models) for name in ("retrained", "reference")]
    return [*plain, *(run for of in list(METHODS.values())[: scale.methods] for run in _runs(scale, of))]


def models_epochs(scale: Scale) -> int:
    """Epochs that the two models are trained for."""
    return 60 if scale.grid > 1 else 3


def _runs(scale: Scale, of: tuple[str, Settings]) -> list[Run]:
    more = {"models": models_epochs(scale)} | ROWS
    runs = [scale.run("muse", of, seed, **more) for seed in scale.seeds]
    return [
        Run.of(
            "muse",
            run.method,
            {k: v for k, v in run.settings if k not in ("split", "asked", "refine", "retrain")},
            run.seed,
        )
        for run in runs
    ]


def show(scale: Scale, read: Read) -> Shown:
    rows, data = [], {}
    for name in ("reference", "retrained"):
        record = read(Run.of("muse", name, {"models": models_epochs(scale)}))
        if record:
            data[name] = record["points"]["1"]
            rows.append([name, "", *(number(data[name].get(metric)) for metric in SHOWN)])
    for (label, of), share in itertools.product(METHODS.items(), SHARES):
        points = [record["points"][f"{share:g}"] for record in found(read, _runs(scale, of))]
        name = label if share == 1 else f"{label}, × {share:g}"
        if points:
            data[name] = {metric: mean([p.get(metric) for p in points]) for metric in SHOWN}
            rows.append([label, f"× {share:g}", *(cell([p.get(metric) for p in points]) for metric in SHOWN)])
        elif share == 1:
            rows.append([label, "", "not run, or diverged", *[""] * (len(SHOWN) - 1)])
    return Shown(_claim(data), data, markdown(["", "strength", *SHOWN.values()], rows))


def _claim(data: dict[str, Any]) -> str:
    if not {"reference", "loramox", "MOX, paper's setting", "task vector"} <= data.keys():
        return PAPER_SAYS + "Not all of it has been run"
    parts = []
    for label in filter(data.get, ("MOX, paper's setting", "loramox", "loramox, × 2", "task vector")):
        share = {m: data[label][m] / max(data["reference"][m], 1e-9) for m in SHOWN if m != "priv_leak"}
        verb, forget, retain = share.values()
        how = f"{label} leaves {verb:.0%} of VerbMem, {forget:.0%} of KnowMem of forget rows, {retain:.0%} of that of retain rows"
        forgets = max(verb, forget) < 0.1
        parts.append(verdict(min(verb, forget) > 0.9 if label == "task vector" else forgets and retain > 0.9, how))
    return PAPER_SAYS + " ".join(parts)


TITLE = "Table 2: MUSE-News at tiny scale; 4 forget and 4 retain blocks of 512 tokens a step; asked as shipped and at twice the strength"
TABLE2 = {"table2": Table(TITLE, plan, show)}
