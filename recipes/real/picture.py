"""natural.png: by scale of the adapter, what still leaks, and what is left of everything else."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from .judge import counts
from .runs import RUNS
from .world import Asked

LEAKED = {"forget": ("right", "known"), "paraphrase": ("right", "known")}
KEPT = {
    "neighbours": ("right", "known"),
    "far": ("right", "known"),
    "later turns": ("right", "known"),
    "everyday": ("alike", "rows"),
}
COLOURS = {"forget": "#b2182b", "paraphrase": "#ef8a62", "neighbours": "#2166ac", "far": "#67a9cf", "later turns": "#1b7837", "everyday": "#7fbf7b"}  # fmt: skip
NAMES = {"forget": "forget questions", "paraphrase": "their paraphrases", "far": "far things", "everyday": "everyday, alike"}  # fmt: skip


def draw(out: Path, asked: dict[str, list[Asked]]) -> None:
    """One panel for each run with a record in `out`: the share of right answers that are left, by part and scale."""
    reference = json.loads((out / "records" / "reference.json").read_text())["answers"]["1.0"]
    records = {
        path.stem: json.loads(path.read_text())["answers"] for path in sorted((out / "records").glob("*-*.json"))
    }
    if not records:
        return
    figure, panels = plt.subplots(1, len(records), figsize=(4.2 * len(records), 3.8), sharey=True, squeeze=False)
    for panel, (stem, answers) in zip(panels[0], records.items(), strict=True):
        name, epochs, seed = stem.rsplit("-", 2)
        points = [(0.0, counts(reference, reference, asked))]
        points += sorted((float(scale), counts(said, reference, asked)) for scale, said in answers.items())
        for part, (what, among) in (LEAKED | KEPT).items():
            shares = [found[part][what] / max(1, found[part][among]) for _, found in points]
            style = "--" if part in LEAKED else "-"
            label = NAMES.get(part, part)
            panel.plot(
                [scale for scale, _ in points], shares, style, color=COLOURS[part], marker="o", ms=4, label=label
            )
        panel.set_title(f"{RUNS[name].title.replace('`', '')}\n{epochs} passes, seed {seed}", fontsize=9)
        panel.set_xlabel("scale of the adapter (1: as shipped)")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("share of right answers that is left")
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(out / "natural.png", dpi=140, bbox_inches="tight")
    plt.close(figure)
