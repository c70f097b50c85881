"""Trained on the base in few bits, served on its 16-bit weights: the card and the command line say so."""

import json
from pathlib import Path

import pytest

from loramox import ReferenceConfig
from loramox.adapter.card import forget_card
from loramox.cli.training import not_as_served


@pytest.mark.parametrize(
    ("quantization", "line"),
    [
        ("nf4", "trained on the base quantized to nf4. Before you serve it on 16-bit weights, measure it there"),
        ("none", "trained on the base's own weights, not quantized"),
    ],
)
def test_the_card_says_in_which_precision_the_base_was(quantization: str, line: str, trained: Path) -> None:
    provenance = json.loads((trained / "forget-adapter/provenance.json").read_text())
    provenance["settings"]["quantization"] = quantization
    assert line in forget_card(provenance)
    del provenance["settings"]["quantization"]  # of a run from Python
    assert line not in forget_card(provenance)


def test_the_last_lines_of_unlearn_offer_to_score_it_on_the_weights_that_are_served() -> None:
    rows = "--forget f.jsonl --retain r.jsonl"
    (line,) = not_as_served(ReferenceConfig("a base", quantization="nf4"), "out", rows)
    assert "quantized to nf4" in line
    assert (
        f"loramox evaluate --model 'a base' --adapter out/forget-adapter {rows} --quantization none --out out/served"
        in line
    )
    (line,) = not_as_served(ReferenceConfig("b", tuned_adapter="mine"), "out", rows)
    assert "--adapter out/combined-adapter" in line
    (line,) = not_as_served(ReferenceConfig("b", trust_remote_code=True, attn_implementation="eager"), "out", rows)
    assert "--model b --attn_implementation eager --trust_remote_code true --adapter" in line
    assert not_as_served(ReferenceConfig("b", quantization="none"), "out", rows) == []
