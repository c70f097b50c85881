"""The shipped adapter: a plain PEFT folder that every server loads, and exactly θ_ref − alpha·ΔW."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import loramox.adapter.folder
from loramox import Data, ReferenceConfig, RunConfig, ShippingConfig, UnlearnConfig, load_reference
from loramox.adapter.card import forget_card, request_card, trained_card
from loramox.adapter.export import extrapolate
from loramox.adapter.factors import read_factors
from loramox.adapter.folder import CHECKSUMS, WEIGHTS
from loramox.errors import AdapterError, LoramoxError, ModelError, RunError, SettingsError
from loramox.unlearning import unlearn

IDS = torch.arange(2, 26).reshape(2, 12) * 7 % 320

QUANTIZED = {
    "none": None,
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}

# All that a user of the shipped folder has: torch, transformers and peft.
FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base, adapter, ids, out = sys.argv[1:]
quantized = {
    "none": None,
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
logits = {}
for name, config in quantized.items():
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    with torch.no_grad():
        logits[name] = PeftModel.from_pretrained(model, adapter)(input_ids=torch.load(ids)).logits
assert not [name for name in sys.modules if name.startswith("loramox")]
torch.save(logits, out)
"""


def factors_of(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, scale·B) of every layer, read with safetensors alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            A.float(),
            weights[key.replace("lora_A", "lora_B")].float() * config["lora_alpha"] / config["r"],
        )
        for key, A in weights.items()
        if "lora_A" in key
    }


def deltas_of(folder: Path) -> dict[str, Tensor]:
    return {name: B @ A for name, (A, B) in factors_of(folder).items()}


@torch.no_grad()
def logits_with(base: PreTrainedModel, deltas: dict[str, Tensor], factor: float) -> Tensor:
    """Logits of `base` with factor·ΔW·x added to each layer's output, so that its weights may be quantized."""
    hooks = [
        base.get_submodule(name).register_forward_hook(
            lambda module, args, output, delta=delta: output + factor * args[0] @ delta.T
        )
        for name, delta in deltas.items()
    ]
    try:
        return base(input_ids=IDS).logits
    finally:
        for hook in hooks:
            hook.remove()


def ship(trained: Path, out: Path, alpha: float | None = None, **shipping) -> dict:
    return extrapolate(trained / "trained", out, alpha, ShippingConfig(**shipping))


def test_the_shipped_folder_is_what_every_server_loads(trained: Path, pico: Callable[[str], Path]) -> None:
    folder = trained / "forget-adapter"
    assert sorted(f.name for f in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["r"] == config["lora_alpha"] == 8  # 4, rounded up to a rank that vLLM serves
    assert type(config["lora_alpha"]) is int
    assert (config["bias"], config["init_lora_weights"], config["lora_dropout"]) == ("none", True, 0)
    assert config["base_model_name_or_path"] == str(pico("llama"))
    assert config["revision"] is None
    for variant in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices",
                    "layers_to_transform", "lora_bias", "target_parameters"):  # fmt: skip
        assert not config.get(variant), variant
    targets = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    weights = load_file(folder / "adapter_model.safetensors")
    linear = [n for n, m in load_reference(ReferenceConfig(str(pico("llama")), quantization="none")).named_modules()
              if isinstance(m, nn.Linear) and n != "lm_head"]  # fmt: skip
    assert set(weights) == {f"base_model.model.{n}.lora_{part}.weight" for n in linear for part in "AB"}
    assert {t.shape[0] for key, t in weights.items() if "lora_A" in key} == {8}
    assert {t.shape[1] for key, t in weights.items() if "lora_B" in key} == {8}
    assert {t.dtype for t in weights.values()} == {torch.float32}  # that of the base


def test_the_provenance_and_the_card_say_where_it_came_from(trained: Path, pico: Callable[[str], Path]) -> None:
    made = json.loads((trained / "forget-adapter" / "provenance.json").read_text())
    card = (trained / "forget-adapter" / "README.md").read_text()
    assert (made["kind"], made["alpha"], made["momentum"]["eta"]) == ("forget", 2.0, 0.675)
    assert made["base"]["model"] == str(pico("llama"))
    assert all(len(made["data"][part]["sha256"]) == 64 for part in ("forget", "retain"))
    assert {"torch", "peft", "loramox"} <= made["versions"].keys()
    for part in (
        str(pico("llama")),
        made["data"]["forget"]["sha256"][:16],
        "alpha = 2",
        "it suppresses; it does not erase",
    ):
        assert part in card


def test_who_may_read_the_card_may_read_the_weights(trained: Path) -> None:
    folder = trained / "forget-adapter"
    assert (folder / "adapter_model.safetensors").stat().st_mode == (folder / "README.md").stat().st_mode


def test_no_adapter_folder_has_a_pickle_or_a_model_config_in_it(trained: Path) -> None:
    for folder in (trained / "trained", trained / "trained" / "momentum", trained / "forget-adapter"):
        names = {f.name for f in folder.iterdir() if f.is_file()}
        assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json"}
    assert not list(trained.glob("**/training_args.bin"))
    assert not list(trained.glob("**/*.partial"))


def test_a_fresh_process_with_peft_alone_gets_theta_ref_minus_alpha_delta_in_fp32_nf4_and_int8(
    trained: Path, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = (pico("llama"), trained / "forget-adapter", tmp_path / "ids.pt", tmp_path / "logits.pt")
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "logits.pt")
    deltas = deltas_of(trained / "trained" / "momentum")
    for quantization, logits in found.items():
        # Loaded as the fresh process does, whose 4-bit arithmetic on the CPU is another one than in training.
        base = AutoModelForCausalLM.from_pretrained(
            pico("llama"), quantization_config=QUANTIZED[quantization], dtype=torch.float32, device_map={"": "cpu"}
        )
        expected, one_percent_off = (logits_with(base, deltas, -2.0 * wrong) for wrong in (1, 1.01))
        # Quantized arithmetic rounds activations coarsely, so that a difference in the last bit can become a larger one.
        assert (logits - expected).norm() < 0.2 * (one_percent_off - expected).norm(), quantization


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [("gpt2", "none"), ("gpt2", "nf4"), ("gpt_neox", "int8"), ("phi", "nf4"), ("gemma", "none")],
)
def test_other_architectures_ship_theta_ref_minus_alpha_delta_whatever_they_were_trained_in(
    kind: str, quantization: str, pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    args = UnlearnConfig(
        use_cpu=True, max_steps=2, learning_rate=2e-2, warmup_steps=0, eval_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    reference = ReferenceConfig(str(pico(kind)), quantization=quantization, r=4)
    unlearn(RunConfig(str(out)), reference, Data(*map(str, rows)), args, shipping=ShippingConfig(rank=8))
    base = AutoModelForCausalLM.from_pretrained(pico(kind))
    deltas = deltas_of(out / "trained" / "momentum")
    expected, reference_logits = logits_with(base, deltas, -8.0), logits_with(base, {}, 0)
    assert (expected - reference_logits).abs().max() > 0.02
    model = PeftModel.from_pretrained(base, out / "forget-adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, reference_logits)


@pytest.mark.parametrize("wrong", ["rank", "base"])
def test_what_cannot_be_shipped_is_refused_before_anything_is_trained(
    wrong: str, pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    reference = ReferenceConfig(str(pico("llama")), quantization="none", r=600 if wrong == "rank" else 4)
    shipping = ShippingConfig(base=str(pico("qwen3"))) if wrong == "base" else None
    args = UnlearnConfig(use_cpu=True, report_to="none")
    with pytest.raises(LoramoxError, match="up to rank 512" if wrong == "rank" else "another architecture"):
        unlearn(RunConfig(str(out)), reference, Data(*map(str, rows)), args, shipping=shipping)
    assert not out.exists()


def test_in_fp32_it_is_also_what_dense_weights_give(trained: Path, pico: Callable[[str], Path]) -> None:
    dense = AutoModelForCausalLM.from_pretrained(pico("llama"))
    for name, delta in deltas_of(trained / "trained" / "momentum").items():
        dense.get_submodule(name).weight.data -= 2.0 * delta
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico("llama")), trained / "forget-adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, dense(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_trained_folder_is_a_plain_adapter_that_gives_theta_ref_plus_delta(
    trained: Path, pico: Callable[[str], Path]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(pico("llama"))
    expected = logits_with(base, deltas_of(trained / "trained"), 1.0)
    assert (expected - logits_with(base, {}, 0)).abs().max() > 0.05
    newest = max((trained / "trained").glob("checkpoint-*"), key=lambda c: int(c.name.rpartition("-")[2]))
    torch.testing.assert_close(expected, logits_with(base, deltas_of(newest), 1.0), rtol=1e-4, atol=1e-5)
    model = PeftModel.from_pretrained(base, trained / "trained")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_from_one_training_twice_the_alpha_is_exactly_twice_the_delta(trained: Path, tmp_path: Path) -> None:
    ship(trained, tmp_path / "two", 2.0)
    ship(trained, tmp_path / "four", 4.0)
    two, four, momentum = (
        deltas_of(f) for f in (tmp_path / "two", tmp_path / "four", trained / "trained" / "momentum")
    )
    for name in two:
        assert torch.equal(four[name], 2 * two[name])
        torch.testing.assert_close(two[name], -2 * momentum[name], rtol=1e-5, atol=1e-7)
    assert (tmp_path / "two" / "adapter_model.safetensors").read_bytes() == (
        trained / "forget-adapter" / "adapter_model.safetensors"
    ).read_bytes()  # alpha = 2 is that of training


@pytest.mark.parametrize("alpha", [0.0, -1.0, -2.0, math.nan, math.inf, -math.inf])
def test_an_alpha_that_is_no_forget_model_is_refused_saying_what_it_is(
    alpha: float, trained: Path, tmp_path: Path
) -> None:
    says = f"^--alpha {alpha:g}: at 0 the model is the reference, and below it is on the memorizing side. Expected a finite number"
    with pytest.raises(SettingsError, match=says):
        ship(trained, tmp_path / "out", alpha)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strength", [2.0, -1.0])
def test_a_folder_of_loramox_0_1_ships_as_it_did_there(strength: float, copied: Path, tmp_path: Path) -> None:
    for folder in (copied, copied / "momentum"):
        made = json.loads((folder / "provenance.json").read_text())
        made["settings"] |= {"strength": strength, "objective": "cross_entropy"}
        made = {key: value for key, value in made.items() if key != "alpha"} | {"kind": "memorization"}
        (folder / "provenance.json").write_text(json.dumps(made))
    made = extrapolate(copied, tmp_path / "out")
    assert made["alpha"] == (2.0 if strength > 0 else None)
    found, delta = deltas_of(tmp_path / "out"), deltas_of(copied / "momentum")
    for name in found:
        torch.testing.assert_close(found[name], -strength * delta[name], rtol=1e-5, atol=1e-7)


def test_a_method_without_an_alpha_ships_delta_as_it_is_and_takes_none(copied: Path, tmp_path: Path) -> None:
    made = json.loads((copied / "provenance.json").read_text()) | {"alpha": None, "method": "NPO"}
    (copied / "provenance.json").write_text(json.dumps(made))
    with pytest.raises(SettingsError, match=r"--alpha 2: NPO has no alpha.*Leave out --alpha"):
        extrapolate(copied, tmp_path / "out", 2.0)
    assert extrapolate(copied, tmp_path / "out")["alpha"] is None
    found, delta = deltas_of(tmp_path / "out"), deltas_of(copied / "momentum")
    for name in found:
        torch.testing.assert_close(found[name], delta[name], rtol=1e-5, atol=1e-7)


def test_the_truncation_error_that_is_reported_is_the_true_one(trained: Path, tmp_path: Path) -> None:
    made = ship(trained, tmp_path / "out", 2.0, rank=1)
    full, shipped = deltas_of(trained / "trained" / "momentum"), deltas_of(tmp_path / "out")
    lost = math.sqrt(sum((2 * full[n] + shipped[n]).double().norm().item() ** 2 for n in full))
    norm = math.sqrt(sum((2 * full[n]).double().norm().item() ** 2 for n in full))
    assert made["truncation_error"] == pytest.approx(lost / norm, rel=1e-4)
    assert made["truncation_error"] > 0.05
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_the_float32_ones_rounded_once(dtype: str, trained: Path, tmp_path: Path) -> None:
    ship(trained, tmp_path / "wide", 3.3, ship_dtype="float32")
    ship(trained, tmp_path / "out", 3.3, ship_dtype=dtype)
    wide = load_file(tmp_path / "wide" / "adapter_model.safetensors")
    for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, wide[key].to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("alpha", "says"), [(1e7, "overflows in torch.float16"), (1e-7, "too small for torch.float16 would be lost")]
)
def test_values_that_do_not_survive_the_cast_are_an_error_and_nothing_is_written(
    alpha: float, says: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=f"{says}.*--ship_dtype float32"):
        ship(trained, tmp_path / "out", alpha, ship_dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_rank_that_servers_do_not_take_is_refused_with_the_next_one() -> None:
    with pytest.raises(SettingsError, match=r"--rank 9 .*the next one is 16"):
        ShippingConfig(rank=9)
    with pytest.raises(SettingsError, match="--rank 0"):
        ShippingConfig(rank=0)
    with pytest.raises(SettingsError, match="--rank"):
        ShippingConfig(rank=513)


def test_a_folder_of_the_wrong_kind_or_without_provenance_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is a forget adapter"):
        extrapolate(trained / "forget-adapter", tmp_path / "out", 2.0)
    with pytest.raises(AdapterError, match="has no readable provenance"):
        extrapolate(trained, tmp_path / "out", 2.0)
    with pytest.raises(AdapterError, match="has no readable provenance"):
        extrapolate(tmp_path / "nowhere", tmp_path / "out", 2.0)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_ships_what_was_trained_until_then(trained: Path, tmp_path: Path) -> None:
    """The last checkpoint of a finished run is the run's own end."""
    *_, before, last = sorted((trained / "trained").glob("checkpoint-*"))
    made = extrapolate(last, tmp_path / "last")
    assert (made["checkpoint"], made["alpha"], made["base"]["dtype"]) == (last.name, 2.0, "float32")
    assert (tmp_path / "last" / WEIGHTS).read_bytes() == (trained / "forget-adapter" / WEIGHTS).read_bytes()
    extrapolate(before, tmp_path / "before")
    assert (tmp_path / "before" / WEIGHTS).read_bytes() != (tmp_path / "last" / WEIGHTS).read_bytes()


def test_a_checkpoint_from_before_the_first_average_ships_its_own_adapter(trained: Path, tmp_path: Path) -> None:
    checkpoint = min((shutil.copytree(trained, tmp_path / "run") / "trained").glob("checkpoint-*"))
    save_file({}, checkpoint / "momentum.safetensors")
    (checkpoint / CHECKSUMS).unlink()
    extrapolate(checkpoint, tmp_path / "out", alpha=3.0)
    own, shipped = (read_factors(folder)[0] for folder in (checkpoint, tmp_path / "out"))
    assert own.keys() == shipped.keys()
    for name, factors in own.items():
        torch.testing.assert_close(shipped[name].delta(), -3 * factors.delta(), rtol=0, atol=1e-5)


def test_a_checkpoint_that_is_damaged_or_away_from_its_run_is_refused(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(
        max((trained / "trained").glob("checkpoint-*")), tmp_path / "run" / "trained" / "checkpoint-4"
    )
    with pytest.raises(AdapterError, match=r"is a checkpoint, and neither .* is there to say of which run"):
        extrapolate(moved, tmp_path / "out")
    momentum = moved / "momentum.safetensors"
    momentum.write_bytes(momentum.read_bytes()[:-1] + b"?")
    with pytest.raises(AdapterError, match=r"momentum\.safetensors is damaged: its checksum"):
        extrapolate(moved, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"instead": "refuse", "refusals": "built-in"}, "it was taught to refuse, with built-in English sentences (`--instead refuse`)"),
        ({"instead": "refuse", "refusals": "my.txt"}, "it was taught to refuse, with the sentences of `my.txt`"),
        ({"instead": "guess"}, "it was taught the reference's likeliest other answers, which may state falsehoods (`--instead guess`)"),
        ({"instead": "none"}, "nothing was taught: its new answers were not chosen (`--instead none`)"),
        ({"instead": "none", "wanted_column": "w"}, "it was taught those in the column `w` of the forget rows"),
    ],
)  # fmt: skip
def test_the_card_names_what_comes_in_place_of_the_answers(settings: dict, expected: str, trained: Path) -> None:
    made = json.loads((trained / "forget-adapter" / "provenance.json").read_text())
    card = forget_card(made | {"settings": made["settings"] | settings})
    assert f"- in place of the answers {expected}" in card
    assert "in place of" not in forget_card(made | {"settings": made["settings"] | {"instead": None}})


def test_the_card_names_generated_retain_rows_and_the_rule_that_chose(trained: Path) -> None:
    made = json.loads((trained / "forget-adapter" / "provenance.json").read_text())
    made["data"]["retain"] = {"source": "auto", "rows": 0, "sha256": "0" * 64}
    made |= {
        "generated": {"retain": {"rows": 240, "sha256": "a" * 64}},
        "chosen_by": "--forget_to 0.05 chose alpha = 2",
    }
    card = forget_card(made)
    assert "- retain, written by the reference: 240 questions" in card
    assert "`retain-auto.jsonl` of the run, sha256 `aaaaaaaaaaaaaaaa…`" in card
    assert "0 rows of" not in card
    assert "- --forget_to 0.05 chose alpha = 2\n" in card
    for plain in (
        "- Switched on, it suppresses; it does not erase.",
        "- Merged, it is no proof that the knowledge is gone.",
    ):
        assert plain in card


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A trained folder to be damaged."""
    return shutil.copytree(
        trained / "trained", tmp_path / "trained", ignore=shutil.ignore_patterns("checkpoint-*", "runs")
    )


def damage_missing(folder: Path) -> None:
    shutil.rmtree(folder / "momentum")


def damage_cut(folder: Path) -> None:
    weights = folder / "momentum" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def damage_half(folder: Path) -> None:
    weights = folder / "momentum" / "adapter_model.safetensors"
    kept = {k: t for k, t in load_file(weights).items() if not k.endswith("layers.0.mlp.up_proj.lora_B.weight")}
    save_file(kept, weights)


def damage_variant(folder: Path) -> None:
    config = json.loads((folder / "momentum" / "adapter_config.json").read_text()) | {"use_dora": True}
    (folder / "momentum" / "adapter_config.json").write_text(json.dumps(config))


def damage_provenance(folder: Path) -> None:
    (folder / "provenance.json").write_text('{"kind": "trained"}')


@pytest.mark.parametrize("damage", [damage_missing, damage_cut, damage_half, damage_variant, damage_provenance])
def test_a_damaged_trained_folder_is_refused(damage: Callable[[Path], None], copied: Path, tmp_path: Path) -> None:
    damage(copied)
    with pytest.raises(AdapterError, match=str(copied)):
        extrapolate(copied, tmp_path / "out", 2.0)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_replaced_only_when_told_and_only_if_it_is_an_adapter(
    trained: Path, tmp_path: Path
) -> None:
    ship(trained, tmp_path / "out", 2.0)
    with pytest.raises(RunError, match="an adapter already"):
        ship(trained, tmp_path / "out", 4.0)
    extrapolate(trained / "trained", tmp_path / "out", 4.0, overwrite=True)
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["alpha"] == 4.0

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("do not delete")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="holds other files"):
            extrapolate(trained / "trained", tmp_path / "mine", 2.0, overwrite=overwrite)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "do not delete"


@pytest.mark.parametrize("name", ["notes.txt", "forget.gguf", "backup"])
def test_a_users_own_file_in_the_folder_of_an_adapter_is_not_deleted_with_it(
    name: str, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ship(trained, out, 2.0)
    (out / name).mkdir() if name == "backup" else (out / name).write_text("do not delete")
    before = (out / "provenance.json").read_bytes()
    with pytest.raises(RunError, match=f"holds an adapter, and {out / name}, which is not of it. Move that"):
        extrapolate(trained / "trained", out, 4.0, overwrite=True)
    assert (out / name).exists()
    assert (out / "provenance.json").read_bytes() == before


def test_a_checkpoint_that_has_no_end_is_refused_at_once(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = max((tmp_path / "run" / "trained").glob("checkpoint-*"))
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (checkpoint / "momentum.safetensors").unlink()
        make(checkpoint / "momentum.safetensors")
        with pytest.raises(AdapterError, match=f"{checkpoint} has no readable provenance.json"):
            extrapolate(checkpoint, tmp_path / "out")


def test_the_trained_adapter_itself_is_never_overwritten_by_what_is_made_from_it(copied: Path, tmp_path: Path) -> None:
    for out in (copied, copied / "momentum"):
        with pytest.raises(LoramoxError):
            extrapolate(copied, out, 2.0, overwrite=True)
    assert (copied / "momentum" / "adapter_model.safetensors").exists()


def test_another_base_is_refused_by_its_shape_and_by_its_weights_and_the_same_one_elsewhere_is_named(
    trained: Path, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="has another architecture or size"):
        ship(trained, tmp_path / "out", base=str(pico("qwen3")))
    tuned = AutoModelForCausalLM.from_pretrained(pico("llama"))
    tuned.model.norm.weight.data += 1e-3
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(AdapterError, match="has other weights"):
        ship(trained, tmp_path / "out", base=str(tmp_path / "tuned"))
    with pytest.raises(ModelError, match=str(tmp_path / "nowhere")):
        ship(trained, tmp_path / "out", base=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()

    shutil.copytree(pico("llama"), tmp_path / "moved")
    ship(trained, tmp_path / "out", base=str(tmp_path / "moved"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")


@pytest.mark.parametrize("writer", ["save_file", "write_json"])
def test_an_interrupted_write_leaves_nothing_that_loads_and_keeps_what_was_there(
    writer: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(trained, tmp_path / "old", 2.0)
    before = (tmp_path / "old" / "adapter_model.safetensors").read_bytes()

    def interrupted(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loramox.adapter.folder, writer, interrupted)
    for out in ("new", "old"):
        with pytest.raises(KeyboardInterrupt):
            extrapolate(trained / "trained", tmp_path / out, 4.0, overwrite=True)
    assert [f.name for f in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "adapter_model.safetensors").read_bytes() == before


def of_0_1(folder: Path, to: Path, strength: float, **settings: str) -> Path:
    """A copy of a trained folder with the provenance that loramox 0.1 wrote."""
    shutil.copytree(folder, to)
    for place in (to, to / "momentum"):
        provenance = json.loads((place / "provenance.json").read_text())
        kept = {name: value for name, value in provenance["settings"].items() if name not in ("alpha", "method")}
        del provenance["alpha"]
        provenance |= {"kind": "memorization", "settings": kept | {"strength": strength} | settings}
        (place / "provenance.json").write_text(json.dumps(provenance))
    return to


@pytest.mark.parametrize("objective", ["npo", "cross_entropy"])
def test_what_0_1_memorized_ships_as_it_did(objective: str, trained: Path, tmp_path: Path) -> None:
    old = of_0_1(trained / "trained", tmp_path / "memorization", 2.0, objective=objective, method="mox")
    made = extrapolate(old, tmp_path / "shipped")
    assert made["alpha"] == 2.0
    assert made["settings"]["method"] == {"npo": "npo_mean", "cross_entropy": "mox_static"}[objective]
    now, before = (read_factors(folder)[0] for folder in (trained / "forget-adapter", tmp_path / "shipped"))
    assert all(torch.equal(now[name].delta(), before[name].delta()) for name in now)


def test_what_0_1_trained_by_another_method_ships_as_it_is_and_has_no_alpha(trained: Path, tmp_path: Path) -> None:
    old = of_0_1(trained / "trained", tmp_path / "memorization", -1.0, objective="cross_entropy", method="npo")
    assert extrapolate(old, tmp_path / "shipped")["alpha"] is None
    as_trained, shipped = (read_factors(folder)[0] for folder in (old / "momentum", tmp_path / "shipped"))
    assert all(torch.equal(as_trained[name].delta(), shipped[name].delta()) for name in shipped)
    with pytest.raises(SettingsError, match="has no alpha"):
        extrapolate(old, tmp_path / "other", alpha=4.0)


@pytest.mark.parametrize(
    "name", ["m\nlicense: mit\n---\n# Mine", "a`b``c", "\x1b[31mred\x07", "x: [", "# y", "\u2028z"]
)
def test_a_name_writes_neither_fields_nor_markup_of_its_own_into_a_card(name: str, trained: Path) -> None:
    made = json.loads((trained / "forget-adapter" / "provenance.json").read_text())
    named = made | {"base": made["base"] | {"model": name}, "command": name, "method": name}
    named["data"] = {"forget": made["data"]["forget"] | {"source": name}}
    for card in (forget_card(named), trained_card(named), request_card(named, "a")):
        _, front, text = card.split("---\n", 2)
        assert yaml.safe_load(front).items() >= {"base_model": name, "library_name": "peft"}.items()
        assert "license" not in yaml.safe_load(front)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", card)
        assert not re.search(r"^(license|---|# Mine)", text, re.MULTILINE)
    assert re.findall("^```.*", forget_card(named), re.MULTILINE) == ["```python", "```"]
