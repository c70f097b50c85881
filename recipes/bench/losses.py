"""The losses of five methods beside OpenUnlearning's own code, on the same model and rows: the largest differences.

    python -m recipes.bench.losses --openunlearning DIR [--batches 5]

DIR is a checkout of github.com/locuslab/open-unlearning; its imports need omegaconf and scikit-learn. Both sides get a random
Llama in float64 with a random adapter, and batches of rows padded to one length; OpenUnlearning's reference is a second model
without the adapter. Cross-entropy is averaged over tokens there and over rows here, so the answers of a batch have one length; a
last line says what other lengths change. Its KL also counts padding and prompts, so both sides take CE on retain rows.
"""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loramox import ReferenceConfig, UnlearnConfig, UnlearnTrainer, add_lora
from loramox.data.pairs import Collator
from loramox.model.lora import lora_layers

from .open_unlearning import trainers
from .shapes import no_words

VOCABULARY, ROWS = 97, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "ga": {},
    "graddiff": {"retain_weight": 0.7},
    "npo": {"beta": 0.1},
    "simnpo": {"beta": 4.5, "margin": 0.9, "forget_weight": 0.125},
    "dpo": {"beta": 0.1, "refusals": "taken from the batch"},
}


def random_rows(generator: torch.Generator, answer: int | None) -> list[dict[str, Any]]:
    """Rows of 3 to 9 prompt tokens and `answer` answer tokens (None: 2 to 12)."""
    rows = []
    for _ in range(ROWS):
        prompt, length = (int(torch.randint(*span, (), generator=generator)) for span in ((3, 10), (2, 13)))
        length = answer or length
        ids = torch.randint(1, VOCABULARY, (prompt + length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "row": "random"})
    return rows


def setting(folder: str) -> tuple[nn.Module, nn.Module, PreTrainedTokenizerFast]:
    """(model with an adapter, the same without one, a tokenizer of which only the padding is used)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    reference = LlamaForCausalLM(config).double().requires_grad_(False)
    reference.save_pretrained(folder)
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
    model = add_lora(base, ReferenceConfig(folder, quantization="none", r=4)).double()
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model.eval(), reference.eval(), no_words()


def our_loss(trainer: UnlearnTrainer, batch: dict[str, Any]) -> float:
    parts = batch if trainer.args.holds_retain else {part: rows for part, rows in batch.items() if part != "retain"}
    if trainer.args.method != "dpo":
        parts = {part: rows for part, rows in parts.items() if part != "wanted"}
    return sum(trainer.compute_loss(trainer.model, some).item() for _, some in trainer._microbatches(parts))


def their_loss(kind: type, args: UnlearnConfig, model: nn.Module, reference: nn.Module, batch: dict[str, Any]) -> float:
    rows = {part: {k: v for k, v in of.items() if k != "rows"} for part, of in batch.items()}
    forget = {"original": rows["forget"], "alternate": rows["wanted"]} if args.method == "dpo" else rows["forget"]
    itself = SimpleNamespace(
        beta=args.beta, gamma=args.forget_weight, alpha=args.retain_weight, ref_model=reference, retain_loss_type="NLL",
        delta=args.margin / args.beta if args.margin else 0.0, model=model,
    )  # fmt: skip
    if hasattr(kind, "compute_retain_loss"):
        itself.compute_retain_loss = lambda **given: kind.compute_retain_loss(itself, **given)
    return kind.compute_loss(itself, model, {"forget": forget, "retain": rows["retain"]}).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openunlearning", type=Path, required=True, metavar="DIR")
    parser.add_argument("--batches", type=int, default=5)
    given = parser.parse_args()
    kinds, generator, collate = trainers(given.openunlearning), torch.Generator().manual_seed(0), Collator(0)
    print(
        f"| method | largest relative difference in {given.batches} batches of {ROWS} rows | the same with answers of other lengths |"
    )
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model, reference, tokenizer = setting(folder)
        for method, settings in SETTINGS.items():
            args = UnlearnConfig(folder, method=method, use_cpu=True, report_to="none", **settings)
            some = random_rows(generator, 5)
            trainer = UnlearnTrainer(model, args, some, some, tokenizer)
            worst = []
            for length in (5, None):
                differences = []
                for _ in range(given.batches):
                    batch = {part: collate(random_rows(generator, length)) for part in ("forget", "wanted", "retain")}
                    ours, other = (
                        our_loss(trainer, batch),
                        their_loss(kinds[method], args, model, reference, batch),
                    )
                    differences.append(abs(ours - other) / abs(other))
                worst.append(max(differences))
            print(f"| {method} | {worst[0]:.1e} | {worst[1]:.1e} |")


if __name__ == "__main__":
    main()
