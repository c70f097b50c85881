"""The reference model: which models can be one, what LoRA adapts in it, and that it stays what it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SHAPES
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlavaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    T5Config,
    modeling_utils,
)
from transformers.pytorch_utils import Conv1D

from loramox import ReferenceConfig, UnlearnConfig, UnlearnTrainer, add_lora, load_reference
from loramox.data.encode import Example
from loramox.errors import ModelError, SettingsError
from loramox.model.config import identify, read_config, skeleton
from loramox.model.lora import adapter_off, at_scale, check_trained, current_factors, lora_layers, with_factors

Examples = tuple[list[Example], list[Example]]
ALL = pytest.mark.parametrize("kind", SHAPES)
IDS = torch.arange(2, 26).reshape(2, 12) * 7 % 320


def adapted(folder: Path, quantization: str = "none", spread: float = 0.0) -> PeftModel:
    """A reference with fresh LoRA of rank 4 and scale 2, and with B drawn at random when it has a spread."""
    reference = ReferenceConfig(str(folder), quantization=quantization, r=4, lora_alpha=8)
    torch.manual_seed(1)
    model = add_lora(load_reference(reference), reference)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B["default"].weight, std=spread) if spread else None
    return model


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trainer_of(
    model: PeftModel, examples: Examples, tokenizer: PreTrainedTokenizerFast, out: Path, **settings
) -> UnlearnTrainer:
    args = UnlearnConfig(
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        warmup_steps=0,
        learning_rate=1e-2,
        disable_tqdm=True,
        **settings,
    )
    return UnlearnTrainer(model, args, *examples, tokenizer)


@pytest.mark.parametrize(
    ("way", "message"), [("flash_attention_2", "--attn_implementation flash_attention_2: .*install"), ("none", "eager")]
)
def test_a_way_to_compute_attention_that_is_not_there_is_refused_before_loading(
    way: str, message: str, pico: Callable[[str], Path]
) -> None:
    reference = ReferenceConfig(str(pico("llama")), quantization="none", attn_implementation=way)
    for make in (lambda: skeleton(read_config(reference), reference), lambda: load_reference(reference)):
        with pytest.raises(ModelError, match=message):
            make()


def test_attention_is_computed_as_asked_and_says_the_same(pico: Callable[[str], Path]) -> None:
    models = {
        way: load_reference(ReferenceConfig(str(pico("llama")), quantization="none", attn_implementation=way))
        for way in (None, "eager")
    }
    assert {way: model.config._attn_implementation for way, model in models.items()} == {None: "sdpa", "eager": "eager"}
    torch.testing.assert_close(logits(models["eager"]), logits(models[None]), rtol=1e-5, atol=1e-5)


def test_each_file_of_weights_is_opened_once(pico: Callable[[str], Path], tmp_path: Path, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    model.save_pretrained(tmp_path, max_shard_size=sum(p.nbytes for p in model.parameters()) // 3)
    opened = []
    real = modeling_utils.safe_open

    def counted(file: str, *args, **kwargs):
        opened.append(Path(file).name)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_open", counted)
    load_reference(ReferenceConfig(str(tmp_path), quantization="none"))
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(opened) == files


@ALL
def test_every_linear_layer_but_the_head_is_adapted(kind: str, pico: Callable[[str], Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(pico(kind))
    head = base.get_output_embeddings()
    linear = {name for name, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    assert {name for name, _ in lora_layers(adapted(pico(kind)))} == linear


@ALL
def test_the_kl_term_is_zero_at_initialisation_though_the_model_is_in_training_mode(
    kind: str, pico: Callable[[str], Path], examples: Examples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = trainer_of(adapted(pico(kind)), examples, tokenizer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with at_scale(trainer.model, -8.0):
        assert trainer.compute_loss(trainer.model, {"retain": batch["retain"]}).item() == 0


def test_the_gpt2_of_these_tests_has_dropout_in_its_config(pico: Callable[[str], Path]) -> None:
    """Or the law above would say nothing about it."""
    assert json.loads((pico("gpt2") / "config.json").read_text())["resid_pdrop"] == 0.1


@ALL
def test_a_training_step_changes_only_lora_weights_and_adapter_off_is_the_base_bit_by_bit(
    kind: str, pico: Callable[[str], Path], examples: Examples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = adapted(pico(kind), spread=0.1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainer_of(model, examples, tokenizer, tmp_path, max_steps=1).train()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(pico(kind))))


@ALL
def test_strength_0_is_the_reference_and_minus_1_the_memorization_model_and_s_is_theta_ref_minus_s_delta(
    kind: str, pico: Callable[[str], Path]
) -> None:
    model = adapted(pico(kind), spread=0.1)
    memorization, reference = logits(model), logits(AutoModelForCausalLM.from_pretrained(pico(kind)))
    assert (memorization - reference).abs().max() > 0.05
    with at_scale(model, 0):
        assert torch.equal(logits(model), reference)
    with at_scale(model, 1.0):
        assert torch.equal(logits(model), memorization)
    with at_scale(model, -2.5):
        forget = logits(model)
    assert torch.equal(logits(model), memorization)
    dense = with_dense(AutoModelForCausalLM.from_pretrained(pico(kind)), model, -2.5)
    torch.testing.assert_close(forget, logits(dense), rtol=1e-4, atol=1e-5)


def with_dense(base: PreTrainedModel, model: PeftModel, factor: float) -> PreTrainedModel:
    """`base` + factor·ΔW in its weights, ΔW computed here from the PEFT layers' own tensors (scale 8 / 4)."""
    for name, layer in lora_layers(model):
        delta = 2 * layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data
        module = base.get_submodule(name)
        module.weight.data += factor * (delta.T if isinstance(module, Conv1D) else delta)
    return base


def test_factors_of_another_rank_stand_in_for_the_adapter_and_its_own_come_back(pico: Callable[[str], Path]) -> None:
    model = adapted(pico("llama"), spread=0.1)
    own, memorization = current_factors(model), logits(model)
    wider = {name: type(f)(torch.cat([f.A, f.A]), torch.cat([f.B, f.B], dim=1)) for name, f in own.items()}
    dense = with_dense(AutoModelForCausalLM.from_pretrained(pico("llama")), model, 2.0)
    with with_factors(model, wider):
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), memorization)


def test_what_is_frozen_of_an_adapter_is_still_frozen_after_it_was_off(pico: Callable[[str], Path]) -> None:
    """PEFT makes all of it trainable when it is switched on again; a frozen A would then count in gradient clipping."""
    reference = ReferenceConfig(str(pico("llama")), quantization="none", shared_subspace=True)
    model = add_lora(load_reference(reference), reference)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any("lora_A" in name and not flag for name, flag in before.items())
    with adapter_off(model):
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_every_quantization_trains_and_adapter_off_is_still_the_base_bit_by_bit(
    quantization: str,
    pico: Callable[[str], Path],
    examples: Examples,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    untouched = load_reference(ReferenceConfig(str(pico("llama")), quantization=quantization))
    model = adapted(pico("llama"), quantization)
    before = logits(model)
    assert torch.equal(before, logits(untouched))
    trainer_of(model, examples, tokenizer, tmp_path, max_steps=3).train()
    assert (logits(model) - before).abs().max() > 0.01
    assert all(f.B.abs().max() > 0 for f in current_factors(model).values())
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_through_nf4_are_the_same_after_an_evaluation_as_without_one(pico: Callable[[str], Path]) -> None:
    """On a CPU with avx512_bf16 bitsandbytes repacks 4-bit weights in an evaluation, and they pass no gradient after."""
    expected = gradients(adapted(pico("llama"), "nf4", spread=0.1))
    model = adapted(pico("llama"), "nf4", spread=0.1)
    before = logits(model)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(g.abs().max() > 0 for g in found.values())
    assert torch.equal(logits(model), before)


def refused(folder: Path, config: PretrainedConfig, architecture: str | None) -> str:
    """The message that a folder with nothing but this config.json in it is refused with."""
    folder.mkdir()
    written = config.to_dict() | ({"architectures": [architecture]} if architecture else {})
    (folder / "config.json").write_text(json.dumps(written, default=str))
    with pytest.raises(ModelError) as caught:
        load_reference(ReferenceConfig(str(folder)))
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "architecture", "says"),
    [
        (T5Config(), "T5ForConditionalGeneration", "T5ForConditionalGeneration, not a causal language model"),
        (T5Config(), None, "t5, not a causal language model"),
        (BertConfig(), "BertForMaskedLM", "BertForMaskedLM, not a causal language model"),
        (BertConfig(), None, "bert, not a causal language model"),
        (MixtralConfig(num_hidden_layers=1), "MixtralForCausalLM", "mixture of experts (mixtral"),
        (Qwen3MoeConfig(num_hidden_layers=1), "Qwen3MoeForCausalLM", "mixture of experts (qwen3_moe"),
        (LlavaConfig(), "LlavaForConditionalGeneration", "multimodal model (llava"),
    ],
    ids=["t5", "t5-bare", "bert", "bert-bare", "mixtral", "qwen3-moe", "llava"],
)
def test_a_model_that_cannot_be_the_reference_is_refused_by_name_before_loading(
    config: PretrainedConfig, architecture: str | None, says: str, tmp_path: Path
) -> None:
    assert says in refused(tmp_path / "model", config, architecture)


def test_a_quantized_model_is_refused_because_servers_load_the_one_it_was_made_from(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((pico("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized already"):
        load_reference(ReferenceConfig(str(tmp_path)))


def test_a_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"--model {tmp_path / 'nowhere'}: there is no such folder"):
        load_reference(ReferenceConfig(str(tmp_path / "nowhere")))


def test_target_modules_that_the_model_does_not_have_are_refused_by_name(pico: Callable[[str], Path]) -> None:
    reference = ReferenceConfig(str(pico("llama")), quantization="none", target_modules=["c_attn"])
    with pytest.raises(ModelError, match=r"--target_modules.*c_attn"):
        add_lora(load_reference(reference), reference)


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("lora_alpha", 0), ("lora_alpha", -16)])
def test_a_rank_or_a_lora_alpha_below_1_is_refused_with_its_flag(field: str, value: int) -> None:
    with pytest.raises(SettingsError, match=f"--{field} needs"):
        ReferenceConfig("model", **{field: value})


def test_models_that_differ_in_weights_alone_are_told_apart_whatever_format_they_are_in(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    def weights(folder: Path) -> str | None:
        reference = ReferenceConfig(str(folder))
        return identify(reference, read_config(reference))["weights"]

    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    seen = [weights(pico("llama"))]
    for name in ("tuned", "bin", "tuned-bin"):
        folder = tmp_path / name
        model.model.norm.weight.data += 1
        model.save_pretrained(folder)
        if "bin" in name:
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        seen.append(weights(folder))
    assert None not in seen
    assert len(set(seen)) == 4
    assert weights(pico("llama")) == seen[0]


def test_an_adapted_output_head_is_refused_by_the_name_of_its_flag(pico):
    reference = ReferenceConfig(model=str(pico("llama")), quantization="none", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match=r"output head is adapted.*--target_modules"):
        add_lora(load_reference(reference), reference)


def test_an_adapted_embedding_is_refused_as_it_could_not_be_turned(pico):
    reference = ReferenceConfig(
        model=str(pico("llama")), quantization="none", target_modules=["q_proj", "embed_tokens"]
    )
    with pytest.raises(
        ModelError, match=r"2 weights are trained that.*lora_embedding_A.*leave embeddings out of --target_modules"
    ):
        add_lora(load_reference(reference), reference)


@pytest.mark.parametrize(
    "variant",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["norm"]},
        {"bias": "lora_only"},
    ],
    ids=lambda variant: next(iter(variant)),
)
def test_a_users_own_adapter_of_another_kind_than_plain_lora_is_refused_by_name(pico, variant: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **variant))
    with pytest.raises(ModelError, match=rf"not a plain LoRA adapter \({next(iter(variant))}\).*add_lora"):
        check_trained(adapted)


def test_weights_beside_the_adapter_must_be_frozen(pico) -> None:
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pico("llama")),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )
    check_trained(adapted)
    adapted.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ModelError, match=r"1 weights are trained.*first: base_model\.model\.model\.norm\.weight"):
        check_trained(adapted)


def test_a_hub_id_is_recorded_with_the_commit_that_it_stood_for(
    monkeypatch: pytest.MonkeyPatch, pico: Callable[[str], Path]
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = f"/cache/models--owner--name/snapshots/{commit}/config.json"
    monkeypatch.setattr("loramox.model.config.cached_file", lambda *args, **kwargs: cached)
    config = read_config(ReferenceConfig(str(pico("llama"))))
    assert identify(ReferenceConfig("owner/name", revision="main"), config)["revision"] == commit
    assert identify(ReferenceConfig(str(pico("llama")), revision="main"), config)["revision"] == "main"
