"""A device that is none: its tensors are on the CPU and say that they are elsewhere, so that mixing the two fails as on a GPU.

    python tests/pretended_device.py {cpu,pretended} BASE FORGET RETAIN OUT      writes OUT: what training and asking gave

A process of its own, as torch has one place for such a device and keeps it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from loramox import (
    ReferenceConfig,
    Tokenisation,
    UnlearnConfig,
    UnlearnTrainer,
    add_lora,
    encode,
    load_reference,
    read_rows,
)
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.model.config import read_config, read_tokenizer
from loramox.model.lora import at_scale

NAME = "pretended"
CROSSING = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_")  # take tensors of both, on a GPU too


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on the pretended device; `held` is where it really is."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> "Elsewhere":
        return Elsewhere(self.held)

    @data.setter
    def data(self, other: "Elsewhere") -> None:
        self.held = other.held

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(op, *args, **(kwargs or {}))


def computed(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on held tensors. Raises, as CUDA does, where one of several is on the CPU and is no single number."""
    given = _pytree.tree_leaves((args, kwargs))
    there = {id(t.held): t for t in given if isinstance(t, Elsewhere)}
    here = [t for t in given if isinstance(t, torch.Tensor) and not isinstance(t, Elsewhere) and t.dim()]
    if here and there and op._schema.name not in CROSSING:
        raise RuntimeError(f"{op._schema.name}: expected all tensors to be on the same device, found {NAME} and cpu")

    def hold(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else getattr(value, "held", value)

    found = op(*_pytree.tree_map(hold, args), **_pytree.tree_map(hold, kwargs))
    to_cpu = any(isinstance(value, torch.device) and value.type == "cpu" for value in given)
    if to_cpu or (op._schema.name == "aten::copy_" and not isinstance(args[0], Elsewhere)):
        return found
    return _pytree.tree_map_only(torch.Tensor, lambda t: there[id(t)] if id(t) in there else Elsewhere(t), found)


def as_torch_does() -> None:
    """What torch does in C++ with devices that it knows."""
    tensor, item, tolist = torch.tensor, torch.Tensor.__getitem__, torch.Tensor.tolist

    def made(data: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return tensor(data, **kwargs) if device is None else tensor(data, **kwargs).to(device)

    def at(self: torch.Tensor, where: Any) -> torch.Tensor:
        if isinstance(self, Elsewhere):
            where = where if isinstance(where, tuple) else (where,)
            where = tuple(tensor(w).to(NAME) if isinstance(w, list) else w for w in where)
        return item(self, where)

    torch.tensor, torch.Tensor.__getitem__ = made, at
    torch.Tensor.tolist = lambda self: tolist(getattr(self, "held", self))


class Device:
    """What torch and accelerate ask of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def nothing(*_: Any) -> None:
        """Seeds, streams, caches: there are none."""

    set_device = synchronize = manual_seed = manual_seed_all = set_rng_state = empty_cache = nothing
    get_rng_state = staticmethod(torch.get_rng_state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:  # autograd's thread for the device ends the process without it
        return [torch.float32, torch.bfloat16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False


def pretend() -> Any:
    """The device, from here on."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    _setup_privateuseone_for_python_backend(NAME, Device())
    library = torch.library.Library("_", "IMPL")
    library.fallback(computed, dispatch_key="PrivateUse1")
    as_torch_does()
    return library


def main(device: str, base: str, forget: str, retain: str, out: str) -> None:
    reference = ReferenceConfig(base, quantization="none", r=4, lora_alpha=8)
    tokenizer, context = read_tokenizer(reference), read_config(reference).max_position_embeddings
    torch.manual_seed(0)
    model = add_lora(load_reference(reference), reference)
    kept = pretend() if device == NAME else None
    rows = {"forget": read_rows(forget), "retain": read_rows(retain)}
    args = UnlearnConfig(
        str(Path(out).parent / "training"), use_cpu=not kept, num_train_epochs=3, optim="sgd", learning_rate=0.3, warmup_steps=0,
        alpha=2.0, per_device_train_batch_size=2, gradient_accumulation_steps=2, activation_checkpointing=True,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    examples = [encode(some, tokenizer, Tokenisation(), context) for some in rows.values()]
    trainer = UnlearnTrainer(model, args, *examples, tokenizer)
    trainer.train()
    on = {parameter.device.type for parameter in model.parameters()}
    questions = Questions(rows, tokenizer, Tokenisation(), context, ScoringConfig(max_new_tokens=4))
    with model.disable_adapter():
        questions.remember_reference(model)
    with at_scale(model, -2.0):
        records = questions.ask(model.eval())
    log = [{k: v for k, v in entry.items() if "loss" in k or "kl" in k} for entry in trainer.state.log_history]
    Path(out).parent.mkdir(exist_ok=True)
    Path(out).write_text(json.dumps({"on": sorted(on), "log": log, "records": records}))


if __name__ == "__main__":
    main(*sys.argv[1:])
