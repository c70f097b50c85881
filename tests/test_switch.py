"""The switch: off is the base bit by bit, on is what was shipped, and nothing else on the model is touched."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramox import ForgetSwitch, ReferenceConfig, load_reference
from loramox.errors import AdapterError, SettingsError

IDS = torch.arange(2, 38).reshape(3, 12) * 7 % 320
QUANTIZATIONS = pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])


@pytest.fixture
def base(pico: Callable[[str], Path], quantization: str) -> PreTrainedModel:
    return load_reference(ReferenceConfig(str(pico("llama")), quantization=quantization))


@pytest.fixture
def quantization() -> str:
    """fp32, for the tests that are not parametrised."""
    return "none"


@pytest.fixture
def model(base: PreTrainedModel, trained: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, trained / "forget-adapter").eval()


@torch.no_grad()
def logits(model: nn.Module, **more) -> Tensor:
    return model(input_ids=IDS, **more).logits


def at_scale(model: PeftModel, scale: float) -> Tensor:
    """Logits with the shipped adapter at a scale that is set by hand, layer by layer."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.scaling["default"] = scale
    try:
        return logits(model)
    finally:
        for layer in layers:
            layer.scaling["default"] = 1.0


@QUANTIZATIONS
def test_off_is_the_base_bit_by_bit_and_at_a_scale_is_that_multiple_of_what_was_shipped(
    base: PreTrainedModel, trained: Path
) -> None:
    expected = logits(base)
    model = PeftModel.from_pretrained(base, trained / "forget-adapter").eval()
    by_hand = {scale: at_scale(model, scale) for scale in (0.5, 1.0, 2.0)}
    assert (by_hand[1.0] - expected).abs().max() > 0.05
    switch = ForgetSwitch(model)
    assert switch.scale == 1
    for scale, wanted in by_hand.items():
        switch.at(scale)
        assert torch.equal(logits(model), wanted)
        assert switch.scale == scale
        switch.off()
        assert torch.equal(logits(model), expected)
        assert switch.scale == 0
    switch.on()
    assert torch.equal(logits(model), by_hand[1.0])


def test_a_with_block_ends_at_the_scale_before_it_also_when_nested_and_after_an_exception(model: PeftModel) -> None:
    switch = ForgetSwitch(model)
    with switch.at(0.5) as inside:
        assert inside is switch
        assert switch.scale == 0.5
        with switch.off():
            assert switch.scale == 0
            with switch.at(3):
                assert switch.scale == 3
            assert switch.scale == 0
        assert switch.scale == 0.5
    assert switch.scale == 1

    shipped = logits(model)
    with pytest.raises(KeyError), switch.off():
        raise KeyError
    assert switch.scale == 1
    assert torch.equal(logits(model), shipped)

    switch.off()
    with switch.on():
        assert switch.scale == 1
    assert switch.scale == 0


def test_within_pefts_own_disable_adapter_a_with_block_leaves_the_state_as_it_found_it(model: PeftModel) -> None:
    switch, shipped = ForgetSwitch(model), logits(model)
    with model.disable_adapter():
        off = logits(model)
        with switch.at(2):
            assert switch.scale == 0
            assert torch.equal(logits(model), off)
        assert torch.equal(logits(model), off)
    assert switch.scale == 1
    assert torch.equal(logits(model), shipped)


@QUANTIZATIONS
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_rows_that_forget_and_rows_that_do_not_share_a_batch_bit_by_bit(scale: float, model: PeftModel) -> None:
    switch, forget = ForgetSwitch(model), [True, False, True]

    def greedy(**more) -> Tensor:
        attention = torch.ones_like(IDS)
        return model.generate(
            input_ids=IDS, attention_mask=attention, max_new_tokens=8, do_sample=False, eos_token_id=None, **more
        )

    switch.at(scale)
    on, on_text = logits(model), greedy()
    with switch.off():
        off, off_text = logits(model), greedy()
    mixed, mixed_text = (
        logits(model, adapter_names=switch.rows(forget)),
        greedy(adapter_names=switch.rows(forget)),
    )
    for row, forgets in enumerate(forget):
        assert torch.equal(mixed[row], (on if forgets else off)[row])
        assert torch.equal(mixed_text[row], (on_text if forgets else off_text)[row])
    assert not torch.equal(on, off)


def test_rows_are_refused_while_another_adapter_is_active_which_none_of_them_would_get(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert ForgetSwitch(model).rows([True, False]) == ["default", "__base__"]
    model.base_model.set_adapter(["other", "default"])
    with pytest.raises(AdapterError, match=r"other is active too.*in batches of their own"):
        ForgetSwitch(model).rows([True])


@pytest.mark.parametrize("training", [False, True], ids=["frozen", "trainable"])
def test_no_other_adapter_is_touched(training: bool, model: PeftModel) -> None:
    torch.manual_seed(2)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and "other" in m.lora_A]
    for layer in layers:
        nn.init.normal_(layer.lora_B["other"].weight, std=0.3)
    model.base_model.set_adapter("other")
    for layer in layers:
        layer.set_scale("other", 0.7)
        layer.lora_A["other"].weight.requires_grad_(training)
    other = logits(model)
    model.base_model.set_adapter(["other", "default"])
    for layer in layers:
        layer.lora_A["other"].weight.requires_grad_(training)

    def state() -> list[tuple]:
        return [
            (name, layer.scaling["other"], "other" in layer.active_adapters, [p.requires_grad for p in layer.parameters()])
            for name, layer in model.named_modules()
            if layer in layers
        ]  # fmt: skip

    before, both = state(), logits(model)
    assert not torch.equal(both, other)
    switch = ForgetSwitch(model)
    for _ in range(2):
        switch.off()
        assert state() == before
        assert torch.equal(logits(model), other)
        switch.at(2.0)
        assert state() == before
        switch.on()
        assert torch.equal(logits(model), both)
    with switch.off():
        assert torch.equal(logits(model), other)
    assert state() == before
    assert torch.equal(logits(model), both)


def test_setting_the_scale_that_it_has_changes_no_bit_when_another_adapter_comes_after_it(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    before = logits(model)
    ForgetSwitch(model).on()
    assert torch.equal(logits(model), before)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.active_adapters == ["default", "other"]


@pytest.mark.parametrize("scale", [-1.0, -0.01, math.nan, math.inf])
def test_a_scale_that_makes_no_forget_model_is_refused_and_changes_nothing(scale: float, model: PeftModel) -> None:
    switch = ForgetSwitch(model)
    switch.at(0.5)
    with pytest.raises(SettingsError, match="Expected 0"):
        switch.at(scale)
    assert switch.scale == 0.5


def test_layers_at_different_scales_are_an_error_and_not_the_scale_of_the_first(model: PeftModel) -> None:
    switch = ForgetSwitch(model)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    layers[-1].set_scale("default", 0.5)
    with pytest.raises(AdapterError, match=r"at different scales, 0.5 to 1: some were set by hand.*at\(scale\)"):
        _ = switch.scale
    by_hand = logits(model)
    with switch.at(2):
        assert switch.scale == 2
    assert layers[-1].scaling["default"] == 0.5
    assert torch.equal(logits(model), by_hand)
    switch.on()
    assert switch.scale == 1


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 0.7, 1.1, 17.3])
def test_the_scale_that_is_read_is_the_one_that_was_set_at_any_rank(scale: float, base: PreTrainedModel) -> None:
    model = get_peft_model(base, LoraConfig(r=5, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    switch = ForgetSwitch(model)
    switch.at(scale)
    assert switch.scale == scale


def test_layers_of_other_ranks_have_one_scale(base: PreTrainedModel) -> None:
    config = LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 7})
    switch = ForgetSwitch(get_peft_model(base, config))
    switch.at(0.7)
    assert switch.scale == pytest.approx(0.7, rel=1e-12)


def test_the_name_of_0_1_is_deprecated(model: PeftModel) -> None:
    switch = ForgetSwitch(model)
    switch.at(0.5)
    with pytest.warns(DeprecationWarning, match="now ForgetSwitch.scale"):
        assert switch.strength == 0.5


def test_a_name_that_is_no_adapter_is_refused_with_the_names_that_are(model: PeftModel, base: PreTrainedModel) -> None:
    with pytest.raises(AdapterError, match=r"no LoRA adapter 'forget' \(it has: default\)"):
        ForgetSwitch(model, "forget")
    with pytest.raises(AdapterError, match="it has: none"):
        ForgetSwitch(nn.Linear(2, 2))


def test_a_merged_adapter_is_refused_whether_merged_before_or_after_the_switch_was_made(model: PeftModel) -> None:
    switch = ForgetSwitch(model)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the weights"):
        ForgetSwitch(model)
    merged = logits(model)
    for change in (switch.off, switch.on, lambda: switch.at(0.5)):
        with pytest.raises(AdapterError, match="merged into the weights"):
            change()
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    switch.off()
    assert switch.scale == 0
