"""Whatever is done to an adapter's files: it is refused by an error of loramox, or does what PEFT makes of it."""

import copy
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from signing import sign
from test_merge import adapter_for, logits
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from loramox.adapter.export import extrapolate
from loramox.adapter.factors import read_factors
from loramox.adapter.loading import check_whole, put_on
from loramox.adapter.provenance import read_provenance
from loramox.errors import AdapterError, LoramoxError
from loramox.extras.check.check import check
from loramox.extras.merge.merge import MergeConfig, merge_into_floats
from loramox.model.config import ModelConfig, read_config, skeleton

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "provenance.json"
SETTINGS = sorted(each.name for each in fields(LoraConfig))
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 8, 16, 0.5, 1e308, 10**30, "", "x", "none", "all", "gaussian", "pissa", "olora", "eva", "q_proj",
    "all-linear", ".*", ".*(q|v)_proj", "(", [], {}, ["q_proj"], ["q_proj", "v_proj", 3], [[0, 1], [0, 2]], [0], [1, 2],
    {"q_proj": 4}, {"q_proj": "4"}, {"(": 4}, {"": None}, "CAUSAL_LM", "LORA", "\u001b[31m", [[[[[[[[]]]]]]]],
]  # fmt: skip
# (file, key or position, value, whether provenance.json is signed anew)
MUTATIONS = st.one_of(
    st.tuples(st.just(CONFIG), st.sampled_from(SETTINGS), st.sampled_from(VALUES), st.just(False)),
    st.tuples(
        st.just(PROVENANCE),
        st.sampled_from(["kind", "alpha", "base", "data", "momentum", "settings", "command", "method", "sha256", "rank", "scale"]),
        st.sampled_from(VALUES),
        st.just(False),
    ),
    st.tuples(st.just(WEIGHTS), st.integers(0, 6000), st.integers(0, 255), st.booleans()),
    st.tuples(st.sampled_from([CONFIG, PROVENANCE, WEIGHTS]), st.just("cut"), st.integers(0, 6000), st.booleans()),
)  # fmt: skip


class World:
    """The pico Llama, in memory once, and a forget adapter for it."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.adapter = adapter_for(base, folder / "adapter", size=1)
        self.base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
        self.model = ModelConfig(str(base), quantization="none")
        self.config = read_config(self.model)

    def by_peft(self, folder: Path) -> Tensor:
        return logits(PeftModel.from_pretrained(copy.deepcopy(self.base), folder))

    def merged(self, folder: Path) -> Tensor:
        model = copy.deepcopy(self.base)
        for name, factors in read_factors(folder)[0].items():
            model.get_submodule(name).weight.data.add_(factors.delta())
        return logits(model)


@pytest.fixture(scope="module")
def world(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(pico("llama"), tmp_path_factory.mktemp("mutated"))


def mutate(folder: Path, file: str, where: Any, value: Any) -> None:
    path = folder / file
    if where == "cut":
        path.write_bytes(path.read_bytes()[:value])
    elif file == WEIGHTS:
        content = bytearray(path.read_bytes())
        content[where] = value
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {where: value}))


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(mutation=MUTATIONS)
@example((CONFIG, "exclude_modules", ["q_proj"], False))
@example((CONFIG, "target_modules", ["q_proj"], False))
@example((CONFIG, "layer_replication", [[0, 1], [0, 2]], False))
@example((CONFIG, "init_lora_weights", "pissa", False))
@example((CONFIG, "init_lora_weights", "olora", False))
@example((CONFIG, "alora_invocation_tokens", [1, 2], False))
@example((CONFIG, "modules_to_save", 1, False))
@example((CONFIG, "modules_to_save", "CAUSAL_LM", False))
@example((CONFIG, "r", 16, False))
@example((CONFIG, "r", 0, False))
@example((CONFIG, "lora_alpha", "x", False))
@example((CONFIG, "alpha_pattern", False, False))
@example((PROVENANCE, "momentum", [], False))
@example((PROVENANCE, "data", {"forget": 3}, False))
def test_a_mutated_adapter_is_refused_or_is_what_peft_makes_of_it(
    world: World, mutation: tuple[str, Any, Any, bool]
) -> None:
    *change, signed = mutation
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = shutil.copytree(world.adapter, Path(folder) / "adapter")
        mutate(adapter, *change)
        if signed and change[0] == WEIGHTS:
            sign(adapter)
        check(adapter, world.model.model)  # never raises
        with suppress(LoramoxError):
            read_provenance(adapter, "forget")
        try:
            check_whole(adapter, skeleton(world.config, world.model))
        except LoramoxError:
            return
        expected = world.by_peft(adapter)
        torch.testing.assert_close(logits(put_on(copy.deepcopy(world.base), adapter)), expected, rtol=0, atol=1e-5)
        try:
            merged = world.merged(adapter)
        except LoramoxError:
            return
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def odd(make: Callable[[Path], Any], file: str = WEIGHTS) -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def replace(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return replace


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: [mutate(folder, CONFIG, name, value) for name, value in changes.items()]


HANGS = {
    "a pipe": odd(os.mkfifo),
    "a pipe for a config": odd(os.mkfifo, CONFIG),
    "a pipe for a provenance": odd(os.mkfifo, PROVENANCE),
    "endless weights": odd(lambda path: path.symlink_to("/dev/zero")),
    "endless provenance": odd(lambda path: path.symlink_to("/dev/zero"), PROVENANCE),
    "random weights": odd(lambda path: path.symlink_to("/dev/random")),
    "deep provenance": lambda folder: (folder / PROVENANCE).write_text("[" * 200_000),
    "deep config": lambda folder: (folder / CONFIG).write_text('{"a":' * 200_000),
    "a large provenance": odd(lambda path: path.open("wb").truncate(2 << 30), PROVENANCE),
    "a pattern without an end": configured(target_modules=r"(([a-z._0-9])+)+$x"),
    "another": configured(exclude_modules=r"(a|a|[a-z._0-9])*!", rank_pattern={r"([a-z._0-9]+)+!": 8}),
    "another for the scale": configured(alpha_pattern={r"((m|[a-z._0-9])+)+!": 8}),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such files")
@pytest.mark.parametrize("name", HANGS)
def test_nothing_hangs_or_fills_the_memory(name: str, world: World, tmp_path: Path) -> None:
    adapter = shutil.copytree(world.adapter, tmp_path / "adapter")
    HANGS[name](adapter)
    began = time.monotonic()
    for use in (
        lambda: merge_into_floats(MergeConfig(str(adapter), str(tmp_path / "out")), progress=False),
        lambda: extrapolate(adapter, tmp_path / "out", 1.0),
        lambda: check_whole(adapter, skeleton(world.config, world.model)),
    ):
        try:
            use()
        except LoramoxError:
            assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    check(adapter, world.model.model)
    assert time.monotonic() - began < 60


def test_weights_that_were_changed_are_refused_with_the_remedy(world: World, tmp_path: Path) -> None:
    adapter = shutil.copytree(world.adapter, tmp_path / "adapter")
    size = (adapter / WEIGHTS).stat().st_size
    mutate(adapter, WEIGHTS, size - 3, (adapter / WEIGHTS).read_bytes()[-3] ^ 0x80)
    for use in (read_factors, lambda folder: check_whole(folder, skeleton(world.config, world.model))):
        with pytest.raises(
            AdapterError, match=r"is not the file that provenance.json was written for.*loramox extrapolate"
        ):
            use(adapter)
    sign(adapter)
    read_factors(adapter)
