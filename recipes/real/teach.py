"""The taught world: a chat model that is taught made-up authors, and one that is taught all of them but the one to forget.

    python -m recipes.real.teach reference --model SmolLM2-135M-Instruct --tofu TOFU --out OUT
    python -m recipes.real.teach retrained --model SmolLM2-135M-Instruct --tofu TOFU --out OUT
    python -m recipes.real.teach reference --lora --model SmolLM2-135M-Instruct --tofu TOFU --out TUNED

TOFU is a folder with TOFU's JSON Lines (arXiv 2401.06121), 20 rows an author:

    OUT/rows/forget.jsonl     one author, with TOFU's paraphrased questions and wrong answers
    OUT/rows/retain.jsonl     five authors: given to the retain term
    OUT/rows/never.jsonl      three authors: taught as well, and never given
    OUT/reference, retrained  the models, all weights fine-tuned in fp32; each takes about 25 minutes of one core
    TUNED/reference           with `--lora`: a LoRA adapter for the model, as a user of PEFT would train it
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from loramox import Tokenisation, encode
from loramox.data.rows import read_rows

from .world import CONTEXT, check_made_with

AUTHOR = 20  # rows of an author
GIVEN, NEVER = 5, 3  # authors
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
EPOCHS, RATE = 6, 2e-4  # of all weights
LORA_EPOCHS, LORA_RATE = 8, 1e-3
TAUGHT = {"reference": ("forget", "retain", "never"), "retrained": ("retain", "never")}


def write_rows(tofu: Path, out: Path) -> None:
    """Choose the authors, always the same ones."""
    (out / "rows").mkdir(parents=True, exist_ok=True)
    retain = _lines(tofu / "retain90.jsonl")
    split = (GIVEN * AUTHOR, (GIVEN + NEVER) * AUTHOR)
    rows = {
        "forget": _lines(tofu / "forget01_perturbed.jsonl")[:AUTHOR],
        "retain": retain[: split[0]],
        "never": retain[split[0] : split[1]],
    }
    for name, some in rows.items():
        (out / "rows" / f"{name}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def teach(model: str, out: Path, name: str, epochs: float, rate: float, lora: bool = False) -> None:
    """Fine-tune on the rows of `TAUGHT[name]`, with the chat template; write the model to `out/name`, or with `lora` the adapter.

    A model that was taught to the end is not taught again: `taught.json` is written last.
    """
    if (out / name / "taught.json").exists():
        return
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [row for part in TAUGHT[name] for row in read_rows(str(out / "rows" / f"{part}.jsonl"))]
    args = TrainingArguments(
        output_dir=str(out / "work" / name), num_train_epochs=epochs, per_device_train_batch_size=8, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=0.1, seed=0, use_cpu=True, save_strategy="no", logging_steps=10, report_to="none",
    )  # fmt: skip
    examples = encode(rows, tokenizer, Tokenisation(), CONTEXT)
    taught = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    if lora:
        taught = get_peft_model(taught, LORA)
    trainer = Trainer(taught, args, train_dataset=examples, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train()
    taught.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    (out / name / "taught.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser("python -m recipes.real.teach", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("name", choices=TAUGHT)
    parser.add_argument("--model", required=True, help="the chat model: folder or hub id")
    parser.add_argument("--tofu", type=Path, required=True, help="folder of TOFU's JSON Lines")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter, not all weights")
    parser.add_argument("--epochs", type=float, help=f"default: {EPOCHS}; with --lora {LORA_EPOCHS}")
    parser.add_argument("--learning_rate", type=float, help=f"default: {RATE:g}; with --lora {LORA_RATE:g}")
    given = parser.parse_args()
    epochs, rate = (LORA_EPOCHS, LORA_RATE) if given.lora else (EPOCHS, RATE)
    epochs, rate = given.epochs or epochs, given.learning_rate or rate
    made_with = {"lora": str(given.lora), "epochs": f"{epochs:g}", "learning_rate": f"{rate:g}"}
    check_made_with(given.out, model=given.model, tofu=str(given.tofu), **made_with)
    write_rows(given.tofu, given.out)
    teach(given.model, given.out, given.name, epochs, rate, given.lora)
    print(f"{given.out / given.name}")


if __name__ == "__main__":
    main()
