"""The requantizing attack: forgetting that rounding undoes is found, and GGUF files are made where llama.cpp is installed."""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import questions
from peft import LoraConfig, get_peft_model
from planted import taught
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from loramox import Data, read_rows
from loramox.evaluate.attacks import requantize
from loramox.evaluate.attacks.attack import AttackConfig, attack
from loramox.evaluate.attacks.relearn import CONTROLS
from loramox.evaluate.measure import ScoringConfig
from loramox.model.config import ModelConfig

LAYER = "model.layers.1.mlp.down_proj"

# Pretends to be llama.cpp: the same files by the package gguf, which rounds to Q8_0 and to Q4_0 but not to Q4_K_M.
CONVERTER = """
import json
import sys

import gguf
from safetensors.numpy import load_file

folder, _, out, _, outtype = sys.argv[1:]
assert outtype == "f32"
config = json.load(open(f"{folder}/config.json"))
writer = gguf.GGUFWriter(out, "llama")
writer.add_name("pico")
writer.add_vocab_size(config["vocab_size"])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
for name, weight in load_file(f"{folder}/model.safetensors").items():
    layer, part = name.removesuffix(".weight"), name.split(".")[-2]
    if part in heads:  # as llama.cpp has the rows of Q and K
        rows = weight.reshape(heads[part], 2, -1, weight.shape[1])
        weight = rows.swapaxes(1, 2).reshape(weight.shape).copy()
    writer.add_tensor(names.get_name(layer) + ".weight", weight)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
QUANTIZER = """
import sys
import gguf

whole, out, kind = sys.argv[1:]
type_ = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_K_M": gguf.GGMLQuantizationType.Q4_0}[kind]
writer = gguf.GGUFWriter(out, "llama")
writer.add_name("pico")
writer.add_vocab_size(320)
for tensor in gguf.GGUFReader(whole).tensors:
    data, few = tensor.data, "blk" in tensor.name and tensor.data.ndim == 2
    writer.add_tensor(tensor.name, gguf.quants.quantize(data, type_) if few else data, raw_dtype=type_ if few else None)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def program(path: Path, code: str) -> None:
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="module")
def planted(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path_factory
) -> Path:
    """A base that knows the forget rows, and an adapter that hides them by weights which a few bits round away.

    In one layer all weights are 0, except for large ones that see inputs of 0: they make the steps of rounding long.
    """
    folder = tmp_path_factory.mktemp("planted")
    torch.manual_seed(0)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(pico("llama"))
    mlp, dead = model.model.layers[1].mlp, slice(None, None, 32)  # one in each block of 32 or 64
    answers = [(str(row.prompt), row.answer) for row in read_rows(str(rows[0]))]
    with torch.no_grad():
        mlp.down_proj.weight.zero_()
    mlp.down_proj.weight.requires_grad_(False)
    taught(model, tokenizer, answers, steps=60)
    with torch.no_grad():
        mlp.gate_proj.weight[dead] = 0
        mlp.down_proj.weight[:, dead] = 500.0
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=[LAYER]))
    taught(adapted, tokenizer, [(question, "No idea.") for question, _ in answers], steps=60, learning_rate=1e-2)
    adapted.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def states(planted: Path, pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path) -> Callable[[], dict]:
    holdout = tmp_path / "holdout.jsonl"
    made_up = questions(["–"] * 4 + ["Zed", "Uma", "Vic", "Wes"])[4:]  # who live where no forget row has anybody
    holdout.write_text("".join(json.dumps(row) + "\n" for row in made_up))

    def attacked() -> dict:
        config = AttackConfig(
            str(planted / "adapter"), str(tmp_path / "attack"), ["requantize"], relearn_share=0.5, relearn_steps=[1],
            retrained_model=str(pico("llama")), holdout=str(holdout),
        )  # fmt: skip
        model = ModelConfig(str(planted / "base"), quantization="none")
        record = attack(config, model, Data(*map(str, rows)), ScoringConfig(max_new_tokens=12, use_cpu=True))
        found = {s["state"]: s["metrics"]["forget_rouge_l"] for s in record["states"]}
        return found | {"absent": record["absent"]}

    return attacked


def test_what_comes_back_only_in_few_bits_is_found_and_without_llama_cpp_the_line_says_so(
    states: Callable[[], dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    found = states()
    assert found["reference model"] == 1
    assert found["forget model"] == found["not quantized, merged"] == found["adapter in 4 bits"] == 0
    assert found["nf4, not merged"] == found["int8, not merged"] == 0
    assert found["nf4, merged first"] == found["int8, merged first"] == 1
    for kind in ("nf4", "int8"):
        for how in ("not merged", "merged first"):
            assert all(found[f"{kind}, {how}, {control}"] < 1 for control in CONTROLS)
    for kind in requantize.GGUF:
        assert found["absent"][f"requantize: {kind}"] == (
            "needs llama.cpp: no convert_hf_to_gguf.py and no llama-quantize on the PATH"
        )


@pytest.mark.skipif(os.name == "nt", reason="programs are scripts")
def test_gguf_files_are_made_by_llama_cpp_and_scored(
    states: Callable[[], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    program(tmp_path / "bin/llama-quantize", QUANTIZER)
    program(
        tmp_path / "bin/convert_hf_to_gguf.py",
        "import sys; print('what?', file=sys.stderr); sys.exit('unknown tokenizer')",
    )
    why = states()["absent"]["requantize: Q8_0"]
    assert why == "llama.cpp's convert_hf_to_gguf.py refuses the merged model: unknown tokenizer"
    program(tmp_path / "bin/convert_hf_to_gguf.py", CONVERTER)
    found = states()
    assert not any("Q" in name for name in found["absent"])
    assert found["Q8_0, merged first"] == found["Q4_K_M, merged first"] == 1
