"""The tables and figures of the MOX paper (arXiv 2602.06441), one word each, on a small model or any other.

    python -m recipes.paper table1 frontier --world WORLD --out OUT [--quick] [--seeds 0 1 2]
    python -m recipes.paper all --world WORLD --out OUT
    python -m recipes.paper all --draw --out OUT         from the records in OUT alone

Runs whose record is in OUT are not computed again: stop it at any time, start it again, start several at once. README.md beside
this file says what each table is.
"""

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

from loramox.errors import LoramoxError

from .bench import Bench
from .comparison import COMPARISON
from .figures import FIGURES
from .jobs import Jobs
from .methods import QUICK, STANDARD, Scale
from .muse import TABLE2, Muse, MuseWorld, models_epochs
from .overlap import TABLE as OVERLAP
from .runs import Record, Run, Runs
from .show import write
from .tables import TABLES
from .world import World

ALL = TABLES | OVERLAP | FIGURES | COMPARISON | TABLE2


def scale_of(given: argparse.Namespace) -> Scale:
    """What the flags ask for."""
    scale = QUICK if given.quick else Scale()
    settings = dict(scale.settings) | {
        name: value for name in ("epochs", "batch", "r", "asked", "new_tokens", "quantization", "learning_rate", "retrain")
        if (value := getattr(given, name)) is not None
    }  # fmt: skip
    scale = replace(scale, settings=tuple(settings.items()))
    if given.seeds:
        scale = replace(scale, seeds=tuple(given.seeds))
    return scale


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", choices=[*ALL, "all"], metavar="TABLE", help=f"{', '.join(ALL)}, or all")
    parser.add_argument("--world", type=Path, help="folder with reference/, retrained/ and rows/")
    parser.add_argument("--muse", type=Path, help="folder with MUSE-News' own files, for table2")
    parser.add_argument("--out", type=Path, required=True, help="folder of records, tables and work")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps, few rows: to see it work")
    parser.add_argument(
        "--draw", action="store_true", help="compute nothing: tables and pictures of the records that are there"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; the first chooses in a grid")
    parser.add_argument(
        "--retrain",
        type=int,
        help="epochs of training a model from scratch for forget sets that WORLD has none for (default: 30); 0: none",
    )
    parser.add_argument(
        "--refusals", type=Path, help="text file of refusals for DPO and PO, one a line (default: eight of our own)"
    )
    for name in ("epochs", "batch", "r", "asked", "new_tokens"):
        parser.add_argument(f"--{name}", type=int, help=f"default: {STANDARD[name]}")
    parser.add_argument("--learning_rate", type=float, help=f"default: {STANDARD['learning_rate']}")
    parser.add_argument("--quantization", choices=["none", "nf4", "int8"], help="default: none")
    given = parser.parse_args(words)
    if not (given.world or given.draw):
        parser.error("--world is missing; without one, --draw shows the records in --out")
    if "table2" in given.tables and not (given.muse or given.draw):
        parser.error("table2 needs --muse: a folder with MUSE-News' own files")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to their developers, once a training
    try:
        run(given, scale_of(given))
    except KeyboardInterrupt:
        print("recipes.paper: stopped; what is written is whole, and the same command goes on", file=sys.stderr)
        sys.exit(130)
    except LoramoxError as error:
        print(f"recipes.paper: {error}", file=sys.stderr)
        sys.exit(2)


def run(given: argparse.Namespace, scale: Scale) -> None:
    """Compute what lacks, and write every table that was asked for."""
    every = [name for name in ALL if name not in TABLE2 or given.muse or given.draw]
    wanted = {
        name: ALL[name]
        for name in ([*every, *given.tables] if "all" in given.tables else given.tables)
        if name != "all"
    }
    runs = Runs(given.out, None)
    if not given.draw:
        world = World(given.world, given.out / "work", given.refusals)
        runs = Runs(given.out, world.fingerprint())
        compute = _compute(given, scale, world, runs)
        for table in wanted.values():
            runs.compute(lambda read, table=table: table.plan(scale, read), compute)
    says = ", ".join(f"{name} {value}" for name, value in (STANDARD | dict(scale.settings)).items())
    for name, table in wanted.items():
        shown = table.show(scale, runs.read)
        write(given.out, name, table.title, shown, f"Seeds {' '.join(map(str, scale.seeds))}; {says}.")
        print(f"{name}: {shown.claim}")


def _compute(given: argparse.Namespace, scale: Scale, world: World, runs: Runs) -> Callable[[Run], Record]:
    """What computes a run of any job; MUSE's models are made when the first run needs them."""
    jobs = Jobs(Bench(world, runs))
    muse = functools.cache(
        lambda: Muse(MuseWorld(given.muse, given.world / "reference", given.out / "work", models_epochs(scale)), runs)
    )
    return lambda run: muse().compute(run) if run.job == "muse" else jobs.compute(run)


if __name__ == "__main__":
    main()
