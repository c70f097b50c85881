"""Cases in which unlearning fails or does harm: what happens, and which warnings loramox prints.

    loramox demo
    python recipes/limits.py --demo runs/demo --out runs/limits [--method npo_mean]

With the rows and models of the demo. Each case is trained and swept once; results in OUT are reused, and those of another method
or demo are refused. Writes results.md: forget and retain probability as shipped, and at the alpha (or scale) that forgets most
while retain is at 0.98, on all retain rows of the demo, whichever were trained on; and the warnings of `unlearn` and `sweep`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from loramox.cli import main as loramox

EPOCHS, KEEP = 120, 0.98
CASES = {
    "nothing wrong": {},
    "too little training: a tenth of the passes": {"epochs": EPOCHS // 10},
    "one forget row": {"forget": 1},
    "one retain row": {"retain": 1},
    "5 retain rows": {"retain": 5},
    "20 retain rows": {"retain": 20},
    "40 retain rows": {"retain": 40},
    "each forget row is among the retain rows in other words": {"copies": True},
    "a model that never knew the rows": {"model": "retrained"},
}
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def swept(demo: Path, out: Path, case: Row, method: str) -> tuple[Row, Row]:
    """The run's record and its frontier, trained and measured where they do not exist yet."""
    forget, retain = (read(demo / f"rows/{part}.jsonl") for part in ("forget", "retain"))
    forget = forget[: case.get("forget")]
    kept = retain[:: len(retain) // case["retain"]][: case["retain"]] if "retain" in case else retain
    if case.get("copies"):
        kept = [*kept, *({**row, "question": f"Please tell me: {row['question']}"} for row in forget)]
    model = ["--model", str(demo / case.get("model", "reference")), "--quantization", "none"]
    if (out / "run/forget-adapter").exists():
        made = json.loads((out / "run/run.json").read_text())["settings"]
        if (made.get("method"), made["model"]) != (method, model[1]):
            raise SystemExit(
                f"{out} was made with {made.get('method')} of {made['model']}, and this is {method} of {model[1]}. Choose another --out"
            )
    else:
        rows = ["--forget", str(written(out / "rows/forget.jsonl", forget))]
        rows += ["--retain", str(written(out / "rows/retain.jsonl", kept))]
        epochs = ["--num_train_epochs", str(case.get("epochs", EPOCHS)), "--save_strategy", "no", "--method", method]
        loramox(["unlearn", *model, *rows, *epochs, "--use_cpu", "true", "--overwrite", "--out", str(out / "run")])
    record = out / "sweep/frontier.json"
    if not record.exists() or json.loads(record.read_text())["status"] != "done":
        rows = ["--forget", str(out / "rows/forget.jsonl"), "--retain", str(demo / "rows/retain.jsonl")]
        trained = ["--trained", str(out / "run/trained"), *model[:2]]
        loramox(["sweep", *trained, *rows, "--max_new_tokens", "0", "--use_cpu", "true", "--out", str(out / "sweep")])
    return json.loads((out / "run/run.json").read_text()), json.loads(record.read_text())


def line(name: str, run: Row, frontier: Row) -> str:
    """A row of the table."""
    points = frontier["points"]
    shipped = next(p for p in points if p["at"] == (run["settings"]["alpha"] or 1))
    kept = [p for p in points if p["retain_probability"] >= KEEP]
    best = min(kept, key=lambda p: p["forget_probability"]) if kept else None

    def both(point: Row | None) -> str:
        return f"{point['forget_probability']:.3f}, {point['retain_probability']:.3f}" if point else "none"

    warned = " ".join(f"*{each.rstrip('?')}.*" for each in [*run["advice"], frontier["warning"]] if each) or "nothing"
    at = f"{both(best)} ({frontier['unit']} {best['at']:g})" if best else "none"
    return f"| {name} | {both(points[0])} | {both(shipped)} | {at} | {warned} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="mox")
    given = parser.parse_args()
    if not (given.demo / "retrained").is_dir():
        parser.error(f"--demo {given.demo} has no retrained/: give a folder that `loramox demo` has written")
    lines = [
        f"Method: {given.method}",
        "",
        f"| case | forget, retain before | as shipped | most forgetting at retain ≥ {KEEP} | warnings |",
        "|---" * 5 + "|",
        *(
            line(name, *swept(given.demo, given.out / f"case-{number}", case, given.method))
            for number, (name, case) in enumerate(CASES.items(), 1)
        ),
    ]
    (given.out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\n\nWritten: {given.out}/results.md")


if __name__ == "__main__":
    main()
