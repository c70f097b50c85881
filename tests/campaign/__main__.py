"""Kill every command and damage every file, many times; write a table of attempts and failures. See `make campaign`."""

import argparse
import functools
import multiprocessing
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from random import Random

from campaign.attempts import JOBS, build_world, kill
from campaign.mutations import TARGETS, mutate

from loramox.run import versions

Outcome = tuple[str, int, str, str, str | None]  # kind, number, how it was disturbed, how it ended, fault


def attempt(world: Path, seed: int, planned: tuple[str, int]) -> Outcome:
    """Each attempt has its own seed and its own copy of the world, so that it can be repeated alone."""
    kind, number = planned
    folder = world.with_name(f"{kind.replace(' ', '-')}-{number}")
    shutil.copytree(world, folder)
    try:
        disturb = kill if kind in JOBS else mutate
        return kind, number, *disturb(world, folder, kind, Random(f"{seed} {kind} {number}"))
    finally:
        shutil.rmtree(folder)


def table(outcomes: Sequence[Outcome], minutes: float) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"# Campaign of {date.today()}", "", f"`make campaign ARGS='{' '.join(sys.argv[1:])}'`, {minutes:.0f} minutes. {platform.machine()}; {packages}.",
             "A failure is a traceback, a hang, or another result than without the disturbance. Nothing else is a failure: a damaged file may be refused.",
             "", "| kind | attempts | same result | refused | other end | failures |", "|---|---|---|---|---|---|"]  # fmt: skip
    for kind in (*JOBS, *TARGETS):
        ends = Counter("failure" if fault else end for k, _, _, end, fault in outcomes if k == kind)
        name = f"kill `{kind}`" if kind in JOBS else f"damage {kind}"
        lines.append(
            f"| {name} | {ends.total()} | {ends['same']} | {ends['refused']} | {ends['done']} | {ends['failure']} |"
        )
    failed = [o for o in outcomes if o[4]]
    lines += [f"| all | {len(outcomes)} | | | | {len(failed)} |", "", "## Failures", ""]
    lines += [f"- {kind}, attempt {number} ({how}): {fault}" for kind, number, how, _, fault in failed] or ["None."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make campaign ARGS=…", description=__doc__)
    parser.add_argument("--tries", type=int, default=100, help="Attempts of each kind.")
    parser.add_argument("--minutes", type=float, default=60, help="Stop after so many.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="Attempts at a time.")
    parser.add_argument("--only", default="", help="Part of the names of the kinds to try.")
    parser.add_argument("--number", type=int, help="Repeat this attempt alone.")
    parser.add_argument("--out", default=Path(__file__).parent / "results" / f"{date.today()}.md", type=Path)
    given = parser.parse_args()
    numbers = range(given.tries) if given.number is None else [given.number]
    plan = [(kind, number) for number in numbers for kind in (*JOBS, *TARGETS) if given.only in kind]
    began, outcomes = time.monotonic(), []
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nothing waits for a disk there
    with tempfile.TemporaryDirectory(dir=in_memory) as scratch:
        build_world(Path(scratch) / "world")
        with multiprocessing.get_context("fork").Pool(given.jobs) as pool:
            for outcome in pool.imap_unordered(functools.partial(attempt, Path(scratch) / "world", given.seed), plan):
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
