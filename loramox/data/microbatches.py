"""One batch in several forward and backward passes, so that little of it is padding."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

# What a pass costs besides its tokens, in tokens' worth of arithmetic: on a GPU, reading the weights and making 16 bits of
# 4 takes as long as computing with a few hundred tokens; on a CPU arithmetic is slow, and a pass costs next to nothing.
OVERHEAD = {"cpu": 64}
OVERHEAD_ELSEWHERE = 256

Batch = dict[str, Any]


def cut(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Rows in groups of like length, longest first: those of least Σ (rows · longest row + overhead), in tokens.

    `lengths` in tokens → indices of rows, each in one group.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first j rows: tokens, and where their last group begins
    for end in range(1, len(order) + 1):
        best.append(
            min((best[start][0] + (end - start) * lengths[order[start]] + overhead, start) for start in range(end))
        )
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def passes(parts: dict[str, Batch], overhead: int) -> Iterator[dict[str, Batch]]:
    """Parts of a step as the passes that `cut` makes of all their rows, of whichever part they are.

    Each batch has a `share`, of its part's rows: the mean over all of them is Σ share · mean over a pass's rows. So the objective
    is the same, and its gradient but for rounding.
    """
    place = [(part, row) for part, batch in parts.items() for row in range(len(batch["lengths"]))]
    for group in cut([parts[part]["lengths"][row] for part, row in place], overhead):
        chosen = {part: [row for of, row in map(place.__getitem__, group) if of == part] for part in parts}
        yield {part: _share_of(parts[part], rows) for part, rows in chosen.items() if rows}


def passes_of_pairs(parts: dict[str, Batch], overhead: int) -> Iterator[dict[str, Batch]]:
    """The same of parts that belong together row by row: row i of each is in the same pass."""
    lengths = [sum(of) for of in zip(*(batch["lengths"] for batch in parts.values()), strict=True)]
    for rows in cut(lengths, overhead):
        yield {part: _share_of(batch, rows) for part, batch in parts.items()}


def _share_of(batch: Batch, rows: list[int]) -> Batch:
    return _rows_of(batch, rows) | {"share": len(rows) / len(batch["lengths"])}


def _rows_of(batch: Batch, rows: list[int]) -> Batch:
    longest = max(batch["lengths"][row] for row in rows)
    return {
        name: of[rows, :longest] if isinstance(of, Tensor) else [of[row] for row in rows] for name, of in batch.items()
    }
