"""Record every allocation and operation of code that runs on tensors without data: memory at each moment, and time.

Tensors of floats are fake (torch's `FakeTensorMode`: shapes and types, no memory), so that a model of any size runs; tensors
of integers and truth values are real, so that code whose shapes depend on them (which tokens are answers) runs as it is.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import bitsandbytes  # noqa: F401 (makes its operations known to torch)
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

# CUDA's allocator gives memory in pieces of this many bytes.
CUDA_PIECE = 512


class Speed(NamedTuple):
    """What a device does in a second, and where the numbers are from."""

    flops: float  # of matrix products
    bytes: float  # read and written in memory
    source: str


class Section(NamedTuple):
    """A stretch of the program, and what was held at its fullest, in bytes by purpose."""

    name: str
    held: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.held.values())


class Recorder(TorchDispatchMode):
    """Within it and a `FakeTensorMode`, counts what is allocated, under the `purpose` that is set at the time.

    `sections` are what was held at the fullest moment of each stretch since `section` was called. `seconds` is the sum over
    operations of max(FLOPs / speed.flops, bytes read and written / speed.bytes), as in eager mode each reads and writes memory;
    `flops` is that of the matrix products and attention.

    Of an operation only its inputs and outputs are seen, not what it allocates inside and frees again.
    """

    def __init__(self, speed: Speed) -> None:
        super().__init__()
        self.speed, self.purpose = speed, "activations"
        self.seconds = self.flops = 0.0
        self.now: Counter[str] = Counter()
        self.sections: list[Section] = []
        self._storages: dict[int, list[Any]] = {}  # by address: purpose, bytes, weak reference

    def section(self, name: str, purpose: str = "activations") -> None:
        self.purpose = purpose
        self.sections.append(Section(name, dict(self.now)))

    def belongs(self, purpose: str, *tensors: Tensor) -> None:
        """Count these tensors under `purpose`, whatever they were allocated for."""
        for tensor in tensors:
            self._hold(tensor, purpose)
            entry = self._storages[tensor.untyped_storage()._cdata]
            self.now[entry[0]] -= entry[1]
            self.now[purpose] += entry[1]
            entry[0] = purpose

    def restart(self) -> None:
        """Forget the sections and the time so far; what is held stays."""
        self.sections.clear()
        self.seconds = self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if func._overloadpacket is torch.ops.bitsandbytes.gemm_4bit:
            # Where it has no kernel for a shape, it makes the whole weight in the type of its input, and drops it again.
            self._hold(args[0].new_empty(args[2]), "activations")
        out = _without_contents(func, given, args, kwargs)
        made = list(_tensors([out]))
        for tensor in made:
            self._hold(tensor, self.purpose)
        self._time(func, given, made, args, kwargs, out)
        return out

    def _hold(self, tensor: Tensor, purpose: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        size = storage.nbytes()
        if tensor.device.type == "cuda":
            size = math.ceil(size / CUDA_PIECE) * CUDA_PIECE
        gone = weakref.ref(storage, lambda _: self._release(address))
        self._storages[address] = [purpose, size, gone]
        self.now[purpose] += size
        if self.sections and sum(self.now.values()) > self.sections[-1].total:
            self.sections[-1] = Section(self.sections[-1].name, dict(self.now))

    def _release(self, address: int) -> None:
        purpose, size, _ = self._storages.pop(address)
        self.now[purpose] -= size

    def _time(self, func: Any, given: list[Tensor], made: list[Tensor], args: Any, kwargs: Any, out: Any) -> None:
        before = {t.untyped_storage()._cdata for t in given}
        if not func._schema.is_mutable and all(t.untyped_storage()._cdata in before for t in made):
            return  # a view
        count = FLOPS.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        traffic = sum(t.numel() * t.element_size() for t in {id(t): t for t in [*given, *made]}.values())
        self.flops += flops
        self.seconds += max(flops / self.speed.flops, traffic / self.speed.bytes)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results: alone or in lists (pytree would take longer than the operation)."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _without_contents(func: Any, given: list[Tensor], args: Any, kwargs: Any) -> Any:
    """The operation's result: real where everything given is, else fake; contents that fake floats do not have are taken as 0."""
    fake = any(isinstance(t, FakeTensor) for t in given)
    packet = func._overloadpacket
    if fake and packet is aten._local_scalar_dense:
        return 0.0
    if fake and packet is aten.equal:
        return False
    if fake and packet is aten.index:
        args = (args[0], _as_numbers(args[1]), *args[2:])
    if not given or fake:
        out = func(*args, **kwargs)
        if fake or any(t.is_floating_point() for t in _tensors([out])):
            return out
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as the positions that they stand for: how many those are is not known of a fake tensor."""
    with unset_fake_temporarily():
        parts = [i.nonzero().unbind(1) if i is not None and i.dtype is torch.bool else (i,) for i in indices]
    return [i for part in parts for i in part]


# torch's own counts of matrix products and attention, with those that it lacks.
FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
    torch.ops.bitsandbytes.gemm_4bit: lambda x, weight, shape, *_, **__: 2 * x.numel() * shape[0],
}
