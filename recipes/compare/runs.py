"""Runs that are computed once, by any number of processes, and may be stopped at any time.

    OUT/records/SPLIT/METHOD/SETTINGS/seed-N/record.json    what a run measured
    OUT/work/…                                              its lock, its adapter and its rows; may be deleted at any time

A process locks a run while it computes it; the operating system releases the lock when the process ends, however it ends. The
record is written last and atomically, so a run without one is started again.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loramox.errors import NonFiniteLossError, RunError
from loramox.files import as_json, replacing
from loramox.run import versions

POLL = 2.0  # seconds between looks at runs that other processes are computing
Record = dict[str, Any]
Read = Callable[["Run"], Record | None]


def digest(value: Any, length: int) -> str:
    """The first characters of the SHA-256 of `value` as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


@dataclass(frozen=True)
class Run:
    """One training and everything measured on it.

    Args:
        method: a method of loramox, or `reference` or `retrained`, the models of the world.
        changed: the settings that differ from the method's defaults, which name the run. Unless one of them is `auto_retain`,
            the reference writes no retain rows.
        settings: all settings. A digest of them is part of the name, so that a new default is another run.
        split: which rows are forgotten (`world.py`).
    """

    method: str
    changed: tuple[tuple[str, Any], ...]
    settings: tuple[tuple[str, Any], ...]
    seed: int
    split: str = "whole"

    @property
    def label(self) -> str:
        """What differs from the method's defaults, in words."""
        values = (
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.changed
        )
        return ", ".join(values) or "defaults"

    @property
    def name(self) -> str:
        """The path of its folder."""
        slug = self.label.replace(", ", ",").replace(" ", "=")
        return f"{self.split}/{self.method}/{slug}-{digest(self.settings, 6)}/seed-{self.seed}"


class Runs:
    """The records and work files in `out`. `world` is the world's fingerprint; None reads records without a world."""

    def __init__(self, out: Path, world: Mapping[str, Any] | None) -> None:
        self.out, self.world = Path(out), world and digest(world, 16)

    def work(self, run: Run) -> Path:
        return self.out / "work" / (self.world or "") / run.name

    def read(self, run: Run) -> Record | None:
        """Its record, or None where there is none. Raises `RunError` for a damaged one and for one of another world."""
        path = self.out / "records" / run.name / "record.json"
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            world = record["world"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error!r}). Delete it, and the run is computed again") from error
        if self.world not in (None, world):
            raise RunError(
                f"{path} is of another world (other models or rows), or --quick differs. Choose another --out, or give the same --world"
            )
        return record

    def result(self, run: Run, compute: Callable[[Run, Path], Record]) -> Record | None:
        """The record of the run, computed where there is none; None while another process computes it.

        A loss that is not finite is a result too (`failed`): the same settings and seed would end the same way.
        """
        folder = self.work(run)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                if (held := self.read(run)) is not None:
                    return held
                start = time.perf_counter()
                try:
                    found = compute(run, folder)
                except NonFiniteLossError as error:
                    found = {"failed": str(error).replace(str(self.out), "OUT")}
                about = {"method": run.method, "settings": dict(run.settings), "seed": run.seed, "split": run.split}
                made = {"seconds": time.perf_counter() - start, "command": command(), "versions": versions()}
                path = self.out / "records" / run.name / "record.json"
                with replacing(path) as partial:
                    partial.write_text(as_json(about | {"world": self.world} | made | found) + "\n", encoding="utf-8")
                return self.read(run)
        except Timeout:
            return None

    def compute(self, plan: Callable[[Read], list[Run]], compute: Callable[[Run, Path], Record]) -> None:
        """Compute the runs of `plan` that have no record. `plan` is called again after each round: it may depend on records."""
        while missing := [run for run in plan(self.read) if self.read(run) is None]:
            done = 0
            for number, run in enumerate(missing, 1):
                if record := self.result(run, compute):
                    done += 1
                    print(f"[{number}/{len(missing)}] {run.name}: {record['seconds']:.0f} s", flush=True)
            if not done:
                time.sleep(POLL)


def command() -> str:
    """The command line, without where on this machine its folders are: records are made to be shared."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return " ".join(["python -m recipes.compare", *words])
