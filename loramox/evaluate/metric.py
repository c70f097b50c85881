"""A metric, and the summary of many; the parts and fields of records that they are made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, Any]  # a row of records.jsonl

REFERENCE = "the same model, adapter off"
RETRAINED = "records of the retrained model"
OPTIONAL = ("interval", "bound", "reading")


class Metric(NamedTuple):
    """One number, and what is needed to read it."""

    value: float
    direction: str  # what is better: higher, lower, or nearer to a number
    n: int  # rows
    reference: str | None  # what it was compared to
    source: str
    interval: tuple[float, float] | None = None  # 95 % by the bootstrap over rows, of metrics that have one
    bound: float | None = None  # of an equivalence test: differences up to it count as none
    reading: str | None = None  # of a test: what it says, in words

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if name not in OPTIONAL or value is not None}


class Summary(NamedTuple):
    metrics: dict[str, Metric]
    absent: dict[str, str]  # metrics that could not be taken, and what they lack

    def as_json(self) -> dict[str, Any]:
        return {"metrics": {name: m.as_json() for name, m in self.metrics.items()}, "absent": self.absent}


def values(records: Sequence[Record], name: str) -> np.ndarray:
    """The field `name` of those records that have it."""
    return np.array([r[name] for r in records if name in r], dtype=float)


def by_part(records: Sequence[Record]) -> dict[str, list[Record]]:
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(record["part"], []).append(record)
    return parts
