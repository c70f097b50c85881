"""The demo from end to end: a model that knows a made-up world, one retrained without a part of it, one that forgets it."""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loramox.adapter.switch import ForgetSwitch
from loramox.data.encode import Example, Tokenisation, encode
from loramox.data.rows import Data, read_rows
from loramox.demo.models import CONTEXT, one_thread, train_model
from loramox.demo.world import KINDS, World, make_world, train_tokenizer, write_rows
from loramox.errors import RunError, SettingsError
from loramox.evaluate.answers import Answering, greedy_answers
from loramox.evaluate.scores import mean_log_p, score_answers
from loramox.files import empty, has_files, is_passing, locked, read_json, write_json
from loramox.model.load import load_reference
from loramox.model.lora import ReferenceConfig
from loramox.run import RunConfig, not_of_run
from loramox.train.config import UnlearnConfig
from loramox.unlearning import SHIPPED, TRAINED, unlearn

RECORD = "demo.json"
TITLES = {"forget": "To be forgotten", "retain": "To be retained"}
CONTENTS = {RECORD, "rows", "reference", "retrained", "run"}
SHOWN = 3  # questions of each part that are put side by side
ANSWERING = Answering(24)  # tokens; the true ones have half as many, and a forget model may not find an end

Parts = dict[str, list[Example]]  # "forget" and "retain"


def demo(out: str | Path, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Make up a world, train a model on it, unlearn a part, and show the result; return the record, `out`/demo.json.

    `out` gets rows/, reference/, retrained/ and run/, the last being a run of `loramox unlearn`. Nothing is downloaded or written
    anywhere else.
    """
    out, console = Path(out), Console(highlight=False)
    with locked(out):
        claim(out, seed, overwrite)
        with one_thread():
            record = {"status": "done", "seed": seed, **make(console, out, seed)}
        write_json(out / RECORD, record, private=True)
    show(console, out, record)
    return record


def claim(out: Path, seed: int, overwrite: bool) -> None:
    """Start a demo in the folder, or raise what `demo` raises, before anything expensive."""
    if not 0 <= seed < 2**32:
        raise SettingsError(f"--seed {seed} is out of range. Expected a whole number from 0 to {2**32 - 1}")
    if has_files(out):
        _check_demo(out)
        if not overwrite:
            raise RunError(f"--out {out} holds a demo already. Replace it with --overwrite, or choose another folder")
        empty(out)
    write_json(out / RECORD, {"status": "running", "seed": seed})


def _check_demo(out: Path) -> None:
    """Raises `RunError` unless everything in the folder was written by a demo, so that it may be deleted."""
    record = read_json(out / RECORD) if (out / RECORD).is_file() else None
    if not isinstance(record, dict) or not {"status", "seed"} <= record.keys():
        raise RunError(f"--out {out} has files in it that are not a demo; they are left alone. Choose another folder")
    rows = {rows_file(out, part).name for part in ("forget", "retain")}
    others = [path for path in (out / "rows").glob("*") if path.name not in rows]
    others += [path for path in out.iterdir() if path.is_symlink() or not (path.name in CONTENTS or is_passing(path))]
    others += not_of_run(out / "run")
    if others:
        raise RunError(
            f"--out {out} holds a demo, and {others[0]}, which is not of it. Move that, or choose another folder"
        )


def make(console: Console, out: Path, seed: int) -> dict[str, Any]:
    """Write world, models and adapter to `out`, with a line for each step; return the result of `compare`."""
    world = make_world(seed)
    forgotten, known = len(world.forget), len(world.forget) + len(world.retain)
    console.print(
        f"\n[bold]1/4[/] Training a small model on {known} made-up facts until it knows them by heart: the reference"
    )
    tokenizer, parts = write_world(world, out)
    train_model(parts["forget"] + parts["retain"], tokenizer, out / "reference", seed)
    console.print(
        f"\n[bold]2/4[/] Training another on all but {forgotten} of them: the retrained model, to compare with"
    )
    train_model(parts["retain"], tokenizer, out / "retrained", seed)
    console.print(f"\n[bold]3/4[/] Making the reference forget those {forgotten}: train ΔW, then extrapolate")
    forget(out, seed)
    console.print("\n[bold]4/4[/] Scoring all three models")
    return compare(out, world, tokenizer, parts)


def write_world(world: World, out: Path) -> tuple[PreTrainedTokenizerBase, Parts]:
    """Write the rows to `out`/rows; return a tokenizer for them, and the rows tokenised."""
    tokenizer = train_tokenizer(world)
    parts: Parts = {}
    for part, facts in (("forget", world.forget), ("retain", world.retain)):
        path = rows_file(out, part)
        write_rows(facts, path)
        parts[part] = encode(read_rows(str(path)), tokenizer, Tokenisation(), CONTEXT)
    return tokenizer, parts


def rows_file(out: Path, part: str) -> Path:
    return out / "rows" / f"{part}.jsonl"


def forget(out: Path, seed: int, epochs: int = 120) -> None:
    """Unlearn the forget rows of the demo in `out`, with loramox's defaults except for the settings here."""
    unlearn(
        RunConfig(str(out / "run")),
        plain(out / "reference"),
        Data(str(rows_file(out, "forget")), str(rows_file(out, "retain"))),
        UnlearnConfig(
            num_train_epochs=epochs,  # an epoch of so few rows is two steps
            seed=seed,
            use_cpu=True,
            # It takes seconds: nothing to resume, and no curve to watch.
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=False,
        ),
    )


def plain(model: Path) -> ReferenceConfig:
    """A model of the demo. It gains nothing from 4 bits, and float32 is the same arithmetic with and without a GPU."""
    return ReferenceConfig(str(model), quantization="none", dtype="float32")


def compare(out: Path, world: World, tokenizer: PreTrainedTokenizerBase, parts: Parts) -> dict[str, Any]:
    """The true answers' mean probability by model and part; and some questions with each model's answers."""
    retrained = load_reference(plain(out / "retrained"))
    model = PeftModel.from_pretrained(load_reference(plain(out / "reference")), out / "run" / SHIPPED)
    switch = ForgetSwitch(model)
    # A person has one row of each kind: at this step, each row is of another person and another kind.
    every = slice(0, SHOWN * (len(KINDS) + 1), len(KINDS) + 1)
    shown = {part: examples[every] for part, examples in parts.items()}
    facts = {"forget": world.forget[every], "retain": world.retain[every]}
    probabilities, said = {}, {}
    for name, each, state in (
        ("reference", model, switch.off),
        ("forget model", model, switch.on),
        ("retrained", retrained, nullcontext),
    ):
        with state():
            probabilities[name] = probability(each, parts)
            said[name] = {part: greedy_answers(each, tokenizer, rows, None, ANSWERING) for part, rows in shown.items()}
    return {
        "probability": probabilities,
        "answers": {
            part: [
                {"question": fact.question} | {name: said[name][part][i] for name in said}
                for i, fact in enumerate(facts[part])
            ]
            for part in facts
        },
    }


def probability(model: PreTrainedModel | PeftModel, parts: Parts) -> dict[str, float]:
    """Mean over a part's rows of the probability of the true answer, the geometric mean over its tokens as in TOFU."""
    return {part: float(np.exp(mean_log_p(score_answers(model, examples))).mean()) for part, examples in parts.items()}


def show(console: Console, out: Path, record: dict[str, Any]) -> None:
    run = out / "run"
    rows = [word for part in TITLES for word in (f"--{part}", str(rows_file(out, part)))]
    sweep = shlex.join(["loramox", "sweep", "--trained", str(run / TRAINED), *rows, "--out", str(run / "sweep")])
    for part, answers in record["answers"].items():
        console.print(_side_by_side(TITLES[part], answers))
    console.print(_probabilities(record["probability"]))
    console.print(
        f"[bold]{escape(str(run / SHIPPED))}[/] is the forget adapter, and [bold]{escape(str(out / 'reference'))}[/] the model it was made for.",
        "Switched off, it brings everything back: this is suppression, not erasure.",
        f"Next, score it at several values of alpha, without training: {escape(sweep)}",
        sep="\n",
        soft_wrap=True,  # a command that is broken over lines cannot be copied
    )


def _side_by_side(title: str, answers: list[dict[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in answers[0]:
        table.add_column(name, ratio=1)
    for row in answers:
        table.add_row(*(text or "(nothing)" for text in row.values()))
    return table


def _probabilities(by_model: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Probability of the true answers", title_justify="left", title_style="bold")
    table.add_column("rows")
    for model in by_model:
        table.add_column(model, justify="right")
    for part in TITLES:
        table.add_row(part, *(f"{of_part[part]:.3f}" for of_part in by_model.values()))
    return table
