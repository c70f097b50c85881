"""Probability of the forget answers, and of their second halves, at shares of what ships: what `--forget_to` looks at.

    python -m recipes.real.shares --model SmolLM2-135M-Instruct --out OUT --runs default guess --seeds 0 1

Reads the adapters that `recipes.real` or `recipes.real.taught` left in OUT/work; writes OUT/shares.md. A model in
OUT/retrained is the control.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramox import ForgetSwitch, Tokenisation, encode
from loramox.data.rows import read_rows
from loramox.evaluate.row_metrics import late_probability
from loramox.evaluate.scores import mean_log_p, score_answers
from loramox.train.target import SHARES

from .runs import RUNS
from .world import CONTEXT

BATCH = 9  # answers scored at a time


def main() -> None:
    parser = argparse.ArgumentParser("python -m recipes.real.shares", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="the chat model: folder or hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=24)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    examples = encode(read_rows(str(given.out / "rows" / "forget.jsonl")), tokenizer, Tokenisation(), CONTEXT)

    def scored(model: nn.Module) -> str:
        scores = score_answers(model, examples, tokenizer.pad_token_id or 0, BATCH)
        late = np.mean([late_probability(each.log_p[: max(1, len(each.log_p) - 1)]) for each in scores])
        return f"{np.exp(mean_log_p(scores)).mean():.3f}, {late:.3f}"

    shares = (0.0, *SHARES)
    lines = [
        "Mean probability of the forget answers, and of their second halves when the first is given.",
        "",
        f"| run, seed | {' | '.join(f'share {share:g}' for share in shares)} |",
        "|---|" + "---|" * len(shares),
    ]
    if (control := given.out / "retrained").is_dir():
        found = scored(AutoModelForCausalLM.from_pretrained(control, dtype="float32").eval())
        lines.append(f"| retrained | {found} |{' |' * len(SHARES)}")
    for name in given.runs:
        for seed in given.seeds:
            adapter = given.out / "work" / f"{name}-{given.epochs:g}-{seed}" / "forget-adapter"
            base = AutoModelForCausalLM.from_pretrained(given.model, dtype="float32")
            model = PeftModel.from_pretrained(base, str(adapter)).eval()
            switch, cells = ForgetSwitch(model), []
            for share in shares:
                with switch.at(share):
                    cells.append(scored(model))
            lines.append(f"| {RUNS[name].title}, {seed} | {' | '.join(cells)} |")
    (given.out / "shares.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{given.out}/shares.md")


if __name__ == "__main__":
    main()
