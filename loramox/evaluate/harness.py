"""Run tasks of lm-evaluation-harness on the loaded model, with its adapter off and on."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loramox.errors import SettingsError, needs
from loramox.evaluate.ability import TaskScores
from loramox.evaluate.measure import Questions
from loramox.model.lora import at_scale
from loramox.settings import setting

PREFERRED = ("acc_norm", "acc", "exact_match")  # where a task has several metrics


@dataclass
class HarnessConfig:
    """Which tasks of lm-evaluation-harness to run."""

    lm_eval: list[str] | None = setting(
        "Tasks of lm-evaluation-harness, by name or as YAML files, to run with the adapter off and on.", None
    )
    lm_eval_limit: int | None = setting("Most documents of each of these tasks. Default: all.", None)

    def __post_init__(self) -> None:
        if self.lm_eval_limit is not None and (self.lm_eval_limit < 1 or not self.lm_eval):
            raise SettingsError(f"lm_eval_limit is {self.lm_eval_limit}; it needs 1 or more, and --lm_eval")


class Harness:
    """The tasks, loaded before the model is, and their scores."""

    def __init__(self, config: HarnessConfig, adapter: str | None) -> None:
        self.config = config
        self.tasks: list[Any] = []
        if not config.lm_eval:
            return
        if adapter is None:
            raise SettingsError("--lm_eval compares an adapter off and on: give --adapter, or run lm_eval itself")
        if PartialState().num_processes > 1:
            raise SettingsError("--lm_eval needs a single process: run it without torchrun or accelerate launch")
        with needs("eval"):
            from lm_eval.api.metrics import mean, nanmean
            from lm_eval.tasks import TaskManager

        # Reading all of the harness's own tasks takes many seconds.
        has_own = not all(name.endswith((".yaml", ".yml")) for name in config.lm_eval)
        self.manager = TaskManager(include_defaults=has_own)
        for name in config.lm_eval:
            try:
                found = self.manager.load([name])
            except Exception as error:  # of the harness, its data sets, the hub or the task's own code
                raise SettingsError(
                    f"--lm_eval {name} cannot be loaded: {error}. Expected a task that `lm_eval ls tasks` lists, or a YAML file of one"
                ) from error
            for task in found["tasks"].values():
                # A function of the task's own may be a mean as well, which `compared` tells.
                built_in = [f for f in task.aggregation().values() if f.__module__ == mean.__module__]
                if len(built_in) == len(task.aggregation()) and not {mean, nanmean} & set(built_in):
                    raise no_mean(task.task_name, task.aggregation())
                if getattr(task, "UNSAFE_CODE", False):
                    raise SettingsError(
                        f"--lm_eval {name} runs code that the model writes. Run it with lm_eval itself, in a sandbox"
                    )
                self.tasks.append(task)

    def measure(self, model: PeftModel, scale: float, questions: Questions) -> dict[str, TaskScores]:
        """Each task's scores with the adapter off, and on at `scale`; the tokenizer and batch size are those of `questions`."""
        if not self.tasks:
            return {}

        def results() -> dict[str, Any]:
            return questions.batch.ask(lambda size: self._results(model, questions.tokenizer, size))

        with model.disable_adapter():
            off = results()
        with at_scale(model, scale):
            on = results()
        return {task: compared(task, off, on) for task in on["samples"]}

    def _results(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger(HFLM.__module__).setLevel(logging.ERROR)  # it warns of a model that is loaded already
        return simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=self.tasks,
            limit=self.config.lm_eval_limit,
            task_manager=self.manager,
            bootstrap_iters=0,
        )


def compared(task: str, off: dict[str, Any], on: dict[str, Any]) -> TaskScores:
    """The scores of a task's documents, of its first filter and first metric (accuracy first) that is a mean over them."""
    key = on["samples"][task][0]["filter"]

    def scores(results: dict[str, Any], metric: str) -> np.ndarray | None:
        found = [sample[metric] for sample in results["samples"][task] if sample["filter"] == key]
        total = results["results"][task].get(f"{metric},{key}")
        if not all(isinstance(value, int | float) for value in (*found, total)):
            return None
        return np.array(found, dtype=float) if np.isclose(np.mean(found), total) else None

    metrics = on["samples"][task][0]["metrics"]
    for metric in sorted(metrics, key=lambda name: PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)):
        now, before = scores(on, metric), scores(off, metric)
        if now is not None and before is not None:
            return TaskScores(metric, now, before, on["higher_is_better"][task].get(metric) is not False)
    raise no_mean(task, metrics)


def no_mean(task: str, metrics: Iterable[str]) -> SettingsError:
    return SettingsError(
        f"--lm_eval {task}: none of its metrics ({', '.join(metrics)}) is a mean over documents, so that none has a ratio with an interval. "
        "Run it with lm_eval itself"
    )
