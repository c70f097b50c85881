"""taught.md: the forget models of the taught world beside the reference and the retrained model."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from loramox.data.fluency import SHARED, is_fluent, overlap
from loramox.evaluate.truth_ratio import forget_quality
from loramox.train.inputs import REFUSALS, read_refusals

from .judge import is_refusal
from .runs import RUNS

Found = dict[str, Any]
COLUMNS = (
    "forget probability", "tests: p of truth ratio, of log-probability", "key words: forget, paraphrased", "fluent, refused: forget",
    "retain given, never given", "key words: never given", "facts right", "perplexity of text", "refused: never given, facts, everyday",
    "everyday alike",
)  # fmt: skip


def write_table(out: Path) -> None:
    """One line for each record and scale; retain and perplexity are ratios to the reference."""
    records = {path.stem: json.loads(path.read_text())["points"] for path in sorted((out / "records").glob("*.json"))}
    reference, retrained = records.pop("reference")["0"], records.pop("retrained")["0"]
    lines = [
        f"| | scale | {' | '.join(COLUMNS)} |",
        "|" + "---|" * (len(COLUMNS) + 2),
        _line("reference", "", reference, reference, retrained),
        _line("retrained without the author", "", retrained, reference, retrained),
    ]
    for stem, points in records.items():
        name, epochs, seed = stem.rsplit("-", 2)
        for scale, found in sorted(points.items(), key=lambda point: -float(point[0])):
            lines.append(_line(f"{RUNS[name].title}, {epochs} passes, seed {seed}", scale, found, reference, retrained))
    (out / "taught.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(title: str, scale: str, found: Found, reference: Found, retrained: Found) -> str:
    refusals = read_refusals(str(REFUSALS))

    def refused(part: str) -> str:
        said = found["answers"][part]
        return f"{sum(is_refusal(text, refusals) for text in said)}/{len(said)}"

    def ratio(part: str) -> float:
        return np.mean(found[part]) / np.mean(reference[part])

    log_p, ratios = np.array(found["log_p"]), np.array(found["truth_ratio"])
    said, before = found["answers"], reference["answers"]
    cells = [
        f"{np.exp(log_p).mean():.3g}",
        f"{forget_quality(ratios, np.array(retrained['truth_ratio'])):.2g}, "
        f"{forget_quality(log_p, np.array(retrained['log_p'])):.2g}",
        ", ".join(f"{np.mean(found['key_words'][part]):.2f}" for part in ("forget", "paraphrased")),
        f"{sum(map(is_fluent, said['forget']))}/{len(said['forget'])}, {refused('forget')}",
        f"{ratio('given'):.3f}, {ratio('never'):.3f}",
        f"{np.mean(found['key_words']['never']):.2f}",
        f"{sum(found['right'])}/{len(found['right'])}",
        f"{np.exp(np.mean(reference['text']) - np.mean(found['text'])):.3f}",
        ", ".join(map(refused, ("never", "facts", "everyday"))),
        f"{sum(overlap(a, b) >= SHARED for a, b in zip(said['everyday'], before['everyday'], strict=True))}/{len(said['everyday'])}",
    ]
    return f"| {' | '.join([title, scale, *cells])} |"
