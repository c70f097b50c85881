"""Split batches over the processes of torchrun or accelerate launch: each scores every n-th, and all get every result.

A batch is the same in any number of processes, and so are its numbers.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from loramox.model.sharding import is_sharded

T = TypeVar("T")


def in_batches(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def mine(batches: Sequence[T], model: nn.Module) -> Sequence[T]:
    """Those of this process.

    Where the model's layers are cut over the processes, each has as many, if need be some batch once more: they go through the
    layers together.
    """
    state = PartialState()
    count = len(batches)
    if is_sharded(model):
        count = math.ceil(count / state.num_processes) * state.num_processes
    return [batches[i % len(batches)] for i in range(state.process_index, count, state.num_processes)]


def everyones(found: dict[int, T]) -> dict[int, T]:
    """What every process found, by the number of the example: each is asked by one of them. All must call it."""
    if PartialState().num_processes == 1:
        return found
    return {i: of for some in gather_object([found]) for i, of in some.items()}


def progress(describe: str | None, unit: str, items: Sequence[T] | None = None, total: int | None = None) -> tqdm:
    """A progress bar over `items`, or of a `total`; one process shows it, and only with a description."""
    hidden = describe is None or not PartialState().is_main_process
    return tqdm(items, desc=describe, total=total, disable=hidden, leave=False, unit=unit)
