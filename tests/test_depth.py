"""The unlearning depth score: by hand, on models whose layers are known, and as `loramox evaluate` gives it."""

import copy
import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPES
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import loramox.evaluate.depth
import loramox.evaluate.evaluate
from loramox.cli import main
from loramox.data.encode import IGNORED, Tokenisation
from loramox.data.pairs import Collator
from loramox.errors import SettingsError
from loramox.evaluate.asked import Asked
from loramox.evaluate.depth import NAME, Depth, DepthConfig, Gaps
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.records import read_records
from loramox.evaluate.subject import Subject
from loramox.model.config import ModelConfig
from loramox.model.patching import patched_pass
from loramox.model.sharding import layers_of

# The formula


def test_the_score_is_the_share_of_the_gap_that_is_erased_weighted_by_the_gap() -> None:
    gaps = Gaps(
        retrained=np.array([[0.04, 1.0, 3.0], [0.05, -1.0, 0.0], [0.1, 0.2, 0.2]]),
        forget=np.array([[9.0, 0.5, -1.0], [1.0, 1.0, 1.0], [0.1, 0.3, 0.1]]),
    )
    # Row 1: layer 1 is no layer of K; (1 · 0.5 + 3 · 0) / 4. Row 2 has none. Row 3: (0.1 · 1 + 0.2 · 1 + 0.2 · 0.5) / 0.5.
    assert gaps.depth() == pytest.approx([0.125, np.nan, 0.8], nan_ok=True)
    assert gaps.by_layer() == [
        {"layer": 1, "rows": 1, "retrained": pytest.approx(0.19 / 3), "forget": pytest.approx(10.1 / 3), "erased": 1.0},
        {"layer": 2, "rows": 2, "retrained": pytest.approx(0.2 / 3), "forget": pytest.approx(0.6), "erased": 0.75},
        {"layer": 3, "rows": 2, "retrained": pytest.approx(3.2 / 3), "forget": pytest.approx(0.1 / 3), "erased": 0.25},
    ]


def test_a_layer_that_no_row_has_in_k_has_no_share_erased() -> None:
    assert Gaps(np.array([[0.0, 1.0]]), np.array([[2.0, 2.0]])).by_layer()[0]["erased"] is None


# The patch


def other_layers(model: nn.Module, upto: int = 99) -> Any:
    """A copy of the model whose first layers have other weights."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    for layer in layers_of(other)[:upto]:
        for weight in layer.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return other


@pytest.fixture
def batch(examples) -> dict[str, Any]:
    return Collator(0)(examples[0])


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_where_all_positions_are_patched_the_model_goes_on_from_the_others_layers(
    kind: str, pico: Callable[[str], Path], batch: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico(kind)).eval()
    everywhere = batch["attention_mask"].bool()
    for number in range(2):
        other, mixed = other_layers(model), other_layers(model, upto=number + 1)
        _, states = patched_pass(other, batch, everywhere)
        patched, _ = patched_pass(model, batch, everywhere, number, states[number])
        assert patched == pytest.approx(patched_pass(mixed, batch, everywhere)[0], abs=1e-5)
        assert patched != pytest.approx(patched_pass(model, batch, everywhere)[0], abs=1e-3)


@torch.no_grad()
def test_only_the_positions_that_predict_the_answer_are_patched(
    pico: Callable[[str], Path], batch: dict[str, Any]
) -> None:
    """After the last layer nothing but the head follows: the answer is as probable as by the other model's own states there."""
    model = AutoModelForCausalLM.from_pretrained(pico("llama")).eval()
    other = other_layers(model)
    at = nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    _, states = patched_pass(other, batch, at)
    assert [len(h) for h in states] == [int(at.sum())] * 2
    patched, seen = patched_pass(model, batch, at, 1, states[1])
    assert patched == pytest.approx(patched_pass(other, batch, at)[0], abs=1e-5)
    assert (seen[1] == states[1]).all()
    prompts = batch["attention_mask"].bool() & ~at
    assert torch.equal(*(patched_pass(m, batch, prompts)[1][1] for m in (model, copy.deepcopy(model))))
    # A model's own states change nothing.
    known, own = patched_pass(model, batch, at)
    assert all(torch.equal(known, patched_pass(model, batch, at, i, h)[0]) for i, h in enumerate(own))


# The command


ROWS = {"forget": "forget.jsonl", "retain": "retain.jsonl"}
SILENT = ScoringConfig(max_new_tokens=0, use_cpu=True)


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: tuple[Path, Path], pico: Callable[[str], Path],
    trained: Path, tokenizer: PreTrainedTokenizerFast,
) -> Path:  # fmt: skip
    """A folder with the rows, `adapter`, and `retrained`: the model that this adapter makes."""
    monkeypatch.chdir(tmp_path)
    for path in rows:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "adapter").symlink_to(trained / "forget-adapter")
    base = AutoModelForCausalLM.from_pretrained(pico("llama"))
    PeftModel.from_pretrained(base, "adapter").merge_and_unload().save_pretrained("retrained")
    tokenizer.save_pretrained("retrained")
    return tmp_path


@pytest.fixture
def model(pico: Callable[[str], Path]) -> ModelConfig:
    return ModelConfig(str(pico("llama")), quantization="none")


def depth(model: ModelConfig, out: str = "out", scoring: ScoringConfig = SILENT, **subject: Any) -> dict[str, Any]:
    config = DepthConfig(depth=True, retrained_model="retrained")
    return evaluate(Subject(out, **{"adapter": "adapter"} | subject), model, Asked(**ROWS), scoring, depth=config)


def test_a_forget_model_that_is_the_retrained_one_has_1_and_one_that_is_the_reference_has_0(
    here: Path, model: ModelConfig
) -> None:
    same = depth(model)
    assert same["metrics"][NAME]["value"] == pytest.approx(1, abs=1e-4)
    assert same["metrics"][NAME]["n"] == 4
    assert [layer["erased"] for layer in same["depth"]["layers"]] == pytest.approx([1, 1], abs=1e-4)
    assert [r[NAME] for r in read_records(here / "out") if r["part"] == "forget"] == pytest.approx([1] * 4, abs=1e-4)
    assert not any(NAME in r for r in read_records(here / "out") if r["part"] != "forget")
    off = depth(model, "off", scale=0.0)
    assert off["metrics"][NAME]["value"] == 0
    assert [layer["forget"] for layer in off["depth"]["layers"]] == [0, 0]
    assert [layer["retrained"] for layer in off["depth"]["layers"]] == pytest.approx(
        [layer["retrained"] for layer in same["depth"]["layers"]]
    )
    half = depth(model, "half", scale=0.5)
    assert 0 < half["metrics"][NAME]["value"] < 1


def test_the_longest_rows_come_first_so_that_too_large_a_batch_fails_at_once(
    here: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, patched = [], patched_pass

    def watched(of: nn.Module, batch: dict[str, Any], *more: Any) -> Any:
        lengths.append(batch["input_ids"].shape[1])
        return patched(of, batch, *more)

    monkeypatch.setattr(loramox.evaluate.depth, "patched_pass", watched)
    depth(model, scoring=ScoringConfig(1, 0, use_cpu=True))
    for part in (lengths[:4], lengths[4:]):  # of the retrained model, then of both
        assert part == sorted(part, reverse=True)
        assert part[0] > part[-1]


def test_the_score_does_not_depend_on_the_batch(here: Path, model: ModelConfig) -> None:
    found = [
        depth(model, f"of {size}", ScoringConfig(size, 0, use_cpu=True), scale=0.5)["depth"]["layers"]
        for size in (1, 3, 32)
    ]
    for layers in found[1:]:
        for one, other in zip(found[0], layers, strict=True):
            assert other == pytest.approx(one, abs=1e-4)


def test_the_token_that_ends_an_answer_does_not_count(
    here: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    pass_of = loramox.evaluate.depth.patched_pass

    def watched(model: nn.Module, batch: dict[str, Any], *rest: Any) -> Any:
        scored.append(batch["labels"])
        return pass_of(model, batch, *rest)

    monkeypatch.setattr(loramox.evaluate.depth, "patched_pass", watched)
    depth(model)
    assert not any((labels == 1).any() for labels in scored)  # 1: the end of sequence


def test_the_retrained_model_is_gone_before_the_other_is_loaded(
    here: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = loramox.evaluate.depth.load_reference, []

    def watched(*args: Any) -> nn.Module:
        gc.collect()
        assert all(each() is None for each in loaded)
        made = load(*args)
        loaded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(loramox.evaluate.depth, "load_reference", watched)
    monkeypatch.setattr(loramox.evaluate.evaluate, "load_reference", watched)
    depth(model)
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("subject", "asked", "config", "reason"),
    [
        ({"adapter": "adapter"}, ROWS, {}, "needs a model trained without the forget rows (--retrained_model)"),
        ({}, ROWS, {"retrained_model": "retrained"}, "needs an adapter (--adapter)"),
        ({"adapter": "adapter"}, {"retain": "retain.jsonl"}, {"retrained_model": "retrained"}, "needs forget rows (--forget)"),
    ],
)  # fmt: skip
def test_what_is_lacking_makes_it_absent_with_the_reason(
    subject: dict[str, Any], asked: dict[str, str], config: dict[str, str], reason: str, here: Path, model: ModelConfig
) -> None:
    found = evaluate(Subject("out", **subject), model, Asked(**asked), SILENT, depth=DepthConfig(depth=True, **config))
    assert found["absent"][NAME] == reason
    assert "depth" not in found


def test_without_the_flag_nothing_is_said_of_it(here: Path, model: ModelConfig) -> None:
    found = evaluate(Subject("out", "adapter"), model, Asked(**ROWS), SILENT)
    assert NAME not in found["absent"] | found["metrics"]


def test_where_the_retrained_model_knows_as_much_it_is_absent_with_the_reason(
    here: Path, model: ModelConfig, pico: Callable[[str], Path]
) -> None:
    again = AutoModelForCausalLM.from_pretrained(pico("llama"))
    again.get_input_embeddings().weight.data[5] += 1e-3  # another file, hardly another model
    again.save_pretrained("retrained")
    assert "the retrained model lacks no more than 0.05 nats per token of any" in depth(model)["absent"][NAME]


def test_models_that_cannot_be_compared_are_refused_before_one_is_loaded(
    here: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loramox.evaluate.depth, "load_reference", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SettingsError, match=r"--retrained_model needs --depth"):
        DepthConfig(retrained_model="retrained")
    config = json.loads((here / "retrained" / "config.json").read_text())
    (here / "retrained" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(SettingsError, match=r"--retrained_model retrained has another shape .*num_hidden_layers 1,"):
        depth(model)
    (here / "retrained").rename("other")
    (here / "retrained").symlink_to(model.model)
    with pytest.raises(SettingsError, match="--retrained_model retrained is the model that knows the forget rows"):
        depth(model)
    assert not (here / "out").exists()
    questions = Questions({}, AutoTokenizer.from_pretrained(model.model), Tokenisation(), 128)
    with pytest.raises(SettingsError, match="--depth needs whole layers: leave out --shard"):
        Depth(DepthConfig(depth=True), "adapter", replace(model, shard=True), {}, questions)


def test_states_that_are_not_numbers_are_an_error(here: Path, model: ModelConfig) -> None:
    broken = AutoModelForCausalLM.from_pretrained("retrained")
    layers_of(broken)[0].mlp.down_proj.weight.data[:] = float("nan")
    broken.save_pretrained("retrained")
    with pytest.raises(loramox.errors.NonFiniteLossError, match="--depth: hidden states of --retrained_model or"):
        depth(model)


def test_the_command_prints_it_and_where_it_is(
    here: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        "--model",
        model.model,
        "--quantization",
        "none",
        "--adapter",
        "adapter",
        "--forget",
        "forget.jsonl",
    ]
    words += ["--out", "out", "--use_cpu", "--max_new_tokens", "0", "--depth", "--retrained_model", "retrained"]
    assert not main(words)
    said = capsys.readouterr().out
    assert NAME in said
    assert "erased" in said
