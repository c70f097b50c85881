"""Split a step into micro-batches of similar length, so that little of it is padding."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loramox.data.encode import IGNORED

# What a pass costs besides its tokens, in tokens' worth of arithmetic. On a CPU arithmetic is slow, and a pass costs next to
# nothing. On a GPU it is the longer of two: making 16 bits of 4-bit weights, and starting some ten thousand kernels. Of a 7B
# model that is 200 tokens' worth on an RTX 3090, 400 on a 4090 and 1,800 on an H100, of a 3B model twice as much: by reckoning.
OVERHEAD = {"cpu": 64}
OVERHEAD_ELSEWHERE = 512
ONE_PASS = 1 << 40  # as overhead: no padding is worth a second pass

Batch = dict[str, Any]


def cut(lengths: Sequence[int], overhead: int, most: float = math.inf) -> list[list[int]]:
    """Rows in groups of like length, longest first: those of least Σ (rows · longest row + overhead), in tokens.

    `lengths` in tokens → indices of rows, each in one group. A group of several rows has no more than `most` tokens.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first j rows: tokens, and where their last group begins
    for end in range(1, len(order) + 1):
        costs = (((end - start) * lengths[order[start]], start) for start in range(end))
        best.append(
            min((best[start][0] + cost + overhead, start) for cost, start in costs if cost <= most or start == end - 1)
        )
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def microbatches(parts: dict[str, Batch], overhead: int, most: float = math.inf) -> Iterator[dict[str, Batch]]:
    """Split the rows of all parts of a step as `cut` does, whichever part they are of.

    Each batch has a `share` of its part's rows: the mean over all of them is Σ share · mean over a micro-batch's rows. So the
    loss and its gradient are the same, except for rounding.
    """
    place = [(part, row) for part, batch in parts.items() for row in range(len(batch["lengths"]))]
    for group in cut([parts[part]["lengths"][row] for part, row in place], overhead, most):
        chosen = {part: [row for of, row in map(place.__getitem__, group) if of == part] for part in parts}
        yield {part: rows_of(parts[part], rows) for part, rows in chosen.items() if rows}


def microbatches_of_pairs(parts: dict[str, Batch], overhead: int, most: float = math.inf) -> Iterator[dict[str, Batch]]:
    """The same of parts that belong together row by row: row i of each is in the same pass."""
    lengths = [sum(of) for of in zip(*(batch["lengths"] for batch in parts.values()), strict=True)]
    for rows in cut(lengths, overhead, most):
        yield {part: rows_of(batch, rows) for part, batch in parts.items()}


def padded_tokens(parts: dict[str, Batch]) -> int:
    """Tokens of a pass over the rows of all parts, padding included."""
    lengths = [length for batch in parts.values() for length in batch["lengths"]]
    return len(lengths) * max(lengths)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, padded to the longest of them, with their `share` of its rows, or of the whole if it is a share."""
    longest = max(batch["lengths"][row] for row in rows)
    # Made here and sent ahead: indexing with a list would wait for the GPU, once a tensor.
    index = torch.tensor(rows).to(batch["labels"].device, non_blocking=True)
    some = {
        name: of[index, :longest] if isinstance(of, Tensor) else [of[row] for row in rows]
        for name, of in batch.items()
        if name != "share"
    }
    return some | {"share": batch.get("share", 1.0) * len(rows) / len(batch["lengths"])}


def concatenated(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, padded to the longest row. Padding is masked, so its token does not matter."""
    if len(batches) == 1:
        return batches[0]
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.cat([pad(each[name], (0, longest - each[name].shape[1]), value=fillers[name]) for each in batches])
        if name in fillers
        else [value for each in batches for value in each[name]]
        for name in batches[0]
        if name != "share"
    }
