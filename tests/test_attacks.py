"""What comes back when somebody tries: the attacks, and that they leave nothing behind."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from loramox import Data, ReferenceConfig, load_reference
from loramox.adapter.folder import WEIGHTS
from loramox.data.encode import Example
from loramox.errors import LoramoxError, RunError, SettingsError
from loramox.evaluate import mean_log_p, score_answers
from loramox.evaluate.attacks import relearn, requantize
from loramox.evaluate.attacks.attack import AttackConfig, attack
from loramox.evaluate.attacks.bench import RECORD, Bench
from loramox.evaluate.attacks.config import ATTACKS
from loramox.evaluate.measure import ScoringConfig
from loramox.evaluate.records import read_records
from loramox.files import sha256_of
from loramox.model.config import ModelConfig

Examples = tuple[list[Example], list[Example]]


@pytest.fixture
def forget_model(pico: Callable[[str], Path], trained: Path) -> PeftModel:
    base = load_reference(ReferenceConfig(str(pico("llama")), quantization="none"))
    return PeftModel.from_pretrained(base, trained / "forget-adapter")


@pytest.fixture
def attacked(pico: Callable[[str], Path], trained: Path, rows: tuple[Path, Path], tmp_path: Path):
    """attacked(relearn_share=…) → what attacks.json holds, of the shared run's forget adapter."""

    def run(**settings) -> dict:
        defaults = {"relearn_steps": [1, 3], "relearn_share": 0.5, "attacks": ["relearn", "forms"]}
        config = AttackConfig(str(trained / "forget-adapter"), str(tmp_path / "attack"), **defaults | settings)
        model = ModelConfig(str(pico("llama")), quantization="none")
        return attack(config, model, Data(*map(str, rows)), ScoringConfig(max_new_tokens=8, use_cpu=True))

    return run


def test_relearning_brings_up_the_rows_it_trains_on_and_leaves_the_model_as_it_was(
    forget_model: PeftModel, examples: Examples
) -> None:
    before = {name: weight.clone() for name, weight in forget_model.state_dict().items()}
    known = examples[0][:2]
    start = mean_log_p(score_answers(forget_model, known)).mean()
    with relearn.attacker(forget_model, rank=4, seed=0) as model:
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert trained
        assert all(f".{relearn.ATTACKER}." in name for name in trained)
        np.testing.assert_allclose(mean_log_p(score_answers(model, known)).mean(), start, rtol=1e-6)  # B is 0
        steps = relearn.train(model, known, [5, 40], 1e-2, batch_size=2, pad_token_id=0, seed=0)
        after = [(step, mean_log_p(score_answers(model, known)).mean()) for step in steps]
    assert [step for step, _ in after] == [5, 40]
    assert after[1][1] > after[0][1] > start
    assert after[1][1] > start + 0.5
    left = forget_model.state_dict()
    assert left.keys() == before.keys()
    assert all(torch.equal(left[name], weight) for name, weight in before.items())
    assert mean_log_p(score_answers(forget_model, known)).mean() == start


def test_rows_that_the_attacker_has_are_not_asked(attacked, rows: tuple[Path, Path], tmp_path: Path) -> None:
    record = attacked()
    assert record["rows"] == {"attacker's": 2, "asked": 2}
    asked = {
        r["row"] for r in read_records(tmp_path / "attack" / "relearn-forget-rows-step-3") if r["part"] == "forget"
    }
    assert len(asked) == 2
    # The rows asked are the same in every state, so that what changes is the model's doing.
    for state in record["states"]:
        answered = {r["row"] for r in read_records(tmp_path / "attack" / state["folder"]) if r["part"] == "forget"}
        assert answered <= asked


def test_a_quick_attack_asks_few_rows_in_every_state(attacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramox.evaluate.attacks.attacked.QUICK_ROWS", 1)
    record = attacked(quick=True)
    assert record["rows"] == {"attacker's": 2, "asked": 1}
    for state in record["states"]:
        parts = [r["part"] for r in read_records(tmp_path / "attack" / state["folder"])]
        assert parts in (["forget"], ["forget", "retain"])
    assert record["row_counts"]["forget"] == {"read": 4, "used": 4, "left_out": {}}  # no row is too long
    with pytest.raises(
        RunError, match=r"made otherwise: rows, asked is 2, and was 1; --quick is false, and was true\. Give"
    ):
        attacked()


def test_merged_in_32_bits_it_is_the_adapter_and_in_few_bits_it_is_said_beside_the_unmerged_one(
    attacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # without llama.cpp, also where it is installed
    states = {s["state"]: s["metrics"] for s in attacked(attacks=["requantize"])["states"]}
    assert states["not quantized, merged"] == pytest.approx(states["forget model"], rel=1e-3)
    assert {f"{kind}, {how}" for kind in ("nf4", "int8") for how in ("not merged", "merged first")} <= states.keys()
    names = ("adapter in 4 bits", "forget model", "reference model")
    rounded, whole, reference = (np.log(states[name]["forget_probability"]) for name in names)
    assert 0 < abs(rounded - whole) < 0.5 * abs(reference - whole)
    assert not (tmp_path / "attack" / ".merged").exists()


def test_attacks_that_are_done_are_not_made_again(attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    first = attacked()

    def asked_again(*args, **kwargs):
        raise AssertionError("a model was asked again")

    monkeypatch.setattr("loramox.evaluate.measure.Questions.ask", asked_again)
    for name in ("bench.load_reference", "relearn.train", "requantize.merge"):
        monkeypatch.setattr(f"loramox.evaluate.attacks.{name}", asked_again)
    again = attacked()
    assert again["states"] == first["states"]
    assert (first["reused"], again["reused"]) == (0, len(first["states"]))
    with pytest.raises(
        RunError,
        match=r"otherwise: --relearn_rate is \[0.01\], and was \[0.001\]; --seed is 1, and was 0\. Give what was given before",
    ):
        attacked(seed=1, relearn_rate=[1e-2])


def test_attacks_on_other_weights_or_in_another_type_are_refused_and_those_that_say_neither_go_on(
    attacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(*_, **__) -> None:
        raise InterruptedError

    monkeypatch.setattr(Bench, "load", loading)
    with pytest.raises(InterruptedError):
        attacked()
    path = tmp_path / "attack" / RECORD
    held = json.loads(path.read_text())
    weights = held["adapter"].pop("weights")
    assert weights == sha256_of(Path(held["adapter"]["folder"]) / WEIGHTS)
    assert held.pop("dtype") == "float32"
    for name, other in (("adapter, weights", {"adapter": {"weights": "other"}}), ("dtype", {"dtype": "bfloat16"})):
        path.write_text(json.dumps(held | other))
        with pytest.raises(RunError, match=rf"made otherwise: {name} is "):
            attacked()
    path.write_text(json.dumps(held))  # as an older version left it
    with pytest.raises(InterruptedError):
        attacked()


def test_no_unquantized_model_is_loaded_where_the_model_is_quantized_and_one_is_in_memory_at_a_time(
    pico: Callable[[str], Path], trained: Path, rows: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    loaded: list[tuple[str, weakref.ref]] = []

    def loading(model: ModelConfig, device: torch.device, gguf: str | None):
        assert [each() for _, each in loaded if each() is not None] == []
        made = load_reference(model, device, gguf)
        loaded.append((model.quantization, weakref.ref(made)))
        return made

    monkeypatch.setattr("loramox.evaluate.attacks.bench.load_reference", loading)
    config = AttackConfig(str(trained / "forget-adapter"), str(tmp_path / "attack"), ["requantize"], relearn_share=0.5)
    model = ModelConfig(str(pico("llama")), quantization="nf4")
    record = attack(config, model, Data(*map(str, rows)), ScoringConfig(max_new_tokens=8, use_cpu=True))
    assert [kind for kind, _ in loaded] == ["nf4", "nf4", "int8", "int8"]
    assert all("--quantization none" in record["absent"][f"requantize: {kind}"] for kind in requantize.GGUF)
    assert "not quantized, merged" not in {state["state"] for state in record["states"]}
    assert not (tmp_path / "attack" / ".merged").exists()


def test_attacks_and_a_control_are_added_to_those_in_the_folder(
    attacked, pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("The sea is deep.")
    other = AutoModelForCausalLM.from_pretrained(pico("llama"))
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    shutil.copytree(pico("llama"), tmp_path / "retrained")
    other.save_pretrained(tmp_path / "retrained")
    steps = {"relearn_steps": [1]}
    first = attacked(attacks=["relearn"], **steps)
    assert {"control", "relearn unrelated text"} == first["absent"].keys()
    more = {"retrained_model": str(tmp_path / "retrained"), "relearn_text": str(tmp_path / "text.txt")}
    second = attacked(attacks=["context"], **steps, **more)
    assert second["settings"]["attacks"] == ["relearn", "context"]
    assert second["reused"] == len(first["states"])
    assert [s for s in second["states"] if s in first["states"]] == first["states"]
    assert second["states"][: len(first["states"])] != second["states"]
    assert "relearn unrelated text" in second["steps_saved"]
    assert second["absent"].keys().isdisjoint({"control", "relearn unrelated text"})
    monkeypatch.setattr("loramox.evaluate.attacks.bench.load_reference", lambda *args: pytest.fail("loaded"))
    again = attacked(attacks=["relearn"], **steps)  # what is in the folder stays in its record
    assert (again["states"], again["reused"]) == (second["states"], len(second["states"]))
    shutil.copytree(pico("llama"), tmp_path / "third")
    other.model.norm.weight.data.mul_(1.5)
    other.save_pretrained(tmp_path / "third")
    with pytest.raises(RunError, match=r"made otherwise: control, .*weights is .*, and was .* Only attacks, a control"):
        attacked(attacks=["relearn"], **steps, **more | {"retrained_model": str(tmp_path / "third")})


def test_the_same_seed_gives_the_same_figures_in_every_family(attacked, tmp_path: Path) -> None:
    settings = {"attacks": list(ATTACKS), "relearn_steps": [2], "sample_count": 4, "guidance": [1.0]}
    first = attacked(**settings)
    assert {state["attack"].split()[0] for state in first["states"]} == {"none", *ATTACKS}
    shutil.rmtree(tmp_path / "attack")
    assert attacked(**settings)["states"] == first["states"]
    shutil.rmtree(tmp_path / "attack")
    other = attacked(**settings | {"attacks": ["relearn", "sample"]}, seed=1)["states"]
    figures = {(s["attack"], s["state"]): s["metrics"] for s in first["states"]}
    assert not any(figures[s["attack"], s["state"]] == s["metrics"] for s in other if s["attack"].startswith("relearn"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attacks": ["guess"]}, r"--attacks takes relearn, requantize, forms, context, sample, pair"),
        ({"relearn_share": 1.0}, r"--relearn_share needs a share between 0 and 1"),
        ({"relearn_share": 0.01}, r"of 4 forget rows is 0: the attacker needs some"),
        ({"relearn_steps": [0]}, r"--relearn_steps needs numbers of 1 or more"),
        ({"relearn_rate": [float("nan")]}, r"--relearn_rate needs numbers above 0"),
        ({"scale": 0.0}, r"--scale needs a number above 0"),
        ({"scale": float("inf")}, r"--scale needs a number above 0"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(
    settings: dict, message: str, attacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramox.evaluate.attacks.bench.load_reference", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SettingsError, match=message):
        attacked(**settings)


def test_a_control_of_another_shape_is_refused_before_a_model_is_loaded(
    attacked, pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramox.evaluate.attacks.bench.load_reference", lambda *args: pytest.fail("loaded"))
    retrained = shutil.copytree(pico("llama"), tmp_path / "retrained")
    smaller = AutoConfig.from_pretrained(retrained, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(smaller).save_pretrained(retrained)
    with pytest.raises(
        SettingsError,
        match=r"--retrained_model .*retrained has another shape \(.*num_hidden_layers 1, .* than --model \(.*num_hidden_layers 2, ",
    ):
        attacked(retrained_model=str(retrained))
    assert not (tmp_path / "attack").exists()


def test_a_folder_with_other_files_is_left_alone(attacked, tmp_path: Path) -> None:
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / "thesis.txt").write_text("mine")
    with pytest.raises(LoramoxError, match="files in it that are no attacks"):
        attacked()
    assert json.dumps([f.name for f in (tmp_path / "attack").iterdir()]) == '["thesis.txt"]'
