"""Any plain LoRA adapter that PEFT wrote can be negated, with PEFT itself as the judge; every other kind is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from loramox.adapter.export import ShippingConfig, extrapolate
from loramox.adapter.factors import read_factors
from loramox.errors import AdapterError, LoramoxError, ModelError, RunError, SettingsError
from loramox.extras.check.check import check, stopped
from loramox.extras.check.servers import SERVERS

IDS = torch.arange(2, 26).reshape(2, 12) * 7 % 320
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# A whole name, a part of one, a regular expression; and two that match one layer, of which PEFT takes the first that it saved.
RANKS = {"^model.layers.0.self_attn.q_proj": 3, "layers.1.mlp.up_proj": 12, r"self_attn\.[kv]_proj": 2}
ALPHAS = {"model.layers.1.self_attn.q_proj": 5, r"mlp\..*": 24, "down_proj": 1}

KINDS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "ranks": {"r": 4, "lora_alpha": 6, "rank_pattern": RANKS},
    "alphas": {"r": 4, "lora_alpha": 6, "alpha_pattern": ALPHAS},
    "both": {"r": 4, "lora_alpha": 6, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "both, rslora": {"r": 4, "lora_alpha": 3, "rank_pattern": RANKS, "alpha_pattern": ALPHAS, "use_rslora": True},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "except some": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"},
    "by a pattern": {"target_modules": r"model\.layers\.1\.(self_attn\.q_proj|mlp\.up_proj)"},
    "drawn otherwise": {"r": 4, "init_lora_weights": "gaussian"},
}


def adapted(base: Path, **settings) -> PeftModel:
    """The model in `base` with an adapter of PEFT's whose weights are drawn at random, far from 0."""
    settings = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | settings
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.weight.normal_(std=0.2)
    return model.eval()


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def loaded(base: Path, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def negated(model: PeftModel, alpha: float) -> Tensor:
    """Logits of PEFT's model with the scaling of every layer at −alpha times its own."""
    layers = lora_layers(model).values()
    own = [layer.scaling["default"] for layer in layers]
    for layer, scaling in zip(layers, own, strict=True):
        layer.scaling["default"] = -alpha * scaling
    try:
        return logits(model)
    finally:
        for layer, scaling in zip(layers, own, strict=True):
            layer.scaling["default"] = scaling


def edit(folder: Path, **settings) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def theirs(pico: Callable[[str], Path], tmp_path: Path) -> Path:
    """A plain adapter of PEFT's for the pico Llama, to be spoiled."""
    return saved(adapted(pico("llama"), **KINDS["plain"]), tmp_path / "theirs")


@pytest.mark.parametrize("kind", KINDS)
def test_read_factors_are_what_peft_adds_to_each_layer(kind: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved(adapted(pico("llama"), **KINDS[kind]), tmp_path / "theirs")
    factors, _ = read_factors(folder)
    layers = lora_layers(loaded(pico("llama"), folder))
    assert factors.keys() == layers.keys()
    for name, layer in layers.items():
        assert factors[name].rank == layer.r["default"]
        torch.testing.assert_close(factors[name].delta(), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-6)


def test_patterns_give_layers_different_ranks_and_scales(pico: Callable[[str], Path], tmp_path: Path) -> None:
    """So that the laws here are not those of one rank and one scale."""
    layers = lora_layers(adapted(pico("llama"), **KINDS["both, rslora"])).values()
    assert {layer.r["default"] for layer in layers} == {2, 3, 4, 12}
    assert len({layer.scaling["default"] for layer in layers}) > 4


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_base_plus_what_ships_is_pefts_model_at_minus_alpha(
    kind: str, alpha: float, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = saved(adapted(pico("llama"), **KINDS[kind]), tmp_path / "theirs")
    model = loaded(pico("llama"), folder)
    made = extrapolate(folder, tmp_path / "out", alpha)
    assert made["truncation_error"] == 0
    expected, untouched = negated(model, alpha), logits(AutoModelForCausalLM.from_pretrained(pico("llama")))
    assert (expected - untouched).abs().max() > 0.05
    shipped = loaded(pico("llama"), tmp_path / "out")
    assert lora_layers(shipped).keys() == lora_layers(model).keys()
    torch.testing.assert_close(logits(shipped), expected, rtol=0, atol=1e-5)
    with shipped.disable_adapter():
        assert torch.equal(logits(shipped), untouched)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi", "gemma"])
def test_other_architectures_are_negated_too(kind: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    model = adapted(pico(kind), r=4, lora_alpha=3, use_rslora=True)
    folder = saved(model, tmp_path / "theirs")
    factors, _ = read_factors(folder)
    for name, layer in lora_layers(model).items():
        change = layer.get_delta_weight("default")
        change = change.T if isinstance(layer.get_base_layer(), Conv1D) else change
        torch.testing.assert_close(factors[name].delta(), change, rtol=1e-6, atol=1e-6)
    extrapolate(folder, tmp_path / "out", 1.0)
    shipped = loaded(pico(kind), tmp_path / "out")
    torch.testing.assert_close(logits(shipped), negated(model, 1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_ships_is_of_one_rank_and_scale_and_loads_on_every_server(
    kind: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = saved(adapted(pico("llama"), **KINDS[kind]), tmp_path / "theirs")
    made = extrapolate(folder, tmp_path / "out", 1.0)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    largest = max(factors.rank for factors in read_factors(folder)[0].values())
    assert config["r"] == config["lora_alpha"] == made["rank"] == (16 if largest > 8 else 8)
    assert not any(config[name] for name in ("use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules"))
    assert (config["init_lora_weights"], config["layers_to_transform"]) == (True, None)
    assert not stopped(check(tmp_path / "out", str(pico("llama"))), SERVERS)


def test_at_a_lower_rank_the_truncation_error_is_reported(pico: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved(adapted(pico("llama"), **KINDS["both, rslora"]), tmp_path / "theirs")
    made = extrapolate(folder, tmp_path / "out", 2.0, ShippingConfig(rank=1))
    full, shipped = (read_factors(each)[0] for each in (folder, tmp_path / "out"))
    lost = sum((2 * full[n].delta() + shipped[n].delta()).double().norm() ** 2 for n in full) ** 0.5
    norm = sum((2 * full[n].delta()).double().norm() ** 2 for n in full) ** 0.5
    assert made["truncation_error"] == pytest.approx((lost / norm).item(), rel=1e-4)
    assert made["truncation_error"] > 0.05


def test_a_16_bit_adapter_is_folded_in_float32(theirs: Path, tmp_path: Path) -> None:
    weights = {key: tensor.bfloat16() for key, tensor in load_file(theirs / WEIGHTS).items()}
    save_file(weights, theirs / WEIGHTS)
    for name, (A, B) in read_factors(theirs)[0].items():
        assert A.dtype == B.dtype == torch.float32
        assert torch.equal(B, weights[f"base_model.model.{name}.lora_B.weight"].float() * 1.5)


def test_the_provenance_and_the_card_say_that_it_was_negated_and_not_measured(
    theirs: Path, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    made = extrapolate(theirs, tmp_path / "out", 1.5)
    assert made == json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert (made["kind"], made["method"], made["alpha"], made["data"]) == ("forget", "negated PEFT adapter", 1.5, {})
    assert made["base"]["model"] == str(pico("llama"))
    assert len(made["base"]["weights"]) == 64
    assert made["negated"]["adapter"] == str(theirs)
    assert made["negated"].items() >= {"r": 4, "lora_alpha": 6, "use_rslora": False}.items()
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "Negated adapter, alpha = 1.5",
        "not trained to forget by loramox",
        "nothing was\nmeasured",
        str(theirs),
    ):
        assert part in card
    assert "makes its base model forget" not in card
    assert "memoriz" not in card


def test_alpha_must_be_given_and_be_above_0(theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"--alpha is missing: {theirs} .*With --alpha 1"):
        extrapolate(theirs, tmp_path / "out")
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(SettingsError, match=f"--alpha {alpha:g}: at 0 .*Expected a finite number above 0"):
            extrapolate(theirs, tmp_path / "out", alpha)
    with pytest.raises(SettingsError, match="negated PEFT adapter has an alpha"):
        extrapolate(theirs, tmp_path / "out", 1.0, scale=0.5)
    assert not (tmp_path / "out").exists()


def test_the_base_may_be_elsewhere(theirs: Path, pico: Callable[[str], Path], tmp_path: Path) -> None:
    edit(theirs, base_model_name_or_path="/gone/model", revision="abc")
    with pytest.raises(
        ModelError,
        match=rf"^{theirs} names its base model \(give another with --base\): /gone/model: there is no such folder",
    ):
        extrapolate(theirs, tmp_path / "out", 1.0)
    made = extrapolate(theirs, tmp_path / "out", 1.0, ShippingConfig(base=str(pico("llama"))))
    assert (made["base"]["model"], made["base"]["revision"]) == (str(pico("llama")), None)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == str(pico("llama"))

    edit(theirs, base_model_name_or_path="owner/name")  # on the hub, and not on this machine
    with pytest.raises(ModelError, match=r"names its base model .*--base\): owner/name: no usable config.json there"):
        extrapolate(theirs, tmp_path / "other", 1.0)
    edit(theirs, base_model_name_or_path=None)
    with pytest.raises(AdapterError, match=rf"{theirs} does not name its base model.*--base"):
        extrapolate(theirs, tmp_path / "other", 1.0)
    with pytest.raises(ModelError, match=r"--base .*nowhere: there is no such folder"):
        extrapolate(theirs, tmp_path / "other", 1.0, ShippingConfig(base=str(tmp_path / "nowhere")))
    assert not (tmp_path / "other").exists()


def test_a_quantized_base_is_refused_for_its_16_bit_one(
    theirs: Path, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(pico("llama"), tmp_path / "model-bnb-4bit")
    config = json.loads((base / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(quantized))
    edit(theirs, base_model_name_or_path=str(base))
    with pytest.raises(ModelError, match=r"--base\): .*model-bnb-4bit is quantized already. Give the 16-bit model"):
        extrapolate(theirs, tmp_path / "out", 1.0)


def test_layers_that_do_not_fit_the_base_are_refused(theirs: Path, pico: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"{theirs} changes model.layers.0.* no such linear layer.*--base"):
        extrapolate(theirs, tmp_path / "out", 1.0, ShippingConfig(base=str(pico("gpt2"))))
    sizes = r"self_attn.k_proj by a ΔW of 32 × 64, and .* has 64 × 64 there.*--base"
    config = json.loads((pico("llama") / "config.json").read_text()) | {"num_key_value_heads": 4}
    (tmp_path / "wider").mkdir()
    (tmp_path / "wider" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=sizes):
        extrapolate(theirs, tmp_path / "out", 1.0, ShippingConfig(base=str(tmp_path / "wider")))
    assert not (tmp_path / "out").exists()


REFUSED = {
    "use_dora": ({"use_dora": True}, "DoRA also rescales"),
    "bias": ({"bias": "lora_only", "target_modules": ["c_attn"]}, "biases were trained too"),
    "lora_bias": ({"lora_bias": True}, "biases were trained too"),
    "modules_to_save": ({"modules_to_save": ["norm"]}, "whole layers were trained too"),
    "trainable_token_indices": ({"trainable_token_indices": [3, 4]}, "embeddings were trained too"),
    "target_parameters": (
        {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
        "parameters outside linear layers",
    ),
    "layer_replication": ({"layer_replication": [[0, 2], [0, 2]]}, "layers that the base model does not have"),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [5]}, "on only from its invocation tokens"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", REFUSED)
def test_a_variant_whose_change_is_more_than_a_product_is_refused_by_its_setting(
    setting: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    given, why = REFUSED[setting]
    folder = saved(adapted(pico("gpt2" if setting == "bias" else "llama"), **given), tmp_path / "theirs")
    says = rf"^{folder} is not a plain LoRA adapter \({setting}\): .*{why}.*\. Merge it with PEFT itself .*, or train it again without {setting}$"
    with pytest.raises(AdapterError, match=says):
        extrapolate(folder, tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()


def test_pissa_belongs_to_another_base_until_it_is_converted(pico: Callable[[str], Path], tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pico("llama")),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa"),
    )
    saved(model, tmp_path / "start")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.add_(0.1)
    saved(model, tmp_path / "theirs")
    says = r"\(init_lora_weights\): it started by changing the weights of the base.*path_initial_model_for_weight_conversion$"
    with pytest.raises(AdapterError, match=says):
        extrapolate(tmp_path / "theirs", tmp_path / "out", 1.0)

    # As PEFT's docs say, so that it does not change the base again when it reads the start.
    edit(tmp_path / "start", init_lora_weights=True)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    extrapolate(tmp_path / "plain", tmp_path / "out", 1.0)
    base, shipped, tuned = (AutoModelForCausalLM.from_pretrained(pico("llama")) for _ in range(3))
    shipped = PeftModel.from_pretrained(shipped, tmp_path / "out").merge_and_unload().state_dict()
    tuned = PeftModel.from_pretrained(tuned, tmp_path / "plain").merge_and_unload().state_dict()
    for name, weight in base.state_dict().items():
        torch.testing.assert_close(shipped[name] - weight, weight - tuned[name], rtol=0, atol=1e-5)


def test_a_variant_that_is_not_known_is_refused(theirs: Path, tmp_path: Path) -> None:
    edit(theirs, use_newlora=True, another_setting=None)
    with (
        pytest.warns(UserWarning, match="use_newlora"),
        pytest.raises(
            AdapterError,
            match=rf"^{theirs} has settings that this version of PEFT does not know \(use_newlora\).*Update peft$",
        ),
    ):
        extrapolate(theirs, tmp_path / "out", 1.0)


def test_other_methods_than_lora_are_refused(pico: Callable[[str], Path], tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pico("llama")),
        LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )
    saved(model, tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"theirs is a LOHA adapter \(peft_type\).*train it again with LoraConfig"):
        extrapolate(tmp_path / "theirs", tmp_path / "out", 1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_of_the_head_or_the_embeddings_is_refused(
    layer: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = saved(adapted(pico("llama"), target_modules=["q_proj", layer]), tmp_path / "theirs")
    says = rf"is not a plain LoRA adapter: .*{layer}.* is more than the A and B of a linear layer.*target_modules"
    with pytest.raises(AdapterError, match=says):
        extrapolate(folder, tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_head_saved_without_the_heads_own_weights_is_refused_too(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    model = adapted(pico("llama"), target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with pytest.raises(AdapterError, match=r"changes the output head lm_head.*target_modules"):
        extrapolate(tmp_path / "theirs", tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()


def test_an_adapter_saved_with_resized_embeddings_is_refused(pico: Callable[[str], Path], tmp_path: Path) -> None:
    model = adapted(pico("llama"), target_modules=["q_proj"])
    model.get_base_model().resize_token_embeddings(330)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    with pytest.raises(
        AdapterError, match=r"(lm_head|embed_tokens).weight is more than.*without resizing the embeddings"
    ):
        extrapolate(tmp_path / "theirs", tmp_path / "out", 1.0)


def test_a_pickle_is_never_loaded(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(load_file(theirs / WEIGHTS), theirs / "adapter_model.bin")
    (theirs / WEIGHTS).unlink()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(
        AdapterError, match=rf"^{theirs} has adapter_model.bin, a pickle.*save_pretrained.*safetensors$"
    ):
        extrapolate(theirs, tmp_path / "out", 1.0)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def gone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def halved(folder: Path) -> None:
    kept = {k: t for k, t in load_file(folder / WEIGHTS).items() if not k.endswith("0.mlp.up_proj.lora_B.weight")}
    save_file(kept, folder / WEIGHTS)


def emptied(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, f"{WEIGHTS} cannot be read"),
        (gone, f"{WEIGHTS} cannot be read .*missing or damaged"),
        (halved, "lacks a half of model.layers.0.mlp.up_proj"),
        (emptied, "has no LoRA weights"),
        (lambda folder: edit(folder, r=5), r"no factors of rank 5, which adapter_config.json gives it"),
        (lambda folder: edit(folder, rank_pattern={"down_proj": 8}), "down_proj are no factors of rank 8"),
        (lambda folder: edit(folder, alpha_pattern={"down_proj(": 8}), "alpha_pattern is damaged"),
        (lambda folder: edit(folder, rank_pattern={"down_proj": "8"}), "rank_pattern or alpha_pattern is damaged"),
        (lambda folder: edit(folder, rank_pattern=None), "rank_pattern or alpha_pattern is damaged"),
        (lambda folder: edit(folder, r=0), "r, lora_alpha, .* is damaged"),
        (lambda folder: edit(folder, peft_type="NEWER"), "is a NEWER adapter"),
        (lambda folder: (folder / CONFIG).write_text("{}"), "is no LoRA adapter that can be read.*peft_type"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "is no LoRA adapter that can be read"),
        (lambda folder: (folder / CONFIG).write_text('{"peft_type"'), "is no LoRA adapter that can be read"),
        (lambda folder: (folder / CONFIG).unlink(), "has no readable provenance.json"),
    ],
)
def test_damaged_files_are_refused(damage: Callable[[Path], object], says: str, theirs: Path, tmp_path: Path) -> None:
    damage(theirs)
    with pytest.raises(AdapterError, match=f"^{theirs}.*{says}"):
        extrapolate(theirs, tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused(theirs: Path, tmp_path: Path) -> None:
    save_file({k: t / 0 for k, t in load_file(theirs / WEIGHTS).items()}, theirs / WEIGHTS)
    with pytest.raises(AdapterError, match="is not finite"):
        extrapolate(theirs, tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()


def test_the_adapter_itself_is_never_overwritten(theirs: Path) -> None:
    before = (theirs / WEIGHTS).read_bytes()
    for overwrite in (False, True):
        with pytest.raises(RunError, match="holds other files"):
            extrapolate(theirs, theirs, 1.0, overwrite=overwrite)
    assert (theirs / WEIGHTS).read_bytes() == before


def test_what_extrapolate_wrote_is_refused_as_finished(theirs: Path, tmp_path: Path) -> None:
    extrapolate(theirs, tmp_path / "made", 1.0)
    composed = shutil.copytree(tmp_path / "made", tmp_path / "composed")
    provenance = json.loads((composed / "provenance.json").read_text()) | {"requests": [{"id": "a"}, {"id": "b"}]}
    (composed / "provenance.json").write_text(json.dumps(provenance))
    for finished in (tmp_path / "made", composed):
        with pytest.raises(AdapterError, match=rf"^{finished} is a forget adapter, .*It is finished: load it as it is"):
            extrapolate(finished, tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_run_of_loramox_is_not_negated_as_a_strangers(theirs: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, theirs / "momentum.safetensors")
    with pytest.raises(LoramoxError, match=r"is a checkpoint, and neither .* is there to say of which run"):
        extrapolate(theirs, tmp_path / "out", 1.0)
