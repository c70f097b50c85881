"""Frozen layers cut over processes: what each holds, and that nothing else changes. Two that train: test_two_processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import SHAPES
from peft import PeftModel
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from loramox import Data, ReferenceConfig, UnlearnConfig, add_lora, load_reference
from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns
from loramox.errors import ModelError, SettingsError
from loramox.extras.plan.job import fit
from loramox.model.config import check_device
from loramox.model.lora import adapter_off, at_scale, lora_layers
from loramox.model.sharding import is_sharded, shard
from loramox.run import RunConfig
from loramox.train.prepare import prepare


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_of_two_processes_each_holds_half_of_every_layer_and_all_of_the_rest(
    pico: Callable[[str], Path], quantization: str
) -> None:
    model = adapted(pico("llama"), quantization)
    whole = {name: p.numel() for name, p in model.named_parameters()}
    with processes("fake", 2):
        shard(model, torch.device("cpu"))
        assert is_sharded(model)
        held = {name: of_this_process(p).numel() for name, p in model.named_parameters()}
    assert held.keys() == whole.keys()
    for name, size in whole.items():
        frozen = ".layers." in name and "lora_" not in name
        assert held[name] == (size // 2 if frozen else size), name


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_model_that_is_cut_computes_what_it_did(pico: Callable[[str], Path], kind: str, quantization: str) -> None:
    model, cut = (adapted(pico(kind), quantization) for _ in range(2))
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    with processes("gloo", 1):
        shard(cut, torch.device("cpu"))
        for each in (model, cut):
            each.train()
            with torch.no_grad(), adapter_off(each):
                reference = each(ids).logits
            with at_scale(each, -3.0):
                loss = each(ids, labels=ids).loss
                loss.backward()
            found.append([reference, loss.detach(), *(p.grad for p in each.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert any(gradient.abs().max() > 0 for gradient in found[1][2:])


def test_a_model_whose_layers_cannot_be_told_is_named(pico: Callable[[str], Path]) -> None:
    model = adapted(pico("llama"), "none")
    model.config.num_hidden_layers += 1
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no list of its 3 layers.*Say --shard false"):
        shard(model, torch.device("cpu"))


def test_what_cannot_be_cut_is_refused_before_anything_is_loaded(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, data = ReferenceConfig(str(pico("llama")), shard=True), Data(*map(str, rows))
    plain = UnlearnConfig(use_cpu=True)
    rmu = UnlearnConfig(use_cpu=True, method="rmu")
    with pytest.raises(SettingsError, match=r"over several processes, and this is one.*torchrun"):
        prepare(reference, data, plain, Columns(), Tokenisation())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="--method rmu steers a layer in the middle"):
        prepare(reference, data, rmu, Columns(), Tokenisation())
    with pytest.raises(SettingsError, match=r"8-bit weights cannot be cut.*nf4 or none"):
        check_device(ReferenceConfig("m", quantization="int8", shard=True), use_cpu=True)
    with pytest.raises(SettingsError, match="--fit counts the whole model in each process"):
        fit("1GB", RunConfig(str(tmp_path)), reference, data, plain, Columns(), Tokenisation())


def adapted(base: Path, quantization: str) -> PeftModel:
    """With a ΔW that is not 0."""
    config = ReferenceConfig(str(base), quantization=quantization, r=4, shard=True)
    torch.manual_seed(0)
    model = add_lora(load_reference(config), config)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model


def of_this_process(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@contextmanager
def processes(backend: str, count: int) -> Iterator[None]:
    """This process as the first of so many."""
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, rank=0, world_size=count, store=store)
    try:
        yield
    finally:
        dist.destroy_process_group()
