"""Write the weights of a merge: copy each tensor, cast it, or change it to W + ΔW, a few rows at a time."""

import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from loramox.adapter.streaming.checkpoint import INDEX, SINGLE, Target
from loramox.adapter.streaming.shards import (
    FLOATS,
    Entry,
    Shard,
    copy_bytes,
    read_rows,
    size_in,
    write_header,
    write_tensor,
)
from loramox.errors import ModelError
from loramox.files import read_json, write_json


class Survival:
    """How much of ΔW the weights hold after rounding, summed over layers and kept for each dtype of the output.

    share     ⟨round(W + ΔW) − W, ΔW⟩ / ‖ΔW‖²          1 when all of it is there
    rounding  ‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖         noise on top of it

    Where W lies on the output's grid, a ΔW much smaller than a step of it is rounded away, and the share is near 0. Where W has
    more bits than the output (float32 into bfloat16), W is rounded too, ΔW is kept on average, and the share is near 1 however
    small ΔW is; the noise is then W's own, as it is in the base at that dtype.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, dtype: str, old: Tensor, delta: Tensor, new: Tensor) -> None:
        """Count some of the weights: W, ΔW and round(W + ΔW), all in fp32 and of one shape."""
        self._sums[dtype] = self._sums.get(dtype, 0) + sums_of(new - old, delta)

    def shares(self) -> dict[str, Any]:
        """{"overall": share, "rounding": …, "float32": {"share": …, "rounding": …}, …}."""
        total = shares_of(sum(self._sums.values()))
        each = {dtype: shares_of(sums) for dtype, sums in self._sums.items()}
        return {"overall": total["share"], "rounding": total["rounding"], **each}


def sums_of(change: Tensor, delta: Tensor) -> Tensor:
    """⟨D, ΔW⟩, ‖ΔW‖², ‖D − ΔW‖² and ‖D‖², one after the other: a layer's products are large. `change`, D, is overwritten."""
    along, norm, changed = (
        (a * b).sum(dtype=torch.float64) for a, b in ((change, delta), (delta, delta), (change, change))
    )
    return torch.stack([along, norm, change.sub_(delta).square_().sum(dtype=torch.float64), changed]).cpu()


def shares_of(sums: Tensor) -> dict[str, float]:
    """{"share": ⟨D, ΔW⟩ / ‖ΔW‖², "rounding": ‖D − ΔW‖ / ‖ΔW‖}; all of ΔW where it is 0."""
    along, norm, lost, _ = sums.tolist()
    return {"share": along / norm, "rounding": math.sqrt(lost / norm)} if norm else {"share": 1.0, "rounding": 0.0}


def code_in(entry: Entry, code: str | None) -> str:
    """The dtype in which a tensor is written, in the format's words: `code` if it is of floats and one is given, else its own."""
    return code if code and entry.dtype in FLOATS else entry.dtype


def size(shards: list[Shard], code: str | None) -> int:
    """Bytes of all tensors when floats are written in the dtype `code`."""
    return sum(size_in(entry, code_in(entry, code)) for shard in shards for entry in shard.entries)


def write_index(folder: Path, shards: list[Shard], code: str | None, to: Path) -> None:
    """Which tensor is in which file, where the model in `folder` has several."""
    if shards[0].path.name != SINGLE:
        index = read_json(folder / INDEX, dict)
        index["metadata"] = (index.get("metadata") or {}) | {"total_size": size(shards, code)}
        write_json(to / INDEX, index)


def write_shards(
    shards: list[Shard], changed: dict[str, Target], code: str | None, folder: Path, progress: bool
) -> dict[str, Any]:
    """Write every file under its own name to `folder`, floats in the dtype `code` (None: each in its own); return what survived.

    Raises `ModelError` for a weight that overflows.
    """
    survival = Survival()
    total = sum(entry.bytes for shard in shards for entry in shard.entries)
    with tqdm(total=total, desc="Merging", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        for shard in shards:
            with shard.path.open("rb") as source, (folder / shard.path.name).open("wb") as to:
                write_header(to, shard.entries, [code_in(e, code) for e in shard.entries], shard.metadata)
                for entry in shard.entries:
                    _write_one(source, entry, changed.get(entry.name), code_in(entry, code), to, survival)
                    bar.update(entry.bytes)
            with safe_open(folder / shard.path.name, "pt"):  # it is whole, and in the format
                pass
    return survival.shares()


@torch.no_grad()
def _write_one(
    source: BinaryIO, entry: Entry, target: Target | None, code: str, to: BinaryIO, survival: Survival
) -> None:
    """W copied, or cast, or W + ΔW: in rows of the file, ΔW[rows] = B[rows]·A, and for a transposed W (Aᵀ)[rows]·Bᵀ."""
    if target is None and code == entry.dtype:
        copy_bytes(source, entry, to)
        return
    if target is None:
        for block in read_rows(source, entry, 1):
            write_tensor(to, _cast(block, block, code, entry.name))
        return
    A, B = target.factors
    left, right = (A.T, B.T) if target.transposed else (B, A)
    row, dtype = 0, str(FLOATS[code]).removeprefix("torch.")
    for block in read_rows(source, entry, entry.shape[1]):
        old, delta = block.float(), left[row : row + len(block)] @ right
        new = _cast(old + delta, old, code, entry.name)
        survival.add(dtype, old, delta, new.float())
        write_tensor(to, new)
        row += len(block)


def _cast(exact: Tensor, old: Tensor, code: str, name: str) -> Tensor:
    """`exact` rounded to the dtype. Raises `ModelError` where a finite weight of the base becomes infinite."""
    result = exact.to(FLOATS[code])
    if not torch.isfinite(result).all() and (~torch.isfinite(result) & torch.isfinite(old)).any():
        raise ModelError(
            f"{name} overflows in {FLOATS[code]}. Merge with --dtype bfloat16 or float32, or a lower --scale"
        )
    return result
