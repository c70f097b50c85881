"""Kill every command, fill its disk, start it twice, damage its files; write a table of attempts. See `make campaign`."""

import argparse
import functools
import multiprocessing
import platform
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from random import Random

from campaign.attempts import JOBS, PAIRS, build_world, fill, kill, kill_pair, twice
from campaign.mutations import TARGETS, mutate

from loramox.run import versions

KINDS = {
    **{f"kill `{job}`": (kill, job) for job in JOBS},
    **{f"full disk, `{job}`": (fill, job) for job in JOBS},
    **{f"two at once, `{job}`": (twice, job) for job in JOBS},
    **{f"kill one of two processes, `{job}`": (kill_pair, job) for job in PAIRS},
    **{f"damage: {target}": (mutate, target) for target in TARGETS},
}
ENDS = ("same", "refused", "done", "failure")
Outcome = tuple[str, int, str, str, str | None]  # kind, number, how it was disturbed, how it ended, fault


def attempt(world: Path, seed: int, planned: tuple[str, int]) -> Outcome:
    """Each attempt has its own seed and its own copy of the world, so that it can be repeated alone."""
    kind, number = planned
    folder = world.with_name(re.sub(r"\W+", "-", f"{kind}-{number}"))
    shutil.copytree(world, folder)
    try:
        disturb, of = KINDS[kind]
        return kind, number, *disturb(world, folder, of, Random(f"{seed} {kind} {number}"))
    finally:
        shutil.rmtree(folder)


def table(outcomes: Sequence[Outcome], minutes: float) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"# Campaign of {date.today()}\n",
        f"`make campaign ARGS='{' '.join(sys.argv[1:])}'`: {minutes:.0f} minutes, {platform.machine()}, {packages}\n",
        "Failures are tracebacks, hangs and results that differ from those of an undisturbed command. A refusal (exit code 1 or 2) is",
        "none. After a kill or with room on the disk again, the command is run again. Two processes are started as torchrun starts them.",
        "A full disk is one on which no file can be opened for writing, or made longer than some bytes. Where results may differ (a report of a damaged record), they count as other.\n",
        "| kind | attempts | same result | refused | other | failures |\n|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        ends = Counter("failure" if fault else end for each, _, _, end, fault in outcomes if each == kind)
        lines.append("| ".join(["", *map("{} ".format, (kind, ends.total(), *map(ends.get, ENDS, [0] * 4)))]) + "|")
    failed = [outcome for outcome in outcomes if outcome[4]]
    lines += [f"| all | {len(outcomes)} | | | | {len(failed)} |\n", "## Failures\n"]
    lines += [f"- {kind}, attempt {number} ({how}): {fault}" for kind, number, how, _, fault in failed] or ["None."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make campaign ARGS=…", description=__doc__)
    parser.add_argument("--tries", type=int, default=80, help="attempts of each kind")
    parser.add_argument("--minutes", type=float, default=20, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of the kinds to try")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{date.today()}.md")
    given = parser.parse_args()
    plan = [(kind, number) for number in range(given.tries) for kind in KINDS if given.only in kind]
    began, outcomes = time.monotonic(), []
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nothing waits for a disk there
    with tempfile.TemporaryDirectory(dir=in_memory) as scratch:
        world = Path(scratch).resolve() / "world"
        build_world(world)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for outcome in pool.imap_unordered(functools.partial(attempt, world, given.seed), plan):
                outcomes.append(outcome)
                print(*outcome[:3], outcome[4] or outcome[3], sep=" | ", flush=True)
                if time.monotonic() - began > 60 * given.minutes:
                    break
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(table(outcomes, (time.monotonic() - began) / 60))
    print(given.out)
    sys.exit(any(outcome[4] for outcome in outcomes))


if __name__ == "__main__":
    main()
