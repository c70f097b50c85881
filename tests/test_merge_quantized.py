"""A merge that is quantized: what is left of ΔW is told as it is, and where it is too little nothing is written."""

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_merge import adapter_for
from test_tuned_adapter import fit
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_utils import safe_save_file

import loramox.extras.merge.job
import loramox.extras.merge.quantize
from loramox.adapter.factors import read_factors
from loramox.adapter.folder import write_adapter
from loramox.adapter.source import tuned_source
from loramox.adapter.streaming.checkpoint import Target
from loramox.adapter.streaming.shards import read_shard
from loramox.adapter.streaming.weights import size
from loramox.cli import main
from loramox.errors import AdapterError, RunError, SettingsError
from loramox.evaluate.asked import Asked
from loramox.evaluate.evaluate import evaluate
from loramox.evaluate.measure import ScoringConfig
from loramox.evaluate.subject import Subject
from loramox.extras.merge.job import ForgettingConfig, _only_template, merge
from loramox.extras.merge.merge import MergeConfig, check_merge, merge_into_floats
from loramox.extras.merge.quantize import dequantized, little, merge_quantized, quantized_like, survival
from loramox.model.algebra import Factors, scaled
from loramox.model.config import ModelConfig

CPU = torch.device("cpu")


def adapted(base: Path, folder: Path, size: float = 0.5) -> Path:
    """An adapter whose ΔW is large enough for any quantization; of the pico model's weights of 0.02 it is about that share."""
    return adapter_for(base, folder / "adapter", size)


# ---- what is left of ΔW ----------------------------------------------------------------------------------------------


def layer(kind: str, weight: Tensor) -> nn.Module:
    """A module that holds `weight` as bitsandbytes quantizes it in transformers."""
    import bitsandbytes as bnb

    if kind == "nf4":
        example = bnb.nn.Params4bit(
            torch.zeros(64, 64), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
    elif kind == "int8":
        example = bnb.nn.Int8Params(torch.zeros(64, 64), requires_grad=False)
    else:
        example = nn.Parameter(torch.zeros(1), requires_grad=False)
    module = nn.Module()
    module.weight = quantized_like(example, weight)
    return module


def told(kind: str, old: Tensor, factors: Factors, folder: Path, transposed: bool = False) -> dict[str, float]:
    """What `survival` says of one layer whose W is `old` [out, in], in the file as it is or transposed."""
    save_file({"w": old.T.contiguous() if transposed else old}, folder / "model.safetensors")
    model = nn.Module()
    model.layer = layer(kind, (old.float() + factors.delta()).to(old.dtype))
    target = Target("layer", factors, transposed)
    ready = SimpleNamespace(shards=[read_shard(folder / "model.safetensors")], changed={"w": target}, code="BF16")
    found = survival(model, ready)
    assert found["layers"]["layer"] == {name: found[name] for name in ("overall", "share", "rounding")}
    return found


def random_layer(kind: str, on_grid: bool, ratio: float) -> tuple[Tensor, Factors]:
    """W of 512 × 512 in bfloat16, between the grid's points or (as near as bfloat16 has it) on them, and ΔW of `ratio`·‖W‖."""
    torch.manual_seed(0)
    old = (torch.randn(512, 512) * 0.02).bfloat16()
    if on_grid:
        old = dequantized(layer(kind, old).weight).bfloat16()
    A, B = torch.randn(16, 512), torch.randn(512, 16)
    return old, Factors(A, B * (ratio * old.float().norm() / (B @ A).norm()))


# Of portable_adapter's trap: what is left of ΔW when W is on NF4's grid already, on random weights.
@pytest.mark.parametrize(("ratio", "share"), [(0.01, 0.02), (0.03, 0.05), (0.1, 0.83), (0.3, 0.99)])
def test_on_the_grid_small_changes_are_rounded_away(ratio: float, share: float, tmp_path: Path) -> None:
    found = told("nf4", *random_layer("nf4", True, ratio), tmp_path)
    assert found["share"] == pytest.approx(share, abs=0.015)
    assert found["overall"] < 0.02 if ratio < 0.1 else found["overall"] > 0.5


@pytest.mark.parametrize(("kind", "enough", "little"), [("nf4", 0.3, 0.03), ("int8", 0.03, 0.004)])
def test_between_its_points_the_share_is_right_on_average_and_only_the_noise_tells(
    kind: str, enough: float, little: float, tmp_path: Path
) -> None:
    large, small = (told(kind, *random_layer(kind, False, ratio), tmp_path) for ratio in (enough, little))
    assert large["share"] == pytest.approx(1, abs=0.02)
    assert small["share"] == pytest.approx(1, abs=0.02 if kind == "nf4" else 0.1)  # there bfloat16's own grid is felt
    assert large["rounding"] < 0.5
    assert small["rounding"] > 1.5
    assert large["overall"] > 0.8
    assert small["overall"] < 0.25


def test_ten_times_less_has_more_noise_by_the_root_of_ten(tmp_path: Path) -> None:
    """Below the step few weights move, each by a whole one."""
    few, fewer = (told("nf4", *random_layer("nf4", False, ratio), tmp_path) for ratio in (0.03, 0.003))
    assert fewer["rounding"] / few["rounding"] == pytest.approx(math.sqrt(10), rel=0.15)


def test_the_three_numbers_are_what_they_say(tmp_path: Path) -> None:
    old = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).bfloat16()
    # ΔW is 2⁻⁷ everywhere, a whole step of bfloat16 at 1, half of one at 2 and 3 (rounded to even), a quarter at 4.
    factors = Factors(torch.full((1, 2), 2**-7), torch.ones(2, 1))
    found = told("none", old, factors, tmp_path)
    changed = (old.float() + 2**-7).bfloat16().float() - old.float()
    assert changed.flatten().tolist() == [2**-7, 0, 0, 0]
    assert found["share"] == 1 / 4
    assert found["overall"] == pytest.approx(1 / 4)
    assert found["rounding"] == pytest.approx(math.sqrt(3) / 2)


def test_nothing_left_is_zero_and_a_transposed_weight_is_turned(tmp_path: Path) -> None:
    old, factors = random_layer("nf4", False, 0.3)
    wide, delta = old[:128].contiguous(), Factors(factors.A, factors.B[:128])
    assert told("int8", wide, delta, tmp_path, True) == told("int8", wide, delta, tmp_path)
    none = told("nf4", old, Factors(factors.A, factors.B * 1e-9), tmp_path)
    assert (none["overall"], none["share"], none["rounding"]) == (0, 0, 1)


# ---- what is written -------------------------------------------------------------------------------------------------

LOADED = """
import sys, torch
from transformers import AutoModelForCausalLM
for out in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(out)
    logits = model(torch.arange(2, 26).reshape(2, 12)).logits
    torch.save({"logits": logits, "kind": type(model.model.layers[0].mlp.up_proj).__name__}, out + ".said")
"""


def test_the_output_is_the_16_bit_merge_quantized_and_loads_as_any_model(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter, outs = adapted(pico("llama"), tmp_path), {kind: tmp_path / kind for kind in ("nf4", "int8")}
    for kind, out in outs.items():
        made = merge(MergeConfig(str(adapter), str(out), quantize=kind), progress=False)
        assert not list(out.rglob("*.bin"))
        assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
        assert (made["quantization"], made["dtypes"]) == (kind, ["bfloat16"])
        assert json.loads((out / "provenance.json").read_text()) == made
        assert f"Quantized to {kind} after the merge" in (out / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "nf4", "int8"}

    merge_into_floats(MergeConfig(str(adapter), str(tmp_path / "16"), dtype="bfloat16"), progress=False)
    # Where nothing is known of loramox.
    subprocess.run([sys.executable, "-c", LOADED, *outs.values()], check=True, capture_output=True)
    for kind, layer_of in (("nf4", "Linear4bit"), ("int8", "Linear8bitLt")):
        how = BitsAndBytesConfig(
            load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        expected = AutoModelForCausalLM.from_pretrained(
            tmp_path / "16", dtype=torch.bfloat16, quantization_config=how, device_map="cpu"
        )
        said = torch.load(tmp_path / f"{kind}.said")
        assert said["kind"] == layer_of
        with torch.no_grad():
            logits = expected(torch.arange(2, 26).reshape(2, 12)).logits
        torch.testing.assert_close(said["logits"], logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_is_told_is_of_the_weights_in_the_file(arch: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = adapted(pico(arch), tmp_path)
    made = merge(MergeConfig(str(adapter), str(tmp_path / "out"), quantize="nf4"), progress=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        pico(arch), dtype=torch.bfloat16, quantization_config=how, device_map="cpu"
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    along = norm = changed = 0.0
    for name, said in made["survived"]["layers"].items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        D = dequantized(merged.get_submodule(name).weight) - dequantized(base.get_submodule(name).weight)
        delta = B @ A
        assert said["share"] == pytest.approx((D * delta).sum().item() / delta.square().sum().item(), rel=1e-3)
        along, norm, changed = along + (D * delta).sum(), norm + delta.square().sum(), changed + D.square().sum()
    assert made["survived"]["overall"] == pytest.approx((along**2 / (norm * changed)).item(), rel=1e-3)


def test_too_little_is_refused_and_force_writes_it(
    pico: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = adapted(pico("llama"), tmp_path, 0.01), tmp_path / "out"
    words = ["ship", "merge", "--adapter", str(adapter), "--out", str(out), "--quantize", "nf4"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    for part in ("is ΔW, and the rest is rounding (50% are asked)", "Nothing was written", "unmerged", "16 bits", "--force", "--retain"):  # fmt: skip
        assert part in said
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    with pytest.warns(UserWarning, match="It was written because of --force"):
        main([*words, "--force"])
    assert "from the quantized base is ΔW, and the rest is rounding" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(RunError, match="holds a merged model already"):
        merge(MergeConfig(str(adapter), str(out), quantize="nf4"))


@pytest.mark.parametrize(
    ("settings", "asked", "says"),
    [
        ({"force": True}, {}, "--force is for --quantize"),
        ({"quantize": "nf4", "dtype": "float32"}, {}, "--dtype float32 and --quantize contradict"),
        ({"quantize": "int4"}, {}, "--quantize takes nf4, int8"),
        ({}, {"forget": "rows.jsonl"}, "it needs --quantize"),
        ({"quantize": "nf4"}, {"retain": "rows.jsonl"}, "--retain needs --forget"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict, asked: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=says):
        merge(MergeConfig("adapter", str(tmp_path / "out"), **settings), ForgettingConfig(**asked))


# ---- what was forgotten ----------------------------------------------------------------------------------------------


def test_the_rows_are_asked_as_evaluate_asks_them_and_decide(
    rows: tuple[Path, Path], pico: Callable[[str], Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    adapter, base = adapted(pico("llama"), tmp_path, 2), str(pico("llama"))
    asked = ForgettingConfig(*map(str, rows), use_cpu=True)
    config = MergeConfig(str(adapter), str(tmp_path / "out"), quantize="nf4")
    # However little of ΔW the weights tell of: where rows are given, they decide.
    monkeypatch.setattr(loramox.extras.merge.quantize, "LEAST_OF_DELTA", 2)
    monkeypatch.setattr(loramox.extras.merge.quantize, "LEAST_OF_FORGETTING", -9)
    forgetting = merge(config, asked, progress=False)["forgetting"]
    merge_into_floats(MergeConfig(str(adapter), str(tmp_path / "16"), dtype="bfloat16"), progress=False)
    found = {state["state"]: state["metrics"] for state in forgetting["states"]}

    def evaluated(model: str, adapter: str | None, quantization: str) -> dict[str, float]:
        subject = Subject(str(tmp_path / f"asked-{len(list(tmp_path.iterdir()))}"), adapter)
        where = ModelConfig(model, quantization=quantization, dtype="bfloat16")
        scoring = ScoringConfig(max_new_tokens=0, use_cpu=True)
        metrics = evaluate(subject, where, Asked(*map(str, rows)), scoring)["metrics"]
        return {name: metrics[name]["value"] for name in ("forget_probability", "retain_probability")}

    for state, how in {
        "16-bit, reference model": (base, None, "none"),
        "16-bit, adapter on": (base, str(adapter), "none"),
        "16-bit, merged": (str(tmp_path / "16"), None, "none"),
        "nf4, adapter on, not merged": (base, str(adapter), "nf4"),
        "nf4, merged": (str(tmp_path / "16"), None, "nf4"),
    }.items():
        for name, value in evaluated(*how).items():
            assert found[state][name] == pytest.approx(value, rel=1e-3), (state, name)
    known, forgotten, left = (
        found[state]["forget_probability"] for state in ("16-bit, reference model", "16-bit, adapter on", "nf4, merged")
    )
    assert forgetting["share"] == pytest.approx((known - left) / (known - forgotten))
    assert forgetting["rows"]["forget"]["rows"] == 4

    monkeypatch.setattr(loramox.extras.merge.quantize, "LEAST_OF_FORGETTING", 9)
    with pytest.raises(RunError, match=r"of the forgetting is left.*\(900% are asked\)"):
        merge(MergeConfig(str(adapter), str(tmp_path / "other"), quantize="nf4"), asked, progress=False)
    assert not (tmp_path / "other").exists()
    words = ["--adapter", str(adapter), "--out", str(tmp_path / "other"), "--quantize", "nf4", "--force", "--forget"]
    with pytest.warns(UserWarning, match="because of --force"):
        main(["ship", "merge", *words, str(rows[0]), "--retain", str(rows[1]), "--use_cpu"])
    said = capsys.readouterr().out
    assert "nf4, adapter on, not merged" in said
    assert "of the forgetting is left" in said


def test_one_model_is_in_memory_at_a_time(rows: tuple[Path, Path], pico, tmp_path: Path, monkeypatch) -> None:
    loaded: list[weakref.ref] = []

    def alone(load: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
        def loading(*args, **more) -> PreTrainedModel:
            assert [each() for each in loaded if each() is not None] == []
            model = load(*args, **more)
            loaded.append(weakref.ref(model))
            return model

        return loading

    for module in (loramox.extras.merge.quantize, loramox.extras.merge.job):
        for name in ("load_merged", "load_reference"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, alone(getattr(module, name)))
    config = MergeConfig(str(adapted(pico("llama"), tmp_path, 2)), str(tmp_path / "out"), quantize="nf4", force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge(config, ForgettingConfig(*map(str, rows), use_cpu=True), progress=False)
    assert len(loaded) == 5


@pytest.mark.parametrize("fits", [True, False])
def test_rows_are_asked_on_the_cpu_where_the_gpu_has_no_room_for_the_16_bit_model(
    fits: bool, rows: tuple[Path, Path], pico: Callable[[str], Path], tmp_path: Path, monkeypatch
) -> None:
    config = MergeConfig(str(adapted(pico("llama"), tmp_path)), str(tmp_path / "out"), quantize="nf4")
    ready, gpu, used = check_merge(config), torch.device("cuda"), []
    free = size(ready.shards, "BF16") * (12 if fits else 10) // 10
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    monkeypatch.setattr(loramox.extras.merge.job, "check_device", lambda *args: gpu)
    monkeypatch.setattr(
        loramox.extras.merge.job,
        "merge_quantized",
        lambda config, ready, device, measure, progress: used.extend([device, measure.__self__.device]),
    )
    with nullcontext() if fits else pytest.warns(UserWarning, match="the rows are asked on the CPU"):
        merge(config, ForgettingConfig(*map(str, rows)), progress=False)
    assert used == [gpu, gpu if fits else CPU]


def test_where_an_adapter_forgets_nothing_the_weights_decide() -> None:
    told = {"overall": 0.4, "share": 1.0, "rounding": 1.2}
    assert "only 40% of what the quantized weights changed by is ΔW" in little(
        {"survived": told, "forgetting": {"share": None}}
    )
    assert "only 40%" in little({"survived": told})
    assert little({"survived": told, "forgetting": {"share": 0.95}}) is None
    assert "only 80% of the forgetting" in little({"survived": told | {"overall": 1.0}, "forgetting": {"share": 0.8}})
    assert little({"survived": told | {"overall": 0.6}}) is None


def test_for_a_combined_adapter_the_model_that_knows_has_the_users_own_adapter(
    rows: tuple[Path, Path], examples, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    base, mine, adapter = (tmp_path / name for name in ("base", "mine", "combined"))
    shutil.copytree(pico("llama"), base)
    fit(AutoModelForCausalLM.from_pretrained(base), examples[1], 80, 5e-3).save_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")
    fit(get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora), examples[0], 60, 2e-2).save_pretrained(mine)
    change, config = read_factors(mine)
    provenance = json.loads((adapted(base, tmp_path) / "provenance.json").read_text())
    provenance |= {"combined": True, "tuned_adapter": json.loads(json.dumps(tuned_source(mine, config)))}
    fade = {name: scaled(each, 0.1) for name, each in change.items()}  # the fine-tune, of which most is forgotten
    write_adapter(adapter, fade, LoraConfig(), provenance["base"], torch.float32, provenance, "card")
    merging = MergeConfig(str(adapter), str(tmp_path / "out"), quantize="nf4")
    asked = ForgettingConfig(*map(str, rows), use_cpu=True)
    forgetting = merge(merging, asked, progress=False)["forgetting"]

    found = {state["state"]: state["metrics"]["forget_probability"] for state in forgetting["states"]}
    known, forgotten, left = (found[each] for each in ("16-bit, reference model", "16-bit, adapter on", "nf4, merged"))
    subject = Subject(str(tmp_path / "asked"), str(mine))
    where = ModelConfig(str(base), quantization="none", dtype="bfloat16")
    metrics = evaluate(subject, where, Asked(*map(str, rows)), ScoringConfig(max_new_tokens=0, use_cpu=True))["metrics"]
    assert known == pytest.approx(metrics["forget_probability"]["value"], rel=1e-3)
    assert known > forgotten + 0.3
    assert forgetting["share"] == pytest.approx((known - left) / (known - forgotten))

    (mine / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=str(mine)):
        merge(replace(merging, out=str(tmp_path / "other")), asked, progress=False)
    assert not (tmp_path / "other").exists()


def test_where_nothing_was_known_a_warning_and_the_card_say_that_forgetting_was_not_measured(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = MergeConfig(str(adapted(pico("llama"), tmp_path)), str(out), quantize="nf4")
    with pytest.warns(
        UserWarning, match="how much of the forgetting is left was not measured. Here the weights decide"
    ):
        merge_quantized(config, check_merge(config), CPU, lambda _: {"share": None, "states": []}, progress=False)
    card = (out / "README.md").read_text()
    assert "so how much of the forgetting is left was not measured" in card
    assert "It was not trained, or measured, after merging" in card


# ---- what stands in the way ------------------------------------------------------------------------------------------


def killed(*args, **more) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "when", ["the 16-bit weights are there", "the second shard is written", "all weights are there"]
)
def test_a_kill_leaves_nothing_that_loads(
    when: str, pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, written = adapted(pico("llama"), tmp_path), safe_save_file

    def half_of_the_second(tensors, path, **more) -> None:
        written(tensors, path, **more)
        if "00002" in str(path):
            os.truncate(path, Path(path).stat().st_size // 2)
            killed()

    monkeypatch.setattr(loramox.extras.merge.quantize, "SHARD", "50KB")
    if when == "the second shard is written":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", half_of_the_second)
    else:
        where = "survival" if when == "the 16-bit weights are there" else "write_beside"
        monkeypatch.setattr(loramox.extras.merge.quantize, where, killed)
    process = multiprocessing.get_context("fork").Process(
        target=merge, args=[MergeConfig(str(adapter), str(tmp_path / "out"), quantize="nf4")]
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = [path for path in tmp_path.iterdir() if path != adapter]
    assert left.name == ".out.partial"
    assert list(left.rglob("*.safetensors"))  # it had begun
    for folder in (left, *(path for path in left.iterdir() if path.is_dir())):
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_model_of_several_files_is_whole(tokenizer, tmp_path: Path, monkeypatch) -> None:
    base = tmp_path / "base"
    config = AutoConfig.for_model("llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
        vocab_size=320, intermediate_size=96, tie_word_embeddings=True, dtype="float16")  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base, max_shard_size="50KB")
    tokenizer.save_pretrained(base)
    monkeypatch.setattr(loramox.extras.merge.quantize, "SHARD", "50KB")
    config = MergeConfig(str(adapted(base, tmp_path)), str(tmp_path / "out"), quantize="int8", dtype="float16")
    merge(config, progress=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_disk_must_hold_both_models(pico: Callable[[str], Path], tmp_path: Path, monkeypatch) -> None:
    config = MergeConfig(str(adapted(pico("llama"), tmp_path)), str(tmp_path / "out"), quantize="nf4")
    free = SimpleNamespace(free=0)
    monkeypatch.setattr("loramox.extras.merge.merge.shutil.disk_usage", lambda path: free)
    with pytest.raises(RunError, match=r"0 MB are free there, and the merged model needs \d+ MB"):
        merge(config, progress=False)
    sixteen = sum(t.numel() * 2 for t in load_file(pico("llama") / "model.safetensors").values())
    free.free = sixteen + (64 << 20)
    with pytest.raises(RunError, match="and the merged model needs"):
        merge(config, progress=False)
    free.free += sixteen
    merge(config, progress=False)
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sixteen / 4 < written < sixteen


def test_a_revision_is_of_a_copy_on_the_hub(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--copy"
    shutil.copytree(pico("llama"), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapter, out = adapted(pico("llama"), tmp_path), str(tmp_path / "out")
    made = merge(MergeConfig(str(adapter), out, "someone/copy", quantize="nf4", revision="v1"), progress=False)
    assert (made["base"]["model"], made["base"]["revision"]) == ("someone/copy", commit)
    for base in (None, str(pico("llama"))):
        with pytest.raises(SettingsError, match=r"--revision v1 is for a --base of another name on the hub"):
            merge(MergeConfig(str(adapter), out, base, overwrite=True, revision="v1"), progress=False)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_disk_that_fills_up_is_one_clear_error(
    quantize: str | None, pico: Callable[[str], Path], tmp_path: Path, monkeypatch
) -> None:
    def full(*args, **more) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = (
        "loramox.adapter.streaming.weights.write_tensor"
        if quantize is None
        else "transformers.modeling_utils.safe_save_file"
    )
    adapter = adapted(pico("llama"), tmp_path)
    monkeypatch.setattr(where, full)
    with pytest.raises(RunError, match=r"the disk filled up.*--out .*out needs \d+ MB in all"):
        merge(MergeConfig(str(adapter), str(tmp_path / "out"), quantize=quantize), progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_rows_of_requests_are_asked_with_the_one_template_with_which_they_were_forgotten() -> None:
    mine, other = {"prompt_template": "Q: {prompt}\nA:"}, {"prompt_template": None}
    assert _only_template([mine, mine]) == "Q: {prompt}\nA:"
    with pytest.raises(SettingsError, match=r"several prompt templates .*Merge without --forget and --retain"):
        _only_template([mine, other])
