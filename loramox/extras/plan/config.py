"""Settings of a plan: the GPU, the memory to fit into, and the combinations to try."""

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch

from loramox.errors import SettingsError
from loramox.settings import refuse, setting
from loramox.train.config import UnlearnConfig

# The share of main memory that a prediction may fill: predictions are to be within 10 %.
USABLE = 0.9

# The share of a GPU's memory, the rest being fragmentation; and what CUDA itself takes, its context and workspaces, with what a
# card has less than it is sold with.
USABLE_ON_GPU = 0.93
TAKEN_BY_CUDA = int(0.8 * 2**30)  # bytes

EIGHT_BITS = "adamw_8bit"

UNITS = {"": 30, "G": 30, "GB": 30, "GIB": 30, "M": 20, "MB": 20, "MIB": 20}


@dataclass
class PlanConfig:
    """The card, and the rows if there are any."""

    gpu_memory: str = setting(
        "Memory of the GPU, like 12GB (1 GB is 1024³ bytes, as GPUs are sold). With --use_cpu true, main memory."
    )
    forget: str | None = setting(
        "Rows to forget, as for unlearn. Without rows: rows of 256, 1024 and 2048 tokens.", None
    )
    retain: str | None = setting("Rows to retain, as for unlearn.", None)
    drop_overlap: bool = setting("Leave out retain rows that are also forget rows.", False)
    tflops: float | None = setting(
        "Dense 16-bit TFLOPS of a GPU that is not in this machine. Default: measured on this machine's device.", None
    )
    bandwidth: float | None = setting(
        "With --tflops: GB per second of the GPU's memory. Default: 1 for every 150 FLOPs.", None
    )
    sweep_batch_size: int = setting("--batch_size of the planned sweep.", 32)
    max_new_tokens: int = setting("--max_new_tokens of the planned sweep.", 200)

    def __post_init__(self) -> None:
        size_of(self.gpu_memory, "gpu_memory")
        if (self.forget is None) != (self.retain is None):
            raise SettingsError(
                "--forget and --retain go together: give both files, or none to plan for rows of 256 to 2048 tokens"
            )
        for name in ("tflops", "bandwidth", "sweep_batch_size"):
            value = getattr(self, name)
            refuse(name, value, value is None or value > 0, "a number above 0")
        if self.bandwidth and not self.tflops:
            raise SettingsError("--bandwidth goes with --tflops: the device here is measured")


@dataclass
class FitConfig:
    """The memory to fit a run into."""

    fit: str | None = setting(
        "Memory to fit into, like 12GB: chooses the fastest micro-batch, checkpointing and optimizer that loramox plan predicts to "
        "fit. Settings that you give are not changed.",
        None,
    )

    def __post_init__(self) -> None:
        if self.fit is not None:
            size_of(self.fit, "fit")


class Choice(NamedTuple):
    """Settings that do not change the result, except for rounding (and the optimiser's, in 8 bits)."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool
    optim: str
    per_device_eval_batch_size: int

    def flags(self) -> list[str]:
        return [word for name, value in self._asdict().items() for word in (f"--{name}", str(value).lower())]


def size_of(text: str, flag: str) -> int:
    """Bytes, from "12GB". Raises `SettingsError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise SettingsError(f"{flag} is '{text}'; --{flag} needs a size like 12GB or 8000MB")
    return int(float(found[1]) * 2 ** UNITS[found[2].upper()])


def budget_of(memory: int, device: torch.device, here: bool) -> int:
    """Bytes of `memory` that a prediction may fill; of a card that is `here`, no more than what is free on it."""
    if device.type != "cuda":
        return int(USABLE * memory)
    most = max(0, int(USABLE_ON_GPU * memory) - TAKEN_BY_CUDA)
    if not here:
        return most
    # What other programs hold, and CUDA's context in this one, is not free. What torch has cached is.
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(most, int(USABLE_ON_GPU * free))


def choices(args: UnlearnConfig, given: Set[str]) -> Iterator[Choice]:
    """Every choice with the batch size of `args`; settings in `given` stay as they are."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    sizes = [size for size in range(batch, 0, -1) if batch % size == 0]
    if given & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
        sizes = [args.per_device_train_batch_size]
    fixed = given & {"activation_checkpointing", "gradient_checkpointing"}
    for size in sizes:
        for checkpointing in [bool(args.activation_checkpointing)] if fixed else [False, True]:
            yield Choice(size, batch // size, checkpointing, optimiser_of(args), args.per_device_eval_batch_size)


def optimiser_of(args: UnlearnConfig) -> str:
    return str(getattr(args.optim, "value", args.optim))
