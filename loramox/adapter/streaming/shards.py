"""Read and write safetensors files piece by piece, so that a file of any size needs only a few MB of memory.

The format: 8 bytes with the header's length (little-endian), the header (JSON: each tensor's dtype, shape and place), and the
tensors' bytes. Files are read with plain reads: pages of a memory map would count as this process's memory.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from loramox.errors import ModelError

# What is in memory at a time, in numbers: 4 MB of them in fp32.
BLOCK = 1 << 20

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {dtype: code for code, dtype in FLOATS.items()}


class Entry(NamedTuple):
    """One tensor of a file: its dtype in the format's own words, and the place of its bytes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.end - self.start


class Shard(NamedTuple):
    """One safetensors file: its tensors in the order of their bytes, and the notes in its header."""

    path: Path
    entries: list[Entry]
    metadata: dict[str, str]


def read_shard(path: Path) -> Shard:
    """The header of a safetensors file that `check_weights` or `read_header` found whole; none of its tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    entries = [
        Entry(name, each["dtype"], tuple(each["shape"]), *(8 + length + place for place in each["data_offsets"]))
        for name, each in header.items()
    ]
    return Shard(path, sorted(entries, key=lambda e: (e.start, e.end)), metadata)


def write_header(file: BinaryIO, entries: Sequence[Entry], dtypes: Sequence[str], metadata: dict[str, str]) -> None:
    """Write the header of a file in which `entries` follow in this order, in `dtypes`; their bytes come next."""
    header: dict = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry, dtype in zip(entries, dtypes, strict=True):
        start, end = end, end + size_in(entry, dtype)
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)


def size_in(entry: Entry, dtype: str) -> int:
    """Bytes of a tensor in `dtype`."""
    return entry.bytes if dtype == entry.dtype else entry.numbers * FLOATS[dtype].itemsize


def read_rows(file: BinaryIO, entry: Entry, width: int) -> Iterator[Tensor]:
    """A tensor of floats as [rows, width] blocks of at most `BLOCK` numbers (a row at least), in its own dtype."""
    dtype, left = FLOATS[entry.dtype], entry.numbers
    file.seek(entry.start)
    while left:
        numbers = min(left, max(1, BLOCK // width) * width)
        yield torch.frombuffer(_read(file, numbers * dtype.itemsize), dtype=dtype).view(-1, width)
        left -= numbers


def read_values(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file that has only floats, by name, in parts of at most `BLOCK` numbers."""
    with path.open("rb") as file:
        for entry in read_shard(path).entries:
            for block in read_rows(file, entry, 1):
                yield entry.name, block


def copy_bytes(source: BinaryIO, entry: Entry, to: BinaryIO) -> None:
    """A tensor's bytes as they are."""
    source.seek(entry.start)
    left = entry.bytes
    while left:
        size = min(left, 4 * BLOCK)
        to.write(_read(source, size))
        left -= size


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _read(file: BinaryIO, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) != size:  # type: ignore[attr-defined]
        raise ModelError(f"{file.name} ended before its last tensor: it was changed while it was read. Merge again")
    return data
