"""Batches that fit into memory: halve the batch size whenever memory runs out."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from loramox.errors import RunError

T = TypeVar("T")
# Raised outside torch's allocator, and unknown to accelerate.
ELSEWHERE = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the device, or the CPU, has no more memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        should_reduce_batch_size(error) or any(words in str(error) for words in ELSEWHERE)
    )


class FittingBatch:
    """How many answers are asked at a time: `size`, until a batch of so many does not fit.

    `flag` sets that size. It is None where none does, and one process asks by itself.

    accelerate's `find_executable_batch_size` would collect garbage before each call, of which a sweep makes a hundred, go down by
    a tenth at a time, and do so in each process by itself.
    """

    def __init__(self, size: int, flag: str | None = "--batch_size") -> None:
        self.size, self.flag = size, flag

    def ask(self, questions: Callable[[int], T]) -> T:
        """questions(size), again from its beginning with half the size each time that memory runs out.

        Raises `RunError` where a single answer does not fit, and where several processes share the batches, which must be the
        same in all.
        """
        while True:
            try:
                return questions(self.size)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                ran_out = f"memory ran out with {self.flag or 'a batch of'} {self.size}"
                remedy = f"Give {self.flag} {self.size // 2} or less"
                if self.size == 1:
                    answers = ", shorter answers (--max_new_tokens)" if self.flag == "--batch_size" else ""
                    remedy = f"Shorter rows{answers} or a device with more memory are needed"
                if self.size == 1 or (self.flag and PartialState().num_processes > 1):
                    raise RunError(f"{ran_out} ({error}). {remedy}") from error
            clear_device_cache(garbage_collection=True)
            self.size //= 2
            warnings.warn(f"{ran_out}: {self.size} at a time from here on", stacklevel=2)
