"""The trainer as a TRL user calls it: a model's name, and rows in any form."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from loramox import UnlearnConfig, UnlearnTrainer, add_lora, load_reference
from loramox.errors import RowsError, SettingsError
from loramox.model.lora import ReferenceConfig


def settings(out: Path, **more) -> UnlearnConfig:
    return UnlearnConfig(
        str(out), use_cpu=True, max_steps=1, eval_strategy="no", eval_on_start=False, save_strategy="no",
        report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip


def test_a_name_and_rows_in_any_form_train_the_same(pico, rows, tmp_path) -> None:
    records = [[json.loads(line) for line in path.read_text().splitlines()] for path in rows]
    forms = {
        "files": rows,
        "text": [str(path) for path in rows],
        "lists": records,
        "datasets": [Dataset.from_list(some) for some in records],
    }
    losses = set()
    for name, (forget, retain) in forms.items():
        model = str(pico("llama"))
        trainer = UnlearnTrainer(model, settings(tmp_path / name), forget, retain)
        losses.add(trainer.train().training_loss)
        trainer.save_model()
        assert (tmp_path / name / "adapter_model.safetensors").exists()
    assert len(losses) == 1


def test_a_method_trains_at_its_own_lora_scale(pico, rows, tmp_path) -> None:
    reference = ReferenceConfig(str(pico("llama")), quantization="none", r=4)
    trainer = UnlearnTrainer(reference, settings(tmp_path, method="npo_mean"), *rows)
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 32)


def test_what_is_missing_is_named_before_the_model_is_loaded(pico, tokenizer, rows, tmp_path) -> None:
    reference = ReferenceConfig(str(pico("llama")), quantization="none", r=4)
    model = add_lora(load_reference(reference), reference)
    with pytest.raises(SettingsError, match="processing_class is missing"):
        UnlearnTrainer(model, settings(tmp_path), *rows)
    with pytest.raises(SettingsError, match="forget_dataset is empty"):
        UnlearnTrainer("no/model", settings(tmp_path), [], rows[1])
    with pytest.raises(RowsError, match=r"retain_dataset has columns a\. Expected question and answer"):
        UnlearnTrainer("no/model", settings(tmp_path), rows[0], [{"a": "b"}])
    with pytest.raises(SettingsError, match=r"auto_retain=9 is for loramox\.unlearn"):
        UnlearnTrainer("no/model", settings(tmp_path, auto_retain=9), *rows)
    with pytest.raises(SettingsError, match=r"forget_to=0\.05 is for loramox\.unlearn"):
        UnlearnTrainer("no/model", settings(tmp_path, forget_to=0.05), *rows)
    with pytest.raises(SettingsError, match="--stop_when_forgotten needs a target"):
        UnlearnTrainer("no/model", settings(tmp_path, stop_when_forgotten=True), *rows)
    encoded = [{"input_ids": [1, 2], "labels": [-100, 2], "row": "r", "source": "r"}]
    with pytest.raises(SettingsError, match=r"method po teaches another answer.* Give wanted_dataset"):
        UnlearnTrainer(model, settings(tmp_path, method="po"), encoded, encoded, processing_class=tokenizer)
    for more in ({"tuned_adapter": "mine"}, {"memorize_at": "earlier"}, {"shard": True}):
        with pytest.raises(SettingsError, match=f"{next(iter(more))} is for loramox.unlearn"):
            UnlearnTrainer(ReferenceConfig("no/model", **more), settings(tmp_path), *rows)
    with pytest.raises(RowsError, match="are also in"):
        UnlearnTrainer("no/model", settings(tmp_path), rows[0], rows[0])
