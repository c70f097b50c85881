"""Device and type of the arithmetic, on pretended machines: no absent GPU, and no 16-bit type that is emulated in silence."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramox import Data, ReferenceConfig, UnlearnConfig
from loramox.adapter.loading import put_on
from loramox.model.config import check_device
from loramox.model.precision import has_bf16
from loramox.train.prepare import _settle

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A GPU of the architecture in the parameter: sm_75 is a T4, sm_80 an A100."""

    def supported(including_emulation: bool = True) -> bool:
        return request.param >= 80 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Any warning of ours is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*bfloat16.*")
        yield


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_that_torch_was_built_for_and_the_machine_does_not_have_is_not_used(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built_for_cuda(check_available: bool = False) -> torch.device | None:
        return GPU if there or not check_available else None

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    reference = ReferenceConfig("model")
    assert check_device(reference) == (GPU if there else CPU)
    assert check_device(reference, use_cpu=True) == CPU


def test_an_adapter_is_read_to_the_device_of_its_model_and_not_to_a_gpu_that_is_there(
    pico: Callable[[str], Path], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    model = put_on(AutoModelForCausalLM.from_pretrained(pico("llama")), trained / "forget-adapter")
    assert {parameter.device for parameter in model.parameters()} == {CPU}


@pytest.mark.parametrize("card", [75], indirect=True)
@pytest.mark.usefixtures("card")
def test_a_gpu_without_bfloat16_computes_in_float16_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"no bfloat16 arithmetic.*computing in float16"):
        assert ReferenceConfig("model").torch_dtype(GPU) == torch.float16
    with pytest.warns(UserWarning, match=r"--dtype bfloat16: this GPU has no bfloat16.*float16 is faster"):
        assert ReferenceConfig("model", dtype="bfloat16").torch_dtype(GPU) == torch.bfloat16


@pytest.mark.parametrize("card", [80, 90], indirect=True)
@pytest.mark.usefixtures("card", "quiet")
def test_a_gpu_with_bfloat16_computes_in_it() -> None:
    assert ReferenceConfig("model").torch_dtype(GPU) == torch.bfloat16
    assert ReferenceConfig("model", dtype="bfloat16").torch_dtype(GPU) == torch.bfloat16


@pytest.mark.parametrize(("card", "expected"), [(75, (False, True)), (80, (True, False))], indirect=["card"])
@pytest.mark.usefixtures("card", "quiet")  # loading the model says so, unless --dtype asks for another type
def test_training_is_in_the_16_bit_type_that_the_gpu_has(
    expected: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)  # it would look for the GPU
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 1)
    args = UnlearnConfig("out", report_to="none")
    assert (args.bf16, args.fp16) == expected
    assert args.mixed_precision == ("bf16" if expected[0] else "fp16")


@pytest.mark.parametrize("card", [75, 80], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        ("float32", {}, "no"),
        ("bfloat16", {}, "bf16"),
        ("float16", {}, "fp16"),
        ("auto", {}, None),  # what the card has
        *((dtype, {given: True}, given) for dtype in ("float32", "bfloat16", "float16") for given in ("bf16", "fp16")),
    ],
)
@pytest.mark.usefixtures("card")
@pytest.mark.filterwarnings("ignore:.*this GPU has no bfloat16")
def test_a_model_is_trained_in_the_type_that_it_is_loaded_in_unless_a_flag_says_otherwise(
    dtype: str, given: dict[str, bool], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)  # it would look for the GPU
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 1)
    args = UnlearnConfig("out", report_to="none", **given)
    expected = expected or args.mixed_precision
    _settle(ReferenceConfig("model", dtype=dtype), Data("forget", "retain"), args)
    assert args.mixed_precision == expected
    assert (args.bf16, args.fp16) == (expected == "bf16", expected == "fp16")


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_on_a_cpu_training_has_no_autocast_whatever_the_model_is_loaded_in(dtype: str) -> None:
    args = UnlearnConfig("out", report_to="none", use_cpu=True)
    args.match_precision(dtype)
    assert (args.bf16, args.fp16, args.mixed_precision) == (False, False, "no")


@pytest.mark.parametrize("has", ["amx_bf16", "avx512_bf16", "bf16", None])
def test_bfloat16_on_a_cpu_that_emulates_it_is_a_warning(has: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False} | {has: True})
    assert has_bf16(CPU) == (has is not None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ReferenceConfig("model", dtype="bfloat16").torch_dtype(CPU)
        UnlearnConfig("out", use_cpu=True, bf16=True, report_to="none")
        ReferenceConfig("model").torch_dtype(CPU)
        UnlearnConfig("out", use_cpu=True, report_to="none")
    said = [str(w.message).split(":")[0] for w in seen if "this CPU has no bfloat16" in str(w.message)]
    assert said == ([] if has else ["--dtype bfloat16", "--bf16"])
