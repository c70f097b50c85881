"""Compare unlearning methods at equal budget, LoRA rank and number of settings, beside a model retrained without the forget rows.

    python -m recipes.compare frontier --world WORLD --out OUT [--seeds 0 1 2] [--quick]
    python -m recipes.compare relearn --world WORLD --out OUT
    python -m recipes.compare overlap --world WORLD --out OUT
    python -m recipes.compare ablation --world WORLD --out OUT
    python -m recipes.compare written --world WORLD --out OUT
    python -m recipes.compare frontier relearn --draw --out OUT     from the records in OUT alone

Writes OUT/tables/NAME.md and NAME.png. A run with a record in OUT is not computed again: stop the command at any time, start it
again, or start several on one OUT. Each process uses one thread unless OMP_NUM_THREADS says otherwise. What a world holds is in
world.py, the settings are in methods.py, how a scale and a setting are chosen is in choose.py.
"""

import argparse
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

from filelock import FileLock

from loramox.errors import LoramoxError

from .compute import compute
from .methods import QUICK, Size
from .runs import Runs
from .tables import TABLES
from .world import World


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--world", type=Path, help="folder with reference/, retrained/ and rows/")
    parser.add_argument("--out", type=Path, required=True, help="folder of records, tables and work files")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; the first chooses in a grid")
    parser.add_argument("--quick", action="store_true", help="one seed, two steps, few rows: to see it work")
    parser.add_argument("--draw", action="store_true", help="compute nothing; needs no --world")
    given = parser.parse_args(words)
    if not (given.world or given.draw):
        parser.error("--world is missing; without one, --draw makes the tables from the records in --out")
    size = QUICK if given.quick else Size()
    size = replace(size, seeds=tuple(given.seeds)) if given.seeds else size
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to their developers, once a training
    try:
        run(given, size)
    except KeyboardInterrupt:
        print(
            "recipes.compare: interrupted. Records on disk are complete; rerun the command to resume", file=sys.stderr
        )
        sys.exit(130)
    except LoramoxError as error:
        print(f"recipes.compare: {error}", file=sys.stderr)
        sys.exit(2)


def run(given: argparse.Namespace, size: Size) -> None:
    """Compute the runs that are missing, and write the tables."""
    runs = Runs(given.out, None)
    if not given.draw:
        world = World(given.world, size.forget, size.scored)
        runs = Runs(given.out, world.fingerprint())
        for name in given.tables:
            runs.compute(
                lambda read, name=name: TABLES[name].plan(size, read),
                lambda run, work: compute(run, world, work, size),
            )
    given.out.mkdir(parents=True, exist_ok=True)
    with FileLock(given.out / ".lock"):  # several processes may end at once
        for name in given.tables:
            TABLES[name].write(name, given.out, size, runs.read)
            print(f"{given.out}/tables/{name}.md")


if __name__ == "__main__":
    main()
