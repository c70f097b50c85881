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

from campaign.attempts import JOBS, PAIRS, TORCHRUN, build_world, fill, kill, kill_pair, kill_torchrun, twice
from campaign.mutations import TARGETS, WAYS, mutate

from loramox.run import versions

KINDS = {  # the quickest first
    **{f"damage: {target}": (mutate, target) for target in TARGETS},
    **{f"kill `{job}`": (kill, job) for job in JOBS},
    **{f"full disk, `{job}`": (fill, job) for job in JOBS},
    **{f"two at once, `{job}`": (twice, job) for job in JOBS},
    **{f"kill one of two processes, `{job}`": (kill_pair, job) for job in PAIRS},
    **{f"kill torchrun, `{job}`": (kill_torchrun, job) for job in TORCHRUN},
}
IN_A_ROUND = {mutate: 4, kill_torchrun: 2}  # attempts of a kind; of all others one
ENDS = ("same", "refused", "done", "failure")
Outcome = tuple[str, int, str, str, str | None]  # kind, number, how it was disturbed, how it ended, fault


def planned(rounds: int, only: str) -> list[tuple[int, str, int]]:
    """(round, kind, number of the attempt): in the first round each kind is tried, and each way of damage in some file."""
    return [
        (turn, kind, turn * IN_A_ROUND.get(disturb, 1) + each)
        for turn in range(rounds)
        for kind, (disturb, _) in KINDS.items()
        if only in kind
        for each in range(IN_A_ROUND.get(disturb, 1))
    ]


def attempt(world: Path, seed: int, until: float, plan: tuple[int, str, int]) -> Outcome | None:
    """Each attempt has its own seed and its own copy of the world, so that it can be repeated alone. None when time is up."""
    turn, kind, number = plan
    if turn and time.monotonic() > until:
        return None
    folder = world.with_name(re.sub(r"\W+", "-", f"{kind}-{number}"))
    shutil.copytree(world, folder)
    try:
        disturb, of = KINDS[kind]
        return kind, number, *disturb(world, folder, of, number, Random(f"{seed} {kind} {number}"))
    except Exception as error:  # of the campaign itself, which goes on
        return kind, number, "", "", f"not tried: {error!r}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(outcomes: Sequence[Outcome], minutes: float) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"# Campaign of {date.today()}\n",
        f"`make campaign ARGS='{' '.join(sys.argv[1:])}'`: {minutes:.0f} minutes, {platform.machine()}, {packages}\n",
        "Failures are tracebacks, hangs and results that differ from those of an undisturbed command. A refusal (exit code 1 or 2) is",
        "none. After a kill or with room on the disk again, the command is run again. Two processes are started as torchrun starts them;",
        "where torchrun is killed, it is torchrun itself, or its processes.",
        "A full disk is one on which no file can be opened for writing, or made longer than some bytes. Where results may differ (a report of a damaged record), they count as other.\n",
        "| kind | attempts | same result | refused | other | failures |\n|---|---|---|---|---|---|",
    ]
    lines += [_line(kind, [outcome for outcome in outcomes if outcome[0] == kind]) for kind in KINDS]
    lines += [
        _line("all", outcomes),
        "\nThe same damage by its way:\n",
        "| way | attempts | same result | refused | other | failures |",
    ]
    damaged = [outcome for outcome in outcomes if outcome[0].startswith("damage")]
    lines += ["|---|---|---|---|---|---|"]
    lines += [_line(way, [outcome for outcome in damaged if outcome[2].startswith(f"{way}:")]) for way in WAYS]
    failed = [outcome for outcome in outcomes if outcome[4]]
    lines += ["\n## Failures\n"]
    lines += [f"- {kind}, attempt {number} ({how}): {fault}" for kind, number, how, _, fault in failed] or ["None."]
    return "\n".join(lines) + "\n"


def _line(name: str, outcomes: Sequence[Outcome]) -> str:
    ends = Counter("failure" if fault else end for *_, end, fault in outcomes)
    return "| ".join(["", *map("{} ".format, (name, ends.total(), *map(ends.get, ENDS, [0] * 4)))]) + "|"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make campaign ARGS=…", description=__doc__)
    parser.add_argument("--rounds", type=int, default=80, help="in each of them every kind is tried")
    parser.add_argument(
        "--minutes", type=float, default=18, help="begin no attempt after so many, but of the first round"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of the kinds to try")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{date.today()}.md")
    given = parser.parse_args()
    began, outcomes = time.monotonic(), []
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nothing waits for a disk there
    with tempfile.TemporaryDirectory(dir=in_memory, ignore_cleanup_errors=True) as scratch:
        world = Path(scratch).resolve() / "world"
        build_world(world)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            tried = functools.partial(attempt, world, given.seed, began + 60 * given.minutes)
            for outcome in filter(None, pool.imap_unordered(tried, planned(given.rounds, given.only))):
                outcomes.append(outcome)
                print(*outcome[:3], outcome[4] or outcome[3], sep=" | ", flush=True)
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(table(outcomes, (time.monotonic() - began) / 60))
    print(given.out)
    sys.exit(any(outcome[4] for outcome in outcomes))


if __name__ == "__main__":
    main()
