"""Momentum over the forget model: θ_for^t ← η·θ_for^t + (1 − η)·θ_for^(t−1).

θ_for = θ_ref − α·ΔW is affine in ΔW and both weights sum to 1, so the same recursion on ΔW gives it for every α at once:

    M^1 = ΔW^1,    M^t = η·ΔW^t + (1 − η)·M^(t−1)        (arXiv 2602.06441; η weighs the new model)

It starts at the first ΔW, not at 0: the weights of the ΔW^t sum to 1, and a run of one epoch ships what it trained.
M is kept as factors. Concatenating the new factors to the old ones is exact and adds r to the rank, so beyond `max_rank`
it is truncated, and the error this has caused so far is carried along as a bound: errors shrink by 1 − η with each tick.
Where A is frozen (`shared_subspace`), averaging B alone is exact at the rank of one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loramox.adapter.folder import MOMENTUM as FILE
from loramox.errors import AdapterError
from loramox.files import replacing
from loramox.model.algebra import Factors, add, scaled, truncate
from loramox.model.lora import ReferenceConfig

if TYPE_CHECKING:
    from loramox.train.config import UnlearnConfig


@dataclass
class Momentum:
    """The running average M of every adapted layer's ΔW, in fp32 on the CPU or wherever the adapter is."""

    eta: float
    max_rank: int
    ticks: int = 0
    average: dict[str, Factors] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)  # bound on ‖M exact − M‖_F, per layer

    def tick(self, delta: dict[str, Factors]) -> None:
        """M ← η·ΔW + (1 − η)·M, from the adapter's current factors."""
        self.ticks += 1
        for name, new in delta.items():
            terms = [new]
            if name in self.average and self.eta < 1:
                before = Factors(*(t.to(new.A.device) for t in self.average[name]))  # what was loaded is on the CPU
                terms = [scaled(new, self.eta), scaled(before, 1 - self.eta)]
            self.average[name], lost = truncate(add(*terms), self.max_rank)
            self.error[name] = lost + (1 - self.eta) * self.error.get(name, 0.0)

    def relative_error(self) -> float:
        """Bound on the truncation error over all layers, as a share of ‖M‖_F."""
        return _norm(self.error.values()) / max(_norm(f.norm() for f in self.average.values()), 1e-30)

    def summary(self) -> dict[str, float]:
        """What is recorded about it: η, the number of updates, the rank limit, the bound on the truncation error."""
        return {
            "eta": self.eta,
            "updates": self.ticks,
            "max_rank": self.max_rank,
            "relative_error": self.relative_error(),
        }

    def save(self, folder: Path) -> None:
        """Write the state to `folder`, whole or not at all."""
        tensors = {
            f"{name}.{part}": t.contiguous() for name, f in self.average.items() for part, t in f._asdict().items()
        }
        state = {"eta": self.eta, "max_rank": self.max_rank, "ticks": self.ticks}
        state |= {f"error.{name}": error for name, error in self.error.items()}
        with replacing(folder / FILE) as partial:
            save_file(tensors, partial, metadata={name: repr(value) for name, value in state.items()})

    @classmethod
    def load(cls, folder: Path) -> "Momentum":
        """Read what `save` wrote. Raises `AdapterError` when the file is missing or damaged."""
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                metadata = file.metadata()
                names = sorted({key.rpartition(".")[0] for key in file.keys()})  # noqa: SIM118 (a file, not a dict)
                average = {n: Factors(file.get_tensor(f"{n}.A"), file.get_tensor(f"{n}.B")) for n in names}
            return cls(
                eta=float(metadata["eta"]),
                max_rank=int(metadata["max_rank"]),
                ticks=int(metadata["ticks"]),
                average=average,
                error={k.removeprefix("error."): float(v) for k, v in metadata.items() if k.startswith("error.")},
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise AdapterError(
                f"{folder / FILE} is missing or damaged ({error}). Expected the momentum that training writes "
                "beside its adapter: train again, or restore the file"
            ) from error


def momentum_rank(reference: ReferenceConfig, args: "UnlearnConfig") -> int:
    """The most that the average has: each update adds the adapter's rank, unless A is shared or there is no momentum (η = 1)."""
    most = args.momentum_rank or 4 * reference.r
    return min(reference.r, most) if reference.shared_subspace or args.momentum == 1 else most


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(v * v for v in values))
