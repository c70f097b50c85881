"""lm-evaluation-harness measures the shipped adapter by its own command line, with nothing of ours in between."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from peft import PeftModel

from loramox import ReferenceConfig, load_reference
from loramox.data.encode import Example
from loramox.evaluate import score_answers

TASK = Path(__file__).parents[1] / "recipes/lm_eval/demo_forget.yaml"


def test_the_harness_and_we_find_the_same_likelihoods_under_the_shipped_adapter(
    pico: Callable[[str], Path],
    trained: Path,
    rows: tuple[Path, Path],
    examples: tuple[list[Example], list[Example]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    task = yaml.safe_load(TASK.read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(rows[0])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task.yaml").write_text(yaml.safe_dump(task))
    adapter = trained / "forget-adapter"
    flags = {
        "model": "hf",
        "model_args": f"pretrained={pico('llama')},peft={adapter}",
        "tasks": task["task"],
        "include_path": str(tmp_path / "tasks"),
        "device": "cpu",
        "output_path": str(tmp_path / "out"),
    }
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    # Reading all of the harness's own tasks takes many seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(
        sys, "argv", ["lm_eval", "--log_samples", *(f"--{name}={value}" for name, value in flags.items())]
    )
    cli_evaluate()
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    theirs = [json.loads(line)["perplexity"] for line in samples.read_text().splitlines()]
    base = load_reference(ReferenceConfig(str(pico("llama")), quantization="none"))
    adapted = PeftModel.from_pretrained(base, adapter)
    with adapted.disable_adapter():
        without = sums(adapted, examples[0])
    np.testing.assert_allclose(theirs, sums(adapted, examples[0]), rtol=1e-4)
    assert not np.allclose(theirs, without, rtol=1e-2)


def sums(model: PeftModel, examples: list[Example]) -> list[float]:
    """Summed log-probabilities of the answers; the harness leaves the end of sequence out."""
    return [s.log_p[:-1].sum() for s in score_answers(model, examples)]
