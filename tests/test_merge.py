"""A merge: W + scale·B·A in 16- or 32-bit weights, in memory that does not grow with the model, whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from signing import sign
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.pytorch_utils import Conv1D

import loramox.adapter.streaming.checkpoint
from loramox.adapter.folder import write_adapter
from loramox.cli import main
from loramox.errors import AdapterError, LoramoxError, ModelError, RunError, SettingsError
from loramox.extras.merge.merge import MergeConfig, merge_into_floats
from loramox.model.algebra import Factors
from loramox.model.config import ModelConfig, identify, read_config, skeleton

IDS = torch.arange(2, 26).reshape(2, 12) * 7 % 320
SIDE = {"tokenizer.json", "tokenizer_config.json"}


def merge(adapter: Path, out: Path, progress: bool = True, **settings) -> dict:
    return merge_into_floats(MergeConfig(str(adapter), str(out), **settings), progress)


def adapter_for(base: Path, out: Path, size: float = 0.1, model: str | None = None) -> Path:
    """A forget adapter of random factors on all linear layers of the model in `base` but its head, ‖ΔW‖ about `size`·‖W‖."""
    named = ModelConfig(model or str(base), quantization="none")
    config = read_config(named)
    torch.manual_seed(1)
    factors = {}
    for name, layer in skeleton(config, named).named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and name not in ("lm_head", "embed_out"):
            rows, columns = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
            A, B = torch.randn(8, columns), torch.randn(rows, 8)
            factors[name] = Factors(A, B * (0.02 * size / 8**0.5))
    made_for = identify(named, config)
    provenance = {
        "kind": "forget", "alpha": 8.0, "command": "loramox unlearn", "base": made_for, "momentum": {"eta": 0.675},
        "settings": {}, "data": {part: {"rows": 4, "source": f"{part}.jsonl", "sha256": "0" * 64} for part in ("forget", "retain")},
    }  # fmt: skip
    fan = config.model_type == "gpt2"
    trained = LoraConfig(target_modules=sorted({n.rpartition(".")[2] for n in factors}), fan_in_fan_out=fan)
    write_adapter(out, factors, trained, made_for, torch.float32, provenance, "card")
    return out


@pytest.fixture
def adapted(pico: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """(base, adapter) of the pico Llama."""
    return pico("llama"), adapter_for(pico("llama"), tmp_path / "adapter")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def with_adapter(base: Path, adapter: Path, scale: float = 1.0) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    return logits(model)


def keys(folder: Path) -> dict[str, list[str]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = sorted(file.keys())
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "phi", "gemma", "gpt_neox", "gpt2"])
def test_a_merged_model_is_the_base_with_the_adapter_on_in_every_architecture(
    kind: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    base, out = pico(kind), tmp_path / "out"
    adapter = adapter_for(base, tmp_path / "adapter")
    made = merge(adapter, out, progress=False)
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    expected = with_adapter(base, adapter)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    assert keys(out) == keys(base)
    assert made["survived"]["overall"] == pytest.approx(1, abs=1e-4)
    assert made["survived"]["float32"]["rounding"] < 1e-4


def test_what_a_run_ships_is_merged_as_it_is(trained: Path, pico: Callable[[str], Path], tmp_path: Path) -> None:
    made = merge(trained / "forget-adapter", tmp_path / "out", progress=False)
    expected = with_adapter(pico("llama"), trained / "forget-adapter")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert made["adapter"]["alpha"] == 2.0
    with pytest.raises(AdapterError, match="is a trained adapter"):
        merge(trained / "trained", tmp_path / "other", progress=False)


def test_an_untouched_weight_keeps_its_bytes_and_a_changed_one_is_rounded_once(adapted, tmp_path: Path) -> None:
    base, adapter = adapted
    merge(adapter, tmp_path / "out", scale=0.5, progress=False)
    factors = load_file(adapter / "adapter_model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    for name, weight in before.items():
        A = factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if A is None:
            assert torch.equal(after[name], weight), name
        else:
            B = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            torch.testing.assert_close(after[name], weight + 0.5 * B @ A, rtol=1e-6, atol=1e-7)
    expected = with_adapter(base, adapter, 0.5)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5
    )


def test_a_tensor_of_many_blocks_is_merged_as_one_of_one(adapted, tmp_path: Path, monkeypatch) -> None:
    adapter = adapted[1]
    merge(adapter, tmp_path / "one", dtype="bfloat16", progress=False)
    monkeypatch.setattr("loramox.adapter.streaming.shards.BLOCK", 100)  # of rows of 64 and 128
    made = merge(adapter, tmp_path / "many", dtype="bfloat16", progress=False)
    for name, weight in load_file(tmp_path / "one" / "model.safetensors").items():
        # A sum in another order may fall on the other side of a rounding.
        torch.testing.assert_close(
            load_file(tmp_path / "many" / "model.safetensors")[name], weight, rtol=2**-7, atol=1e-6
        )
    assert 0.9 < made["survived"]["overall"] < 1.1


def test_sharding_index_and_tokenizer_are_as_in_the_base_and_the_config_says_the_new_type(
    tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base, out = tmp_path / "base", tmp_path / "out"
    config = AutoConfig.for_model("llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
        vocab_size=320, intermediate_size=96, tie_word_embeddings=True, dtype="float16")  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base, max_shard_size="50KB")
    tokenizer.save_pretrained(base)
    (base / "LICENSE.txt").write_text("be kind")
    (base / "notes.py").write_text("print('not taken along')")
    assert len(keys(base)) > 4
    adapter = adapter_for(base, tmp_path / "adapter")
    made = merge(adapter, out, dtype="bfloat16", progress=False)
    assert keys(out) == keys(base)
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()} - {"notes.py"} | {
        "README.md",
        "provenance.json",
    }
    index, of_base = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, base))
    assert index["weight_map"] == of_base["weight_map"]
    stored = [t for path in out.glob("*.safetensors") for t in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored)
    assert {t.dtype for t in stored} == {torch.bfloat16}
    assert made["dtypes"] == ["bfloat16"]

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = with_adapter(base, adapter)
    dense = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    rounded = logits(dense.merge_and_unload().bfloat16().float())
    found = logits(model.float())
    assert (found - rounded).abs().max() < 0.1 * (rounded - expected).abs().max()  # nothing is lost but one rounding
    assert (found - expected).abs().max() < 0.02
    assert AutoTokenizer.from_pretrained(out)("Ada").input_ids == tokenizer("Ada").input_ids


def test_names_without_the_inner_models_prefix_are_found(pico: Callable[[str], Path], tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(pico("gpt2"), base)  # as GPT-2 lies on the hub
    weights = load_file(base / "model.safetensors")
    assert all(name.startswith("transformer.") for name in weights)
    save_file(
        {name.removeprefix("transformer."): t for name, t in weights.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    adapter = adapter_for(base, tmp_path / "adapter")
    merge(adapter, out, progress=False)
    assert "h.0.attn.c_attn.weight" in keys(out)["model.safetensors"]
    merged = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(merged, with_adapter(base, adapter), rtol=1e-5, atol=1e-5)


def test_fused_projections_are_merged_by_name(tmp_path: Path) -> None:
    config = AutoConfig.for_model("phi3", num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
        vocab_size=320, intermediate_size=96, pad_token_id=0)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    adapter = adapter_for(tmp_path / "base", tmp_path / "adapter")
    merge(adapter, tmp_path / "out", progress=False)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(merged, with_adapter(tmp_path / "base", adapter), rtol=1e-5, atol=1e-5)


def test_what_survived_is_the_projection_of_the_change_on_delta_and_little_is_warned_of(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(pico("llama"), dtype=torch.bfloat16)
    model.save_pretrained(base)
    adapter = adapter_for(base, tmp_path / "adapter", size=3e-4)
    with pytest.warns(UserWarning, match=r"% of ΔW survived the rounding to bfloat16.*--dtype float32"):
        made = merge(adapter, tmp_path / "out", progress=False)
    factors = load_file(adapter / "adapter_model.safetensors")
    along = norm = 0.0
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        A = factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if A is not None:
            delta = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"] @ A
            change = weight.float() - model.get_parameter(name).float()
            along, norm = along + (change * delta).sum().item(), norm + delta.square().sum().item()
    assert made["survived"]["overall"] == pytest.approx(along / norm, rel=1e-3)
    assert made["survived"]["bfloat16"]["share"] < 0.9
    wide = merge(adapter, tmp_path / "wide", dtype="float32", progress=False)
    assert wide["survived"]["overall"] == pytest.approx(1, abs=1e-2)
    assert AutoConfig.from_pretrained(tmp_path / "wide").dtype == torch.float32


def test_the_output_says_where_it_came_from_and_what_it_is_not(adapted, tmp_path: Path) -> None:
    base, adapter = adapted
    made = merge(str(adapter), str(tmp_path / "out"), scale=2.0, progress=False)
    assert json.loads((tmp_path / "out" / "provenance.json").read_text()) == made
    assert (made["kind"], made["scale"], made["adapter"]["alpha"]) == ("merged", 2.0, 8.0)
    assert made["base"]["model"] == str(base)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("It is no proof that the knowledge is gone", "at scale 2", "alpha = 8", "100.0% of ΔW", made["adapter"]["sha256"][:16]):  # fmt: skip
        assert part in card


def test_a_base_on_the_hub_is_read_from_its_snapshot_and_no_pickle_is_asked_for(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--pico"
    shutil.copytree(pico("llama"), cached / "snapshots" / commit)
    (cached / "snapshots" / commit / "pytorch_model.bin").write_bytes(b"a pickle")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = []
    download = loramox.adapter.streaming.checkpoint.snapshot_download
    monkeypatch.setattr(
        loramox.adapter.streaming.checkpoint,
        "snapshot_download",
        lambda *a, **how: asked.extend(how["allow_patterns"]) or download(*a, **how),
    )
    adapter = adapter_for(pico("llama"), tmp_path / "adapter", model="someone/pico")
    made = merge(adapter, tmp_path / "out", progress=False)
    assert (made["base"]["model"], made["base"]["revision"]) == ("someone/pico", commit)
    assert "model.safetensors" in asked
    assert not [pattern for pattern in asked if "bin" in pattern or pattern.startswith("*.s")]
    assert not list((tmp_path / "out").glob("*.bin"))
    strange = adapter_for(pico("llama"), tmp_path / "strange")
    made_for = json.loads((strange / "provenance.json").read_text())["base"]
    edit(strange / "provenance.json", base=made_for | {"weights": "0" * 64})
    with pytest.raises(AdapterError, match="someone/pico has other weights"):
        merge(strange, tmp_path / "other", base="someone/pico", progress=False)
    with pytest.raises(ModelError, match="--base someone/else"):
        merge(adapter, tmp_path / "other", base="someone/else", progress=False)


# Merges a small model first, so that what Python and transformers take is in the baseline; then the large one.
MEASURED = """
import sys
from pathlib import Path
from loramox.run import memory_now, peak_memory
from loramox.extras.merge.merge import MergeConfig, merge_into_floats

small, large, out = sys.argv[1:]
merge_into_floats(MergeConfig(small, out + "-small"), progress=False)
before = memory_now()
merge_into_floats(MergeConfig(large, out, dtype="bfloat16"), progress=False)
print(peak_memory() - before)
"""


def test_memory_does_not_grow_with_the_model(pico: Callable[[str], Path], tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, hidden_size=1024,
        vocab_size=8000, intermediate_size=2048)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(0x3C00, 0x3C80)  # 2**-7 to 2**-6; faster than a normal distribution
    model.save_pretrained(tmp_path / "base", max_shard_size="40MB")
    assert sum(p.stat().st_size for p in (tmp_path / "base").iterdir()) > 150e6
    large = adapter_for(tmp_path / "base", tmp_path / "large")
    small = adapter_for(pico("llama"), tmp_path / "small")
    command = [sys.executable, "-c", MEASURED, *map(str, (small, large, tmp_path / "out"))]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"peak {grown / 1e6:.0f} MB above the baseline")
    assert grown < 150e6


def interrupted(*args) -> None:
    raise KeyboardInterrupt


KILLED = """
import os, signal, sys
import loramox.adapter.streaming.weights as weights
from loramox.extras.merge.merge import MergeConfig, merge_into_floats

written = weights._write_one
def one(source, entry, *rest):
    if entry.name.endswith("layers.1.mlp.up_proj.weight"):
        rest[2].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    written(source, entry, *rest)
weights._write_one = one
merge_into_floats(MergeConfig(*sys.argv[1:]), progress=False)
"""


def test_a_killed_merge_leaves_nothing_that_loads_and_can_be_made_again(adapted, tmp_path: Path) -> None:
    base, adapter = adapted
    killed = subprocess.run([sys.executable, "-c", KILLED, adapter, tmp_path / "out"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = [path for path in tmp_path.iterdir() if path != adapter]
    assert list(left.glob("*.safetensors"))  # it had begun
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(left)
    merge(adapter, tmp_path / "out", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(merged, with_adapter(base, adapter), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["loramox.adapter.streaming.weights._cast", "loramox.extras.merge.merge.merged_card"])
def test_an_interrupted_merge_keeps_what_was_there(adapted, where: str, tmp_path: Path, monkeypatch) -> None:
    adapter = adapted[1]
    merge(adapter, tmp_path / "old", progress=False)
    before = (tmp_path / "old" / "model.safetensors").read_bytes()
    monkeypatch.setattr(where, interrupted)
    for out in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, tmp_path / out, scale=2.0, overwrite=True, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "old"}
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (0.0, "is the base model"),
        (-1.0, "brings the forget rows back"),
        (float("nan"), "not a finite"),
        (float("inf"), "not a finite"),
    ],
)
def test_a_scale_that_forgets_nothing_is_refused(scale: float, says: str, adapted, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"--scale .*{says}"):
        merge(adapted[1], tmp_path / "out", scale=scale)
    with pytest.raises(SettingsError, match="--dtype takes float32, bfloat16, float16"):
        merge(adapted[1], tmp_path / "out", dtype="int8")


def test_the_settings_are_flags() -> None:
    (config,) = HfArgumentParser(MergeConfig).parse_args_into_dataclasses(
        ["--adapter", "a", "--out", "o", "--dtype", "bfloat16", "--scale", "0.5", "--overwrite"]
    )
    assert config == MergeConfig("a", "o", None, 0.5, "bfloat16", True)


def base_of_another_shape(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    edit(base / "config.json", vocab_size=321)
    return AdapterError, "has another architecture or size"


def base_of_other_weights(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    return AdapterError, "has other weights"


def base_quantized(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return ModelError, rf"^--base {base} is quantized already. Give the 16-bit model it was made from.*--quantize nf4"


def base_of_bytes(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    rewrite(base, lambda name, t: t.to(torch.float8_e4m3fn) if name.endswith("q_proj.weight") else t)
    forgive(adapter)
    return ModelError, "q_proj.weight of the base is of type F8_E4M3"


def base_pickled(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    forgive(adapter)
    return ModelError, "has no safetensors.*pytorch_model.bin is a pickle, which is not read"


def base_cut(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    os.truncate(base / "model.safetensors", 10_000)
    forgive(adapter)
    return ModelError, r"model.safetensors is no whole safetensors file"


def base_without_a_shard(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    forgive(adapter)
    return ModelError, r"lacks 1 of the 1 files .*first: model-00001-of-00002.safetensors"


def base_with_a_path_trick(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    base_without_a_shard(base, adapter)
    edit(base / "model.safetensors.index.json", weight_map={"a": "../elsewhere/model.safetensors"})
    return ModelError, "is no file of its folder"


def base_without_the_layer(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    weights = load_file(base / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "1.self_attn.q_proj" not in n}, base / "model.safetensors")
    forgive(adapter)
    return AdapterError, r"no tensor model.layers.1.self_attn.q_proj.weight or layers.1.self_attn.q_proj.weight"


def base_of_other_columns(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    rewrite(base, lambda name, t: t[:, :-1].contiguous() if name.endswith("0.mlp.up_proj.weight") else t)
    forgive(adapter)
    return (
        AdapterError,
        r"by a ΔW of shape \[128, 64\], and model.layers.0.mlp.up_proj.weight of the base is \[128, 63\]",
    )


def adapter_of_another_layer(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    rewrite(adapter, lambda name, t: t, lambda name: name.replace("layers.1", "layers.7"))
    return AdapterError, "PEFT adapts model.layers.1.self_attn.q_proj, of which there are no tensors"


def adapter_of_an_embedding(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    rewrite(adapter, lambda name, t: t, lambda name: name.replace("layers.1.mlp.up_proj", "embed_tokens"))
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    instead = {"target_modules": [*targets, "embed_tokens"], "exclude_modules": ["layers.1.mlp.up_proj"]}
    edit(adapter / "adapter_config.json", **instead)
    return AdapterError, "would not load whole in PEFT: it leaves out 2 tensors such as .*embed_tokens"


def adapter_with_a_bias(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        weights | {"base_model.model.model.layers.0.mlp.up_proj.lora_B.bias": torch.ones(3)},
        adapter / "adapter_model.safetensors",
    )
    return AdapterError, "lora_B.bias is more than the A and B"


def adapter_of_dora(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    edit(adapter / "adapter_config.json", use_dora=True)
    return AdapterError, "is not a plain LoRA adapter.*use_dora"


def adapter_not_finite(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    rewrite(adapter, lambda name, t: t * float("nan") if "1.mlp.up_proj.lora_B" in name else t)
    return AdapterError, "1.mlp.up_proj.lora_B.weight has NaN or infinity"


def adapter_without_provenance(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    (adapter / "provenance.json").unlink()
    return AdapterError, "no forget adapter of loramox"


def adapter_as_trained(base: Path, adapter: Path) -> tuple[type[LoramoxError], str]:
    edit(adapter / "provenance.json", kind="trained")
    return AdapterError, "is a trained adapter, not a forget adapter"


def edit(path: Path, **more) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def forgive(adapter: Path) -> None:
    """Let the adapter not know its base by its weights, so that what is wrong with them is found otherwise."""
    made = json.loads((adapter / "provenance.json").read_text())
    edit(adapter / "provenance.json", base=made["base"] | {"weights": None})


def rewrite(
    folder: Path, change: Callable[[str, Tensor], Tensor], name: Callable[[str], str] = lambda name: name
) -> None:
    (path,) = folder.glob("*.safetensors")
    save_file({name(key): change(key, tensor) for key, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    "spoil",
    [
        each
        for name, each in sorted(globals().items())
        if name.startswith(("base_", "adapter_")) and each != adapter_for
    ],
)
def test_what_cannot_be_merged_is_refused_by_name_and_nothing_is_written(
    spoil: Callable[[Path, Path], tuple[type[LoramoxError], str]], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(pico("llama"), tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    kind, says = spoil(base, adapter)
    if (adapter / "adapter_model.safetensors").exists():
        sign(adapter)
    with pytest.raises(kind, match=says):
        merge(adapter, tmp_path / "out", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_head_that_is_the_embedding_too_is_refused(tmp_path: Path, pico: Callable[[str], Path]) -> None:
    base = shutil.copytree(pico("gemma"), tmp_path / "base")  # tied
    adapter = adapter_for(base, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    head = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(8, 64),
        "base_model.model.lm_head.lora_B.weight": torch.ones(320, 8),
    }
    save_file(weights | head, adapter / "adapter_model.safetensors")
    edit(
        adapter / "adapter_config.json", target_modules=["lm_head", *sorted({name.split(".")[-3] for name in weights})]
    )
    sign(adapter)
    with pytest.raises(AdapterError, match=r"changes lm_head, whose weight is also model.embed_tokens.weight \(tied\)"):
        merge(adapter, tmp_path / "out", progress=False)


def test_a_weight_that_overflows_is_an_error_and_nothing_is_left(adapted, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"overflows in torch.float16.*--dtype bfloat16"):
        merge(adapted[1], tmp_path / "out", scale=1e9, dtype="float16", progress=False)
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_refused_with_the_size(adapted, tmp_path: Path, monkeypatch) -> None:
    free = namedtuple("usage", "free")(1_000_000)
    monkeypatch.setattr("loramox.extras.merge.merge.shutil.disk_usage", lambda path: free)
    with pytest.raises(RunError, match=r"1 MB are free there, and the merged model needs 6\d MB"):
        merge(adapted[1], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_only_a_merged_model_is_replaced_and_what_it_is_made_from_never_is(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(pico("llama"), tmp_path / "models" / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    for out in (base, base / "merged", adapter, adapter / "merged", tmp_path / "models", base / ".." / "base"):
        with pytest.raises(RunError, match=r"is in the folder of the (base|adapter) or around it"):
            merge(adapter, out, overwrite=True, progress=False)
    out = tmp_path / "out"
    merge(adapter, out, progress=False)
    with pytest.raises(RunError, match=r"holds a merged model already.*--overwrite"):
        merge(adapter, out, scale=0.5, progress=False)
    assert merge(adapter, out, scale=0.5, overwrite=True, progress=False)["scale"] == 0.5
    assert json.loads((out / "provenance.json").read_text())["scale"] == 0.5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("do not delete")
    (tmp_path / "file").write_text("do not delete")
    for taken in ("mine", "file"):
        with pytest.raises(RunError, match=r"holds other files|is a file"):
            merge(adapter, tmp_path / taken, overwrite=True, progress=False)
    assert (tmp_path / "mine" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "do not delete"


def test_loramox_ship_merge_from_the_command_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ship", "merge", "--adapter", str(trained / "forget-adapter"), "--out", str(tmp_path / "merged")])
    assert "of ΔW survived the rounding" in capsys.readouterr().out
    assert (tmp_path / "merged" / "config.json").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["ship", "merge", "--adapter", str(trained / "forget-adapter"), "--out", str(tmp_path / "merged")])
    assert stopped.value.code == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.model", "LICENSE", "config.json", "model.safetensors"])
def test_a_link_that_leads_out_of_the_base_is_refused_and_not_followed(
    name: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(pico("llama"), tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    secret = tmp_path / "secret"
    secret.write_bytes((base / name).read_bytes() if (base / name).exists() else b"mine")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    with pytest.raises(ModelError, match=rf"{name} is a link that leads out of the model's folder"):
        merge(adapter, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_of_a_base_in_the_hubs_cache_links_are_followed_and_files_of_other_names_stay(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    cached = tmp_path / "models--me--x"
    snapshot = cached / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    shutil.copytree(pico("llama"), cached / "blobs")
    for path in (cached / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (snapshot / "tokenizer_x.json").write_text("mine")
    (snapshot / "LICENSE-of-mine").symlink_to(tmp_path / "nowhere")
    merge(adapter_for(snapshot, tmp_path / "adapter"), tmp_path / "out", progress=False)
    there = {path.name for path in (tmp_path / "out").iterdir() if not path.is_symlink()}
    assert there == {path.name for path in (cached / "blobs").iterdir()} | {"provenance.json", "README.md"}
