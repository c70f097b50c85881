"""The guard: what it does to a direction of the input, and that it leaves the output on forget rows its size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from loramox import MemorizeConfig, MemorizeTrainer, ReferenceConfig, add_lora, load_reference
from loramox.algebra import Factors
from loramox.batches import Collator, Example
from loramox.memorize import guard as module
from loramox.memorize.guard import guard, guarded, second_moments
from loramox.reference import current_factors, lora_layers

Examples = tuple[list[Example], list[Example]]


@pytest.fixture
def model(pico: Callable[[str], Path]) -> PeftModel:
    """A pico Llama with an adapter that changes much."""
    reference = ReferenceConfig(str(pico("llama")), quantization="none", r=4, lora_alpha=8)
    torch.manual_seed(1)
    adapted = add_lora(load_reference(reference), reference)
    for _, layer in lora_layers(adapted):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return adapted


def test_directions_that_both_use_shrink_and_those_of_forget_rows_alone_stay() -> None:
    A, B = torch.randn(2, 4), torch.randn(3, 2)
    forget, retain = torch.diag(torch.tensor([2.0, 2.0, 0.0, 1.0])), torch.diag(torch.tensor([0.0, 2.0, 5.0, 9.0]))
    kept = guard(Factors(A, B), forget, retain, mu=3.0)
    assert torch.equal(kept.B, B)
    assert torch.allclose(kept.A / A, torch.tensor([1.0, 1 / 4, 0.0, 1 / 28]).expand(2, 4), atol=1e-4)


def test_it_is_the_formula_for_any_moments() -> None:
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    forget, retain = (X.T @ X for X in (torch.randn(20, 5), torch.randn(20, 5)))
    expected = A @ forget @ torch.linalg.inv(forget + 0.7 * retain)
    assert torch.allclose(guard(Factors(A, B), forget, retain, 0.7).A, expected, atol=1e-4)


def test_moments_are_those_of_the_inputs_without_padding_at_the_reference(model: PeftModel, examples: Examples) -> None:
    name = "model.layers.1.mlp.down_proj"
    found = second_moments(model, [name], examples[0], Collator(0), batch=3)[name]
    layer = dict(lora_layers(model))[name]
    inputs: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad(), model.disable_adapter():
        for example in examples[0]:
            model(torch.tensor([example["input_ids"]]))
    x = torch.cat(inputs)
    assert torch.allclose(found, x.T @ x / len(x), atol=1e-6)


def test_the_output_on_forget_rows_keeps_its_size_and_that_on_retain_rows_falls(
    model: PeftModel, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget, retain = examples
    before = current_factors(model)
    after = guarded(model, before, forget, retain, 1.0, Collator(0), 4)
    assert all(factors.rank == 4 for factors in after.values())

    def output(delta: dict[str, Factors], rows: list[Example]) -> float:
        moments = second_moments(model, list(delta), rows, Collator(0), 4)
        return sum(torch.trace(f.delta() @ moments[n] @ f.delta().T).item() for n, f in delta.items())

    assert output(after, forget) == pytest.approx(output(before, forget), rel=1e-3)
    assert output(after, retain) < 0.9 * output(before, retain)

    monkeypatch.setattr(module, "MEMORY", 1)  # a layer at a time
    again = guarded(model, before, forget, retain, 1.0, Collator(0), 4)
    for name, factors in after.items():
        assert torch.allclose(again[name].delta(), factors.delta(), atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_saved_is_guarded_unless_requests_share_its_subspace(
    shared: bool, pico: Callable[[str], Path], examples: Examples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    reference = ReferenceConfig(str(pico("llama")), quantization="none", r=4, lora_alpha=8, shared_subspace=shared)
    args = MemorizeConfig(
        output_dir=str(tmp_path / "memorization"),
        use_cpu=True,
        max_steps=2,
        guard=1.0,
        report_to="none",
        eval_strategy="no",
        eval_on_start=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    adapted = add_lora(load_reference(reference), reference)
    trainer = MemorizeTrainer(adapted, args, *examples, tokenizer)
    trainer.train()
    average = trainer.momentum.average
    trainer.save_model()
    saved = load_file(tmp_path / "memorization/momentum/adapter_model.safetensors")
    same = [torch.equal(saved[f"base_model.model.{name}.lora_A.weight"], f.A) for name, f in average.items()]
    assert all(same) if shared else not any(same)
