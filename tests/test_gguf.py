"""A LoRA GGUF: every adapted layer once, under llama.cpp's name, in its order of rows, whole or not at all.

That llama.cpp computes with it what transformers does is tested in tests/llamacpp (make test-llamacpp).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import FAMILIES, write_base
from safetensors.torch import load_file, save_file
from signing import sign
from test_check import HOSTILE
from test_merge import adapter_for
from torch import Tensor

from loramox.cli import main
from loramox.errors import AdapterError, LoramoxError, ModelError, RunError, SettingsError
from loramox.extras.check.servers import TYPES
from loramox.extras.gguf import FAMILIES as CONVERTED
from loramox.extras.gguf import interleaved, to_gguf

HEADS = {"q_proj": 4, "k_proj": 2}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
ARCHS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma2": "gemma2"}


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """family("qwen2") → (base, adapter), not to be changed."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            base = write_base(kind, folder / "base")
            made[kind] = base, adapter_for(base, folder / "adapter")
        return made[kind]

    return make


@pytest.fixture
def adapter(family: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Path:
    """An adapter on the pico Llama, to be damaged."""
    return adapter_for(family("llama")[0], tmp_path / "adapter")


def weights(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def configured(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata, tensors) of a GGUF, as numpy orders them: [rows, columns]."""
    reader = gguf.GGUFReader(path)
    names = [tensor.name for tensor in reader.tensors]
    assert len(set(names)) == len(names)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: np.array(t.data) for t in reader.tensors}


def order(rows: int, heads: int) -> list[int]:
    """Which row of transformers' Q or K comes at each place in llama.cpp's."""
    d = rows // heads
    return [head * d + i // 2 + (i % 2) * (d // 2) for head in range(heads) for i in range(d)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_adapted_layer_is_there_once_under_llama_cpps_name(
    kind: str, family: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, adapter = family(kind)
    expected = {}
    for key, tensor in weights(adapter).items():
        number, layer, part = re.fullmatch(
            r"base_model\.model\.model\.layers\.(\d)\.(\w+\.\w+)\.lora_([AB])\.weight", key
        ).groups()
        heads = HEADS.get(layer.partition(".")[2]) if ARCHS[kind] == "llama" and part == "B" else None
        rows = tensor[order(len(tensor), heads)] if heads else tensor
        expected[f"blk.{number}.{NAMES[layer]}.weight.lora_{part.lower()}"] = rows.numpy()
    model_type, layers = to_gguf(adapter, tmp_path / "forget.gguf")
    assert model_type == kind
    metadata, tensors = contents(tmp_path / "forget.gguf")
    assert tensors.keys() == expected.keys()
    assert len(tensors) == 2 * layers == 2 * 2 * (4 if kind == "phi3" else 7)
    for name, value in tensors.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, expected[name]), name
    assert metadata["general.architecture"] == ARCHS[kind]
    assert metadata["general.type"] == "adapter"
    assert metadata["adapter.type"] == "lora"
    assert metadata["adapter.lora.alpha"] == 8.0


@pytest.mark.parametrize(("heads", "d", "rank"), [(1, 2, 1), (4, 16, 8), (2, 16, 8), (8, 64, 3)])
def test_reordering_b_reorders_delta_w_as_the_converter_reorders_w(heads: int, d: int, rank: int) -> None:
    torch.manual_seed(0)
    W, B, A = (torch.randn(*size, dtype=torch.float64) for size in [(heads * d, 10), (heads * d, rank), (rank, 10)])

    def converted(weight: Tensor) -> Tensor:  # as convert_hf_to_gguf.py does with the base's
        return weight.reshape(heads, 2, d // 2, -1).swapaxes(1, 2).reshape(weight.shape)

    torch.testing.assert_close(converted(W) + interleaved(B, heads) @ A, converted(W + B @ A), rtol=1e-12, atol=1e-12)
    assert torch.equal(interleaved(B, heads), B[order(heads * d, heads)])


def test_rotating_neighbours_after_reordering_is_rotating_halves_before_it() -> None:
    """Why the rows are reordered: with it, both ways of applying rotary embeddings are one."""
    torch.manual_seed(0)
    heads, d = 3, 8
    x, angle = torch.randn(heads * d, 1, dtype=torch.float64), torch.rand(d // 2, 1, dtype=torch.float64)
    first, second = x.reshape(heads, 2, d // 2, 1).unbind(1)
    halves = torch.stack([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], 1)
    even, odd = interleaved(x, heads).reshape(heads, d // 2, 2, 1).unbind(2)
    neighbours = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], 2)
    torch.testing.assert_close(neighbours.reshape(x.shape), interleaved(halves.reshape(x.shape), heads))


def test_a_scale_that_is_not_1_is_in_b_so_that_alpha_over_rank_is_always_1(adapter: Path, tmp_path: Path) -> None:
    to_gguf(adapter, tmp_path / "one.gguf")
    configured(adapter, lora_alpha=2)
    to_gguf(adapter, tmp_path / "quarter.gguf")
    (_, one), (metadata, quarter) = contents(tmp_path / "one.gguf"), contents(tmp_path / "quarter.gguf")
    assert metadata["adapter.lora.alpha"] == 8.0
    for name, value in one.items():
        assert np.array_equal(quarter[name], value * (0.25 if name.endswith("_b") else 1)), name


def test_f16_is_rounded_once_and_refuses_what_it_cannot_hold(adapter: Path, tmp_path: Path) -> None:
    to_gguf(adapter, tmp_path / "32.gguf")
    to_gguf(adapter, tmp_path / "16.gguf", outtype="f16")
    (_, wide), (_, half) = contents(tmp_path / "32.gguf"), contents(tmp_path / "16.gguf")
    assert {value.dtype for value in half.values()} == {np.dtype(np.float16)}
    assert all(np.array_equal(half[name], value.astype(np.float16)) for name, value in wide.items())
    for wrong in (1e-9, 1e6):
        tensors = weights(adapter)
        next(iter(tensors.values()))[0, 0] = wrong
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        sign(adapter)
        with pytest.raises(AdapterError, match="--outtype f32"):
            to_gguf(adapter, tmp_path / "other.gguf", outtype="f16")
        to_gguf(adapter, tmp_path / "32.gguf", overwrite=True)
    assert not (tmp_path / "other.gguf").exists()
    with pytest.raises(SettingsError, match="--outtype"):
        to_gguf(adapter, tmp_path / "other.gguf", outtype="q8_0")


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi", "gemma"])
def test_other_families_are_refused_by_name(kind: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = adapter_for(pico(kind), tmp_path / "adapter")
    assert set(TYPES["llama.cpp"]) == CONVERTED.keys()
    with pytest.raises(
        AdapterError,
        match=f"{kind} models are not converted by loramox ship gguf, only llama, mistral, qwen2, qwen3, gemma2, phi3",
    ):
        to_gguf(adapter, tmp_path / "forget.gguf")
    assert not (tmp_path / "forget.gguf").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_alpha": 0},
        {"alpha_pattern": {"q_proj": 4}},
        {"bias": "all"},
        {"base_model_name_or_path": "org/model-bnb-4bit"},
    ],
    ids=str,
)
def test_what_check_stops_for_llama_cpp_is_not_written(
    changes: dict[str, Any], adapter: Path, family: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    configured(adapter, **changes)
    with pytest.raises(AdapterError, match="would not load in llama.cpp: .*" + next(iter(changes))):
        to_gguf(adapter, tmp_path / "forget.gguf", base=str(family("llama")[0]))
    assert not (tmp_path / "forget.gguf").exists()


def test_a_trained_adapter_and_one_of_another_base_are_refused(
    adapter: Path, family: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="made on a base with other shape"):
        to_gguf(adapter, tmp_path / "forget.gguf", base=str(family("phi3")[0]))
    provenance = json.loads((adapter / "provenance.json").read_text()) | {"kind": "trained"}
    (adapter / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(AdapterError, match="the adapter as it was trained"):
        to_gguf(adapter, tmp_path / "forget.gguf")
    with pytest.raises(AdapterError, match="no folder"):
        to_gguf(tmp_path / "nowhere", tmp_path / "forget.gguf")


def test_without_the_bases_config_it_says_what_to_give(
    adapter: Path, family: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base = family("llama")[0]
    for name in ("nobody/nothing", str(tmp_path / "gone"), None):
        configured(adapter, base_model_name_or_path=name)
        with pytest.raises(ModelError, match=r"config\.json is needed, .* give --base FOLDER_OR_HUB_ID"):
            to_gguf(adapter, tmp_path / "forget.gguf")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((base / "config.json").read_bytes())
    to_gguf(adapter, tmp_path / "forget.gguf", base=str(tmp_path / "config"))  # no weights, no tokenizer
    assert len(contents(tmp_path / "forget.gguf")[1]) == 28


def test_a_layer_that_the_base_lacks_is_refused_where_no_model_can_be_built_to_compare(
    adapter: Path, family: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    (tmp_path / "config").mkdir()
    odd = json.loads((family("llama")[0] / "config.json").read_text()) | {"vocab_size": -1, "num_hidden_layers": 1}
    (tmp_path / "config" / "config.json").write_text(json.dumps(odd))
    (adapter / "provenance.json").unlink()
    with pytest.raises(AdapterError, match=r"changes model\.layers\.1\..* of 1 layers"):
        to_gguf(adapter, tmp_path / "forget.gguf", base=str(tmp_path / "config"))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_and_leaves_nothing(
    name: str, adapter: Path, family: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    HOSTILE[name](adapter)
    with pytest.raises(LoramoxError):
        to_gguf(adapter, tmp_path / "out" / "forget.gguf", base=str(family("llama")[0]))
    assert not (tmp_path / "out").exists()


def test_it_is_whole_or_not_there(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" / "forget.gguf"
    to_gguf(adapter, out)
    before = out.read_bytes()
    write = gguf.GGUFWriter.write_tensors_to_file

    def full(self: gguf.GGUFWriter, **settings: Any) -> None:
        write(self, **settings)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    configured(adapter, lora_alpha=4)
    with pytest.raises(RunError, match="No space left"):
        to_gguf(adapter, out, overwrite=True)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["forget.gguf"]
    monkeypatch.undo()
    to_gguf(adapter, out, overwrite=True)
    assert out.read_bytes() != before
    configured(adapter, lora_alpha=8)
    to_gguf(adapter, out, overwrite=True)
    assert out.read_bytes() == before


def test_nothing_but_a_lora_gguf_is_overwritten(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "forget.gguf"
    to_gguf(adapter, out)
    with pytest.raises(RunError, match="--overwrite"):
        to_gguf(adapter, out)
    base = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    base.add_type(gguf.GGUFType.MODEL)
    base.write_header_to_file()
    base.write_kv_data_to_file()
    base.write_tensors_to_file()
    base.close()
    (tmp_path / "text.gguf").write_text("GGUF")
    (tmp_path / "link.gguf").symlink_to(out)
    (tmp_path / "folder.gguf").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.glob("*.gguf") if path.is_file()}
    for name in ("base", "text", "link", "folder"):
        with pytest.raises(RunError, match=f"{name}.gguf is"):
            to_gguf(adapter, tmp_path / f"{name}.gguf", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.gguf") if path.is_file()} == before


def test_the_command_writes_it_and_says_how_to_load_it(
    adapter: Path,
    family: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "forget.gguf"
    main(["ship", "gguf", "--adapter", str(adapter), "--out", str(out)])
    said = capsys.readouterr().out
    assert f"--lora {out}" in said
    assert '"lora": [{"id": 0, "scale": 0.5}]' in said
    assert "FROM ./base.gguf\n    ADAPTER ./forget.gguf" in said
    assert len(contents(out)[1]) == 28
    with pytest.raises(SystemExit) as stop:
        main(["ship", "gguf", "--adapter", str(adapter), "--out", str(out)])
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    main(["ship", "gguf", "--adapter", str(family("qwen3")[1]), "--out", str(tmp_path / "qwen3.gguf")])
    assert "Ollama takes no adapters on qwen3 models" in capsys.readouterr().out
