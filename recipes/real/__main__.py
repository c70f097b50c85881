"""Make a pretrained chat model forget what it knows about a country, and ask it about that and everything else.

    python -m recipes.real --model SmolLM2-135M-Instruct --out OUT [--runs default guess …] [--seeds 0 1] [--epochs 24]

The model is a folder or a hub id. Rows to forget are questions on France that it answers right, with its own answers; retain rows
are those that `--retain auto` writes. Judged by greedy answers: to the forget questions and to paraphrases of them, to neighbours
(other countries), far things, questions after one that was refused, and everyday instructions. None of these is trained on.

Writes OUT/rows, OUT/records, OUT/natural.md and natural.png. What has a record is not computed again, so the command can be
stopped and started again. A run of `default` takes about 20 minutes of one core.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from transformers import AutoModelForCausalLM, AutoTokenizer

from loramox import Tokenisation
from loramox.data.rows import read_rows
from loramox.files import write_json
from loramox.train.inputs import REFUSALS, read_refusals
from loramox.train.synthetic import ROWS
from loramox.train.writer import Writer

from .judge import SCALES, ask, judged
from .picture import draw
from .runs import KEPT, RUNS, train
from .tables import write_table
from .world import CONTEXT, check_made_with, forget_rows, parts


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="the chat model: folder or hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=24)
    parser.add_argument("--rows", type=int, default=ROWS, help="retain rows that the reference writes")
    parser.add_argument("--scales", nargs="+", type=float, default=SCALES)
    given = parser.parse_args(words)
    check_made_with(given.out, model=given.model, rows=given.rows)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    for folder in ("rows", "records", "work"):
        (given.out / folder).mkdir(parents=True, exist_ok=True)
    asked = prepared(given, tokenizer)
    for name in given.runs:
        for seed in given.seeds:
            compute(given, name, seed, tokenizer, asked)
            show(given.out, asked)
    show(given.out, asked)


def show(out: Path, asked: Any) -> None:
    """Make the table and the picture of what is recorded so far."""
    write_table(out, asked)
    draw(out, asked)
    print(f"{out}/natural.md, natural.png")


def prepared(given: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Rows to forget, retain rows and the reference's answers, each made once; what is asked is returned."""
    forget, retain = given.out / "rows" / "forget.jsonl", given.out / "rows" / "retain.jsonl"
    record = given.out / "records" / "reference.json"
    made = all(path.exists() for path in (forget, retain, record))
    model = None if made else AutoModelForCausalLM.from_pretrained(given.model, dtype="float32").eval()
    asked = parts(forget_rows(model, tokenizer, forget))
    if not retain.exists():
        writer = Writer(model, tokenizer, read_rows(str(forget)), Tokenisation(), CONTEXT)
        rows = writer.retain_rows(given.rows, 0, show=True, refusals=read_refusals(str(REFUSALS)))
        retain.write_text("".join(json.dumps({"question": row.prompt, "answer": row.answer}) + "\n" for row in rows))
    if not record.exists():
        write_json(record, {"answers": {"1.0": ask(model, tokenizer, asked)}})
    return asked


def compute(given: argparse.Namespace, name: str, seed: int, tokenizer: Any, asked: Any) -> None:
    """Train, and judge what ships at the scales that the record does not have yet."""
    run = f"{name}-{given.epochs:g}-{seed}"
    path, work = given.out / "records" / f"{run}.json", given.out / "work" / run
    record = json.loads(path.read_text()) if path.exists() else {"answers": {}}
    missing = [scale for scale in given.scales if str(scale) not in record["answers"]]
    if not missing:
        return
    if not (work / "forget-adapter").is_dir():  # the record is of a training whose adapter is gone
        record, missing = {"answers": {}}, given.scales
    made = train(name, given.model, given.out / "rows", work, given.epochs, seed)
    said = judged(given.model, work / "forget-adapter", tokenizer, asked, missing)
    about = {name: made[name] for name in KEPT if name in made}
    write_json(path, about | {"answers": record["answers"] | said})


if __name__ == "__main__":
    main()
