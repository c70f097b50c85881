"""Score answers in batches that fit into memory: halve the batch size whenever memory runs out."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from loramox.errors import RunError

T = TypeVar("T")


class FittingBatch:
    """How many answers are asked at a time: `size`, until a batch of so many does not fit.

    accelerate's `find_executable_batch_size` would collect garbage before each call, of which a sweep makes a hundred, go down by
    a tenth at a time, and do so in each process by itself.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def ask(self, questions: Callable[[int], T]) -> T:
        """questions(size), again from its beginning with half the size each time that memory runs out.

        Raises `RunError` where a single answer does not fit, and where several processes share the batches, which must be the
        same in all.
        """
        while True:
            try:
                return questions(self.size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                remedy = f"Give --batch_size {self.size // 2} or less"
                if self.size == 1:
                    remedy = "Shorter rows, shorter answers (--max_new_tokens) or a device with more memory are needed"
                if self.size == 1 or PartialState().num_processes > 1:
                    raise RunError(f"memory ran out with --batch_size {self.size} ({error}). {remedy}") from error
            clear_device_cache(garbage_collection=True)
            self.size //= 2
            warnings.warn(
                f"memory ran out with --batch_size {2 * self.size}: {self.size} answers at a time from here on",
                stacklevel=2,
            )
