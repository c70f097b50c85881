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


def sums_of(change: Tensor, delta: Tensor) -> Tensor:
    """⟨D, ΔW⟩, ‖ΔW‖², ‖D − ΔW‖² and ‖D‖², one after the other: a layer's products are large. `change`, D, is overwritten."""
    along, norm, changed = (
        (a * b).sum(dtype=torch.float64) for a, b in ((change, delta), (delta, delta), (change, change))
    )
    return torch.stack([along, norm, change.sub_(delta).square_().sum(dtype=torch.float64), changed]).cpu()


def shares_of(sums: Tensor) -> dict[str, float]:
    """Of a change D, "share": ⟨D, ΔW⟩ / ‖ΔW‖², 1 when all of ΔW is there, also where it is 0; "rounding": ‖D − ΔW‖ / ‖ΔW‖, the
    noise on top of it.
    """
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
    """Write every file under its own name to `folder`, floats in the dtype `code` (None: each in its own).

    Returns how much of ΔW the weights hold, `shares_of` D = round(W + ΔW) − W over all layers and for each dtype of the output:
    {"overall": share, "rounding": …, "float32": {"share": …, "rounding": …}, …}.

    Where W lies on the output's grid, a ΔW much smaller than a step of it is rounded away, and the share is near 0. Where W has
    more bits than the output (float32 into bfloat16), W is rounded too, ΔW is kept on average, and the share is near 1 however
    small ΔW is; the noise is then W's own, as it is in the base at that dtype. Raises `ModelError` where a weight overflows.
    """
    survived: dict[str, Tensor] = {}  # sums by dtype
    total = sum(entry.bytes for shard in shards for entry in shard.entries)
    with tqdm(total=total, desc="Merging", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        for shard in shards:
            with shard.path.open("rb") as source, (folder / shard.path.name).open("wb") as to:
                write_header(to, shard.entries, [code_in(e, code) for e in shard.entries], shard.metadata)
                for entry in shard.entries:
                    _write_one(source, entry, changed.get(entry.name), code_in(entry, code), to, survived)
                    bar.update(entry.bytes)
            with safe_open(folder / shard.path.name, "pt"):  # it is whole, and in the format
                pass
    whole = shares_of(sum(survived.values()))
    each = {dtype: shares_of(sums) for dtype, sums in survived.items()}
    return {"overall": whole["share"], "rounding": whole["rounding"], **each}


@torch.no_grad()
def _write_one(
    source: BinaryIO, entry: Entry, target: Target | None, code: str, to: BinaryIO, survived: dict[str, Tensor]
) -> None:
    """W copied, or cast, or W + ΔW: in rows of the file, ΔW[rows] = B[rows]·A, and for a transposed W (Aᵀ)[rows]·Bᵀ.

    `survived` has the `sums_of` all changed weights so far, by their dtype in the output; those of this tensor are added.
    """
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
        survived[dtype] = survived.get(dtype, 0) + sums_of(new.float() - old, delta)
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
