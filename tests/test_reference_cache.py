"""What the reference says of a row is worked out once, whichever batch asks, and read back as it was."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loramox import ReferenceConfig, add_lora, load_reference
from loramox.data.encode import Example
from loramox.data.pairs import Collator
from loramox.train import reference_cache as known
from loramox.train.reference_cache import FrozenStates

Examples = tuple[list[Example], list[Example]]
COLLATE = Collator(0)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def reference(request, pico: Callable[[str], Path]) -> tuple[FrozenStates, list[int]]:
    """Of a pico Llama, and how many rows each pass through it had."""
    model = add_lora(load_reference(config := ReferenceConfig(str(pico("llama")), quantization="none")), config)
    model.to(request.param)
    passed: list[int] = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return FrozenStates(model, nullcontext), passed


def asked(of: FrozenStates, rows: list[Example]) -> Tensor:
    return of.states(of.causal_lm, COLLATE(rows))


def test_a_row_is_the_same_bit_by_bit_in_any_batch_and_near_to_a_pass_of_that_batch(
    reference, examples: Examples, tmp_path: Path
) -> None:
    of, _ = reference
    rows = examples[1]
    passed = asked(of, rows)
    of.remember(rows, COLLATE, tmp_path, 1e9)
    together, alone = asked(of, rows), torch.cat([asked(of, [row]) for row in rows])
    assert torch.equal(together, alone)
    assert together.dtype == passed.dtype
    tolerance = 1e-5 if passed.dtype == torch.float32 else 5e-2
    assert torch.allclose(together, passed, atol=tolerance, rtol=tolerance)


def test_each_row_goes_through_the_model_once(reference, examples: Examples, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(known, "GROUP_TOKENS", 40)  # a few rows
    of, passed = reference
    rows = examples[1]
    of.remember(rows, COLLATE, tmp_path, 1e9)
    first = [asked(of, [row]) for row in rows]
    assert sum(passed) == len(rows)
    assert 1 < len(passed) < len(rows)
    again = [asked(of, [row]) for row in rows]
    assert sum(passed) == len(rows)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_that_are_not_remembered_and_other_layers_are_passed_through(
    reference, examples: Examples, tmp_path: Path
) -> None:
    of, passed = reference
    of.remember(examples[1], COLLATE, tmp_path, 1e9)
    asked(of, examples[0])
    of.states(of.causal_lm, COLLATE(examples[1][:2]), layer=1)
    assert passed == [len(examples[0]), 2]


def test_nothing_is_kept_that_is_larger_than_allowed_and_nothing_is_left_on_the_disk(
    reference, examples: Examples, tmp_path: Path
) -> None:
    of, _ = reference
    assert of.remember(examples[1], COLLATE, tmp_path, 1000) == 0
    assert not of.kept
    size = of.remember(examples[1], COLLATE, tmp_path, 1e9)
    asked(of, examples[1])
    assert of.kept
    assert 0 < of._file.seek(0, os.SEEK_END) <= size
    assert not list(tmp_path.iterdir())  # a file without a name
    of.close()
    assert not of.kept


def test_the_state_of_dropout_is_as_before(reference, examples: Examples, tmp_path: Path) -> None:
    of, _ = reference
    of.remember(examples[1], COLLATE, tmp_path, 1e9)
    seen: list[bool] = []
    of.causal_lm.base_model.register_forward_hook(lambda module, args, output: seen.append(module.training))
    of.causal_lm.train()
    asked(of, examples[1])
    assert not any(seen)
    assert of.causal_lm.training
