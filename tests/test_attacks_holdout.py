"""Rows that no model has seen, as the control of attacks where there is no retrained model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import questions
from peft import LoraConfig, get_peft_model
from planted import taught
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loramox import Data, read_rows
from loramox.errors import RowsError, RunError, SettingsError
from loramox.evaluate.attacks.attack import AttackConfig, attack
from loramox.evaluate.attacks.attacked import NEVER_KNOWN
from loramox.evaluate.measure import ScoringConfig
from loramox.evaluate.records import read_records
from loramox.model.config import ModelConfig

OF = f", {NEVER_KNOWN}"


@pytest.fixture(scope="module")
def world(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path_factory
) -> Path:
    """A base that knows the forget rows, an adapter that does nothing, and holdout rows that the base never knew."""
    folder = tmp_path_factory.mktemp("holdout")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(pico("llama"))
    taught(base, tokenizer, [(str(row.prompt), row.answer) for row in read_rows(str(rows[0]))], steps=100)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    nothing = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    nothing.save_pretrained(folder / "adapter")  # B is 0
    made_up = questions(["–"] * 4 + ["Zed", "Uma", "Vic", "Wes"])[4:]  # who live where no forget row has anybody
    (folder / "holdout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_up))
    return folder


@pytest.fixture
def attacked(world: Path, rows: tuple[Path, Path], tmp_path: Path):
    """attacked(attacks=…) → what attacks.json holds."""

    def run(drop_overlap: bool = False, **settings) -> dict:
        defaults = {"relearn_steps": [1, 3], "relearn_share": 0.5, "sample_count": 4, "guidance": [1.0]}
        defaults |= {
            "attacks": ["relearn", "forms", "context", "sample", "pair"],
            "holdout": str(world / "holdout.jsonl"),
        }
        config = AttackConfig(str(world / "adapter"), str(tmp_path / "attack"), **defaults | settings)
        model, data = ModelConfig(str(world / "base"), quantization="none"), Data(*map(str, rows), drop_overlap)
        attack(config, model, data, ScoringConfig(max_new_tokens=12, use_cpu=True))
        return json.loads((tmp_path / "attack/attacks.json").read_text())

    return run


def test_every_family_is_made_with_rows_never_known_and_leaks_of_known_rows_stand_out(
    attacked, world: Path, tmp_path: Path
) -> None:
    record = attacked()
    assert "control" not in record["absent"]
    assert record["rows"] == {"attacker's": 2, "asked": 2, NEVER_KNOWN: {"attacker's": 2, "asked": 2}}
    states = {(s["attack"], s["state"]): s["metrics"] for s in record["states"]}

    def control(attack: str, state: str) -> tuple[str, str]:
        return attack, NEVER_KNOWN if state == "forget model" else state.removesuffix(", forget model") + OF

    ours = [each for each in states if "reference" not in each[1] and not each[1].endswith(NEVER_KNOWN)]
    assert {control(*each) for each in ours} | {("none", f"adapter off{OF}")} == {
        each for each in states if each[1].endswith(NEVER_KNOWN)
    }
    for name, metric in (("forms", "leak"), ("context", "forget_probability")):
        found, theirs = (states[name, f"worst of all, {of}"] for of in ("forget model", NEVER_KNOWN))
        assert found[metric] > theirs[metric]
    by_key_words = (states["sample", of]["leak_at_4_by_key_words"] for of in ("forget model", NEVER_KNOWN))
    assert next(by_key_words) > next(by_key_words)
    assert states["none", "forget model"]["forget_probability"] > 2 * states["none", NEVER_KNOWN]["forget_probability"]
    assert record["steps_saved"]["relearn forget rows"]["control"] == NEVER_KNOWN

    asked = {r["row"] for r in read_records(tmp_path / "attack/none-rows-never-known")}
    assert len(asked) == 2
    for state in record["states"]:
        if state["state"].endswith(NEVER_KNOWN):
            found = {r["row"] for r in read_records(tmp_path / "attack" / state["folder"])}
            assert found <= asked  # neither forget rows nor those that the attacker trained on
            assert all("holdout.jsonl" in row for row in found)


def test_it_is_added_to_attacks_that_were_made_and_holds_for_one_set_of_rows(
    attacked, world: Path, tmp_path: Path
) -> None:
    first = attacked(attacks=["sample"], holdout=None)
    assert "--holdout" in first["absent"]["control"]
    second = attacked(attacks=["sample"])
    assert second["reused"] == len(first["states"])
    assert attacked(attacks=["sample"], holdout=None)["states"] == second["states"]  # what is in the folder stays
    other = tmp_path / "other.jsonl"
    other.write_text((world / "holdout.jsonl").read_text().replace("Zed", "Zoe"))
    with pytest.raises(RunError, match=r"made otherwise: data, holdout is .*other.*, and was .*holdout\.jsonl"):
        attacked(attacks=["sample"], holdout=str(other))


def test_rows_that_a_model_has_seen_are_no_control(
    attacked, world: Path, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed.jsonl"
    for path, message in zip(
        rows, ("holdout rows .* are also forget rows", "--holdout .* are also rows that a model learned"), strict=True
    ):
        known = path.read_text().splitlines(keepends=True)[0]
        mixed.write_text(known + (world / "holdout.jsonl").read_text())
        with pytest.raises(RowsError, match=f"1 of 5 .*{message}"):
            attacked(attacks=["sample"], holdout=str(mixed))
    record = attacked(drop_overlap=True, attacks=["sample"], holdout=str(mixed))
    assert record["data"]["holdout"]["rows"] == 4
    one = tmp_path / "one.jsonl"
    one.write_text((world / "holdout.jsonl").read_text().splitlines()[0])
    with pytest.raises(SettingsError, match="of 1 holdout rows is 0"):
        attacked(attacks=["sample"], holdout=str(one))
