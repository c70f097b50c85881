"""Runs that are computed once, by any number of processes, and can be stopped at any time.

    OUT/records/JOB/METHOD/SETTINGS/seed-N/record.json    what a run found: small, never computed twice, copied between machines
    OUT/work/…                                            its lock, its adapter, rows made for it: may be deleted at any time

A run is claimed with a lock of the operating system, which is gone when its process is, however that ended. Its record is
written last and at once, so a run without one is begun again.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loramox.errors import NonFiniteLossError, RunError
from loramox.files import write_json
from loramox.run import versions

RECORD = "record.json"
RECORDS, WORK = "records", "work"
POLL = 2.0  # seconds between looks at runs that other processes have claimed
Record = dict[str, Any]
Read = Callable[["Run"], Record | None]


class BusyError(Exception):
    """Another process has claimed the run."""


@dataclass(frozen=True)
class Run:
    """What is computed: a job (curve, trajectory, …) by a method, with the settings that are not the standard ones."""

    job: str
    method: str
    settings: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, job: str, method: str, settings: Mapping[str, Any], seed: int = 0) -> "Run":
        return cls(job, method, tuple(sorted(settings.items())), seed)

    @property
    def name(self) -> str:
        """The path of its folder. Raises `RunError` for a setting that cannot be part of one."""
        words = [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.settings
        ]
        slug = ",".join(words) or "standard"
        if not re.fullmatch(r"[\w.,=+-]{1,240}", slug, re.ASCII):
            raise RunError(
                f"run {self.job} {self.method}: its settings {slug} cannot name a folder. Use plain, short words"
            )
        return f"{self.job}/{self.method}/{slug}/seed-{self.seed}"


def _command() -> str:
    """The command line, without where on this machine its folders lie: records are made to be passed on."""
    return " ".join(["python -m recipes.paper", *(Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:])])


class Runs:
    """The folder of all runs on one world. `world` is its fingerprint; None reads records without one at hand."""

    def __init__(self, out: Path, world: Mapping[str, Any] | None) -> None:
        self.out = Path(out)
        self.world = world and hashlib.sha256(json.dumps(world, sort_keys=True).encode()).hexdigest()[:16]

    def work(self, run: Run) -> Path:
        return self.out / WORK / run.name

    def read(self, run: Run) -> Record | None:
        """Its record, or None. Raises `RunError` for a damaged one, and for one of another world."""
        path = self.out / RECORDS / run.name / RECORD
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            world = record["world"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error!r}). Delete it, and the run is computed again") from error
        if self.world not in (None, world):
            raise RunError(
                f"{path} was computed on another world: other models or rows. Give another --out, or the --world it was made with"
            )
        return record

    @contextmanager
    def claim(self, run: Run) -> Iterator[None]:
        """Within it no other process computes the run. Raises `BusyError` at once when one does."""
        folder = self.work(run)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise BusyError(run.name) from error

    def result(self, run: Run, compute: Callable[[Run], Record]) -> Record:
        """The record of the run, computed where there is none.

        A loss that is not finite is a result too, `failed`: the same settings and seed would end the same way.
        """
        if (held := self.read(run)) is not None:
            return held
        with self.claim(run):
            if (held := self.read(run)) is not None:  # written since we looked
                return held
            start, cpu = time.perf_counter(), time.process_time()
            try:
                found = compute(run)
            except NonFiniteLossError as error:
                found = {"failed": str(error).replace(str(self.out), "OUT")}
            about = {
                "world": self.world,
                "run": {"job": run.job, "method": run.method, "settings": dict(run.settings), "seed": run.seed},
            }
            spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            record = about | found | spent | {"command": _command(), "versions": versions()}
            write_json(self.out / RECORDS / run.name / RECORD, record)
            return json.loads(json.dumps(record))

    def compute(self, plan: Callable[[Read], list[Run]], compute: Callable[[Run], Record]) -> None:
        """Compute what `plan` wants and has no record, until it wants nothing more.

        `plan` is asked again after each round, as what it wants may depend on records; runs that other processes have claimed
        are waited for.
        """
        while missing := [run for run in plan(self.read) if self.read(run) is None]:
            before = len(missing)
            for number, run in enumerate(missing, 1):
                try:
                    record = self.result(run, compute)
                except BusyError:
                    continue
                before -= 1
                print(f"[{number}/{len(missing)}] {run.name}: {record['seconds']:.0f} s", flush=True)
            if before == len(missing):
                time.sleep(POLL)
