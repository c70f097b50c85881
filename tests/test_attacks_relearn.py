"""Relearning beside its control: the same attack on the retrained model, at several rates and on unrelated text."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loramox import Data
from loramox.errors import RowsError
from loramox.evaluate.attacks import relearn
from loramox.evaluate.attacks.attack import AttackConfig, attack
from loramox.evaluate.measure import ScoringConfig
from loramox.model.config import ModelConfig


@pytest.fixture
def attacked(
    pico: Callable[[str], Path],
    trained: Path,
    rows: tuple[Path, Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
):
    """attacked(relearn_rate=…) → attacks.json of the shared run's adapter; the control differs from the base in one hair."""
    other = AutoModelForCausalLM.from_pretrained(pico("llama"))
    with torch.no_grad():
        other.model.norm.weight.mul_(1 + 1e-6)
    other.save_pretrained(tmp_path / "retrained")
    tokenizer.save_pretrained(tmp_path / "retrained")

    def run(**settings) -> dict:
        defaults = {"attacks": ["relearn"], "relearn_steps": [1, 3], "relearn_share": 0.5, "relearn_rate": [1e-2]}
        defaults["retrained_model"] = str(tmp_path / "retrained")
        config = AttackConfig(str(trained / "forget-adapter"), str(tmp_path / "attack"), **defaults | settings)
        model = ModelConfig(str(pico("llama")), quantization="none")
        return attack(config, model, Data(*map(str, rows)), ScoringConfig(max_new_tokens=0, use_cpu=True))

    return run


def test_the_control_gets_the_very_same_attack(attacked) -> None:
    """With an adapter at nearly 0 the forget model is the control, so that both curves are one."""
    record = attacked(scale=1e-6)
    states = {(s["attack"], s["state"]): s["metrics"]["forget_probability"] for s in record["states"]}
    for rows in ("forget rows", "retain rows"):
        for step in (1, 3):
            ours, control = (states[f"relearn {rows}", f"step {step}{of}"] for of in ("", ", retrained model"))
            assert ours == pytest.approx(control, rel=1e-3)
        start = states["none", "forget model"]
        assert abs(states[f"relearn {rows}", "step 3"] - start) > 0.01 * start  # the attack did something


def test_each_rate_is_an_attack_of_its_own_and_done_ones_are_not_made_again(attacked, monkeypatch) -> None:
    first = attacked(relearn_rate=[1e-3, 1e-2])
    rates = {s["attack"].partition(", ")[2] for s in first["states"] if s["attack"].startswith("relearn")}
    assert rates == {"rate 0.001", "rate 0.01"}
    assert first["steps_saved"].keys() == {
        f"relearn {rows} rows, {rate}" for rows in ("forget", "retain") for rate in rates
    }
    monkeypatch.setattr(relearn, "train", lambda *args: pytest.fail("trained again"))
    assert attacked(relearn_rate=[1e-3, 1e-2])["states"] == first["states"]


def test_unrelated_text_is_the_attackers_only_where_it_is_given(
    attacked, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    text = tmp_path / "other" / "text.txt"
    text.write_text("The sea is deep.\n\nSalt is white.\n", encoding="utf-8")
    assert [row.answer for row in relearn.read_text(str(text))] == ["The sea is deep.", "Salt is white."]
    record = attacked(relearn_text=str(text), retrained_model=None)
    assert {s["state"] for s in record["states"] if s["attack"] == "relearn unrelated text"} == {"step 1", "step 3"}
    assert record["data"]["unrelated text"]["rows"] == 2
    assert record["absent"].keys() == {"control"}
    assert record["steps_saved"] == {}
    with pytest.raises(RowsError, match="are also in"):  # it is not unrelated
        attacked(relearn_text=str(rows[0]))
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RowsError, match=r"--relearn_text .*text\.txt cannot be read"):
        attacked(relearn_text=str(text))


def test_without_unrelated_text_the_reason_is_given(attacked) -> None:
    assert "--relearn_text" in attacked(retrained_model=None)["absent"]["relearn unrelated text"]


def test_an_attack_that_diverges_is_absent_and_not_a_model_that_forgets(attacked) -> None:
    record = attacked(relearn_rate=[1e30])
    for rows in ("forget rows", "retain rows"):
        for of in ("", ", retrained model"):
            assert "lower --relearn_rate than 1e+30" in record["absent"][f"relearn {rows}{of}"]
    probabilities = [s["metrics"]["forget_probability"] for s in record["states"]]
    assert all(map(math.isfinite, probabilities))


@pytest.mark.parametrize(
    ("ours", "step", "words"),
    [((0.1, 0.2, 0.5), 0, "gets there after 0 (20 saved)."), ((0.0, 0.02, 0.5), 5, "gets there after 5 (15 saved)."),
     ((0.0, 0.0, 0.0), None, "never gets there.")],
)  # fmt: skip
def test_steps_saved_are_counted_to_what_the_control_reaches_at_its_last_step(ours, step, words) -> None:
    control = (0.0, 0.03, 0.02)  # it need not rise to the end
    states = [
        {"attack": name, "state": state, "metrics": {"forget_probability": p}}
        for model, curve in (("", ours), (", retrained model", control))
        for (name, state), p in zip(
            [("none", model.removeprefix(", ") or "forget model"), *(("relearn forget rows", f"step {s}{model}") for s in (5, 20))],
            curve,
            strict=True,
        )
    ]  # fmt: skip
    found = relearn.saved(states)
    assert found == {"relearn forget rows": {"probability": 0.02, "control_step": 20, "step": step}}
    assert relearn.sentence(*found.popitem()).endswith(words)
