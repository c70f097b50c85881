"""The model that is loaded is the model that was meant, whole, with a tokenizer that fits it; or it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramox import Data, ReferenceConfig, RunConfig, UnlearnConfig, load_reference
from loramox.errors import ModelError
from loramox.evaluate.asked import Asked
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.subject import Subject
from loramox.model.config import read_config, read_tokenizer, skeleton
from loramox.unlearning import unlearn


def copied(folder: Path, to: Path, shards: int = 1) -> Path:
    """The model and its tokenizer in another folder, its weights in several files."""
    shutil.copytree(folder, to)
    if shards > 1:
        (to / "model.safetensors").unlink()
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(to, max_shard_size=sum(p.nbytes for p in model.parameters()) // shards)
    return to


def pointer(folder: Path) -> None:
    first = min(folder.glob("model*.safetensors"))
    first.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 5938096\n")


def cut_off(folder: Path) -> None:
    first = min(folder.glob("model*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])


def a_shard_less(folder: Path) -> None:
    min(folder.glob("model*.safetensors")).unlink()


def a_shard_twice(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("model*.safetensors"))
    shutil.copyfile(first, second)


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def no_weights(folder: Path) -> None:
    for file in folder.glob("model*.safetensors*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "shards", "message"),
    [
        (pointer, 1, "model.safetensors is a Git LFS pointer.*git lfs pull"),
        (pointer, 3, "Git LFS pointer"),
        (cut_off, 1, "model.safetensors is no whole safetensors file.*Download the model again"),
        (cut_off, 3, "no whole safetensors file"),
        (a_shard_less, 3, r"lacks 1 of the \d files.*first: model-00001-of"),
        (a_shard_twice, 3, "model-00002-of.* lacks .* of the tensors"),
        (broken_index, 3, "is no index of weights"),
        (no_weights, 3, "has no weights: neither model.safetensors nor"),
    ],
)
def test_weights_that_are_not_whole_are_refused_with_the_remedy_before_anything_is_read(
    damage: Callable[[Path], None],
    shards: int,
    message: str,
    pico: Callable[[str], Path],
    rows: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    model = copied(pico("llama"), tmp_path / "model", shards)
    damage(model)
    reference = ReferenceConfig(str(model), quantization="none")
    data = Data(str(rows[0]), str(rows[1]))
    with pytest.raises(ModelError, match=message):
        read_config(reference, weights=True)
    with pytest.raises(ModelError, match=message):
        load_reference(reference)
    with pytest.raises(ModelError, match=message):
        evaluate(Subject(str(tmp_path / "e")), reference, Asked(*map(str, rows)))
    with pytest.raises(ModelError, match=message):
        unlearn(RunConfig(str(tmp_path / "run")), reference, data, UnlearnConfig(use_cpu=True))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "e").exists()


def test_weights_that_the_checkpoint_lacks_or_has_in_another_shape_are_refused_as_they_would_be_random(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    model = copied(pico("llama"), tmp_path / "model")
    whole = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for kept in ({n: t for n, t in whole.items() if n != name}, whole | {name: torch.zeros(3, 3)}):
        save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"lacks 1 of its weights \(first: {name}.*random.*download it again"):
            load_reference(ReferenceConfig(str(model), quantization="none"))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_tied_output_head_is_not_missing(quantization: str, pico: Callable[[str], Path]) -> None:
    assert "lm_head.weight" not in load_file(pico("gpt2") / "model.safetensors")
    load_reference(ReferenceConfig(str(pico("gpt2")), quantization=quantization))


def test_a_base_with_an_adapter_in_its_folder_and_an_adapter_for_a_base_are_refused(
    pico: Callable[[str], Path], trained: Path, tmp_path: Path
) -> None:
    model, adapter = copied(pico("llama"), tmp_path / "model"), trained / "forget-adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, model / name)
    for folder, message in (
        (model, "has an adapter_config.json.*ship merge"),
        (adapter, "is an adapter, not a model.*--adapter"),
    ):
        reference = ReferenceConfig(str(folder), quantization="none")
        for read in (read_config, load_reference):
            with pytest.raises(ModelError, match=message):
                read(reference)


def with_value(name: str, value: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | {name: value})


DAMAGES: dict[str, tuple[str, Callable[[str], str]]] = {
    "config nested deeply": ("config.json", lambda text: "[" * 100_000),
    "config is a number": ("config.json", lambda text: "3"),
    "config cut": ("config.json", lambda text: text[:100]),
    "architectures is a number": ("config.json", with_value("architectures", 3)),
    "size is text": ("config.json", with_value("hidden_size", "x")),
    "size is 0": ("config.json", with_value("head_dim", 0)),
    "size has no end": ("config.json", with_value("hidden_size", 10**30)),
    "layers without end": ("config.json", with_value("num_hidden_layers", 10**30)),
    "no such type": ("config.json", with_value("dtype", "x")),
    "no such activation": ("config.json", with_value("hidden_act", "x")),
    "tokenizer nested deeply": ("tokenizer.json", lambda text: "[" * 100_000),
    "tokenizer of no model": ("tokenizer.json", with_value("model", {})),
    "tokenizer's config is a list": ("tokenizer_config.json", lambda text: "[]"),
    "how to generate is a list": ("generation_config.json", lambda text: "[]"),
}


@pytest.mark.parametrize(("file", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_config_or_tokenizer_is_refused_by_the_name_of_its_folder(
    file: str, damage: Callable[[str], str], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    model = copied(pico("llama"), tmp_path / "model")
    (model / file).write_text(damage((model / file).read_text()))
    reference = ReferenceConfig(str(model), quantization="none")

    def use() -> None:
        skeleton(read_config(reference, weights=True), reference)
        read_tokenizer(reference)

    with pytest.raises(ModelError, match=str(model)):
        use()


def with_token(folder: Path, token: str, **special: str) -> None:
    """Add a token, as `add_tokens` without resizing the embeddings leaves it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(400)], **special})
    tokenizer.add_tokens(token)
    tokenizer.save_pretrained(folder)


def test_a_pad_token_that_the_model_does_not_have_is_replaced_as_padding_is_masked(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    model = copied(pico("llama"), tmp_path / "model")
    with_token(model, "[PAD]", pad_token="[PAD]")
    reference = ReferenceConfig(str(model), quantization="none")
    assert AutoTokenizer.from_pretrained(model).pad_token_id >= 320
    assert read_tokenizer(reference).pad_token_id == 1
    measured = [
        evaluate(
            Subject(str(tmp_path / "out" / folder.name)),
            ReferenceConfig(str(folder), quantization="none"),
            Asked(*map(str, rows)),
        )
        for folder in (model, pico("llama"))
    ]
    assert measured[0]["metrics"] == measured[1]["metrics"]


@pytest.mark.parametrize("where", ["eos", "template"])
def test_a_token_of_every_row_that_the_model_does_not_have_is_refused_by_name(
    where: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    model = copied(pico("llama"), tmp_path / "model")
    with_token(model, "<|turn|>", **({"eos_token": "<|turn|>"} if where == "eos" else {}))
    if where == "template":
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
        tokenizer.save_pretrained(model)
    with pytest.raises(ModelError, match=r"puts <\|turn\|> \(token \d+\) into every row.*320 tokens only"):
        read_tokenizer(ReferenceConfig(str(model), quantization="none"))
