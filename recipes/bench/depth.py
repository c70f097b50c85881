"""`loramox evaluate --depth` beside the code of the paper that defines the unlearning depth score (arXiv 2605.24614).

    python -m recipes.bench.depth --authors unlearning-depth-score --world tiny_tofu --adapter NAME=DIR … \\
        [--rows N] [--out recipes/bench/results/depth.md]

AUTHORS is a checkout of github.com/gnueaj/unlearning-depth-score, whose own function is called on the same models and rows.
WORLD has `reference/`, `retrained/` and `rows/forget.jsonl`, as in recipes/README.md; each DIR is an adapter for that reference.

Their code takes hidden states from transformers' `hidden_states`, in which the last layer's are those after the final norm, and
puts them where the norm comes once more. "Before the norm" is their function with the layer's own output in that place.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramox import Tokenisation, read_rows
from loramox.adapter.loading import put_on
from loramox.evaluate.depth import Depth, DepthConfig, Gaps
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.model.config import ModelConfig, context_of, identify, read_config
from loramox.model.load import load_reference
from loramox.model.lora import at_scale
from loramox.model.patching import patched_pass

BATCH = 32
ABOUT = """`forget p` is the geometric mean of the answer tokens' probabilities, mean over rows. The score is of whole answers, without the
token that ends them; `entities` is their function, before the norm, on the entities that the authors marked in {} of these {} answers.
`reference` is the adapter at scale 0. `apart` is the largest difference of a gap, of any row and layer, from loramox's, in nats per
token."""


def ours(world: Path, adapter: Path, scale: float, count: int | None) -> tuple[Gaps, float]:
    """Both models' gaps, and the forget model's mean probability of the answers."""
    model = ModelConfig(str(world / "reference"), quantization="none", dtype="float32")
    config = read_config(model)
    rows = {"forget": read_rows(str(world / "rows/forget.jsonl"))[:count]}
    tokenizer = AutoTokenizer.from_pretrained(model.model)
    questions = Questions(rows, tokenizer, Tokenisation(), context_of(config), ScoringConfig(BATCH, 0, use_cpu=True))
    depth = Depth(DepthConfig(True, str(world / "retrained")), str(adapter), model, identify(model, config), questions)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        depth.read_retrained(torch.device("cpu"))
        loaded = put_on(load_reference(model), adapter)
        depth.measure(loaded, scale)
        with at_scale(loaded, scale):
            records = questions.ask(loaded)
    return depth.gaps, float(np.mean([record["probability"] for record in records]))


class Theirs:
    """The authors' function on the same models."""

    def __init__(self, checkout: Path, world: Path, count: int | None) -> None:
        sys.path.insert(0, str(checkout))
        import compute_uds

        self.code = compute_uds
        self.code.generate_baseline = lambda *_, **__: ""  # answers for their log
        self.world, self.tokenizer = world, AutoTokenizer.from_pretrained(world / "reference")
        self.rows = [json.loads(line) for line in (world / "rows/forget.jsonl").read_text().splitlines()][:count]
        marked = {e["question"]: e for e in json.loads((checkout / "tofu_data/forget10_filtered.json").read_text())}
        self.marked = [marked[row["question"]] for row in self.rows if row["question"] in marked]

    def model(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.world / name, dtype=torch.float32).eval()

    def __call__(self, forget: Any, entities: bool = False) -> Gaps:
        items = self.marked if entities else [dict(row, idx=i, prefix="", entity="") for i, row in enumerate(self.rows)]
        scope = {} if entities else {"em_scope": "full", "reference_scope": "full_answer"}
        full = self.model("reference")
        layers = list(range(full.config.num_hidden_layers))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            results, mean, *_ = self.code._run_s1_s2_side_by_side_logprob_batch(
                self.model("retrained"), forget, full, self.tokenizer, items, layers, batch_size=BATCH, **scope
            )
        gaps = Gaps(*(np.array([r[name] for r in results]) for name in ("s1_deltas", "s2_deltas")))
        assert abs(np.nanmean(gaps.depth()) - mean) < 1e-9  # the same score of the same gaps
        return gaps

    @contextlib.contextmanager
    def before_the_norm(self) -> Iterator[None]:
        """Within it their hidden states of each layer are what the layer returns."""

        def states(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
            batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": input_ids}
            batch |= {"answers": [range(1, input_ids.shape[1])] * len(input_ids)}
            everywhere = torch.ones_like(input_ids, dtype=torch.bool)
            _, found = patched_pass(model, batch, everywhere)
            return [torch.empty(0), *(h.view(*input_ids.shape, -1) for h in found)]

        own, self.code._compute_hidden_states_batch = self.code._compute_hidden_states_batch, states
        try:
            with torch.no_grad():
                yield
        finally:
            self.code._compute_hidden_states_batch = own


def tables(given: argparse.Namespace) -> Iterator[str]:
    theirs = Theirs(given.authors, given.world, given.rows)
    yield "\n" + ABOUT.format(len(theirs.marked), len(theirs.rows)) + "\n"
    yield "| forget model | forget p | rows | loramox | theirs, before the norm | apart | theirs | apart | entities |"
    yield "|---|---|---|---|---|---|---|---|---|"
    profiles = []
    adapters = [(name, Path(folder), 1.0) for name, _, folder in (each.partition("=") for each in given.adapter)]
    for name, adapter, scale in [("reference", adapters[0][1], 0.0), *adapters]:
        gaps, probability = ours(given.world, adapter, scale, given.rows)
        forget = theirs.model("reference")
        forget = put_on(forget, adapter).merge_and_unload().eval() if scale else forget
        published = theirs(forget)
        with theirs.before_the_norm():
            same, entities = theirs(forget), theirs(forget, entities=True) if theirs.marked else None
        apart = [max(np.abs(a - b).max() for a, b in zip(gaps, each, strict=True)) for each in (same, published)]
        scores = [f"{np.nanmean(each.depth()):.4f}" if each else "" for each in (gaps, same, published, entities)]
        known = int((~np.isnan(gaps.depth())).sum())
        yield f"| {name} | {probability:.3f} | {known} | {scores[0]} | {scores[1]} | {apart[0]:.0e} | {scores[2]} | {apart[1]:.2g} | {scores[3]} |"
        profiles.append((name, gaps.by_layer()))
    yield "\n## By layer\n"
    yield "Rows in which the layer encodes what only the reference knows (K); nats per token that a model lacks there, mean over all rows; mean"
    yield "share of the retrained model's gap that is erased, over the rows of K.\n"
    yield "| forget model | layer | rows in S | retrained lacks | forget model lacks | erased |\n|---|---|---|---|---|---|"
    for name, layers in profiles:
        for each in layers:
            yield f"| {name} | {each['layer']} | {each['rows']} | {each['retrained']:.3f} | {each['forget']:.3f} | {each['erased']:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, required=True)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--adapter", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--rows", type=int, help="the first so many forget rows; default: all")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    words = [re.sub(r"(?<![^=])/\S*/", "", word) for word in sys.argv[1:]]  # folders of this machine
    lines = [
        "# The unlearning depth score beside its authors' code\n",
        f"`python -m recipes.bench.depth {' '.join(words)}`\n",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, 1 thread, torch {torch.__version__.split('+')[0]}, fp32.",
    ]
    for line in lines:
        print(line)
    for line in tables(given):
        print(line, flush=True)
        lines.append(line)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
