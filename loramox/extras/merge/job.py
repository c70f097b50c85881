"""The merge job, which joins shipping and evaluation. The rows are asked before and after weights are quantized."""

import gc
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loramox.adapter.loading import put_on
from loramox.adapter.provenance import read_provenance
from loramox.adapter.source import tuned_factors
from loramox.adapter.streaming.weights import size
from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns
from loramox.errors import SettingsError
from loramox.evaluate.asked import count_parts, described, disjoint_parts, questions_of, read_sources
from loramox.evaluate.measure import ScoringConfig
from loramox.evaluate.subject import check_sides
from loramox.evaluate.summary import summarise
from loramox.extras.merge.merge import CheckedMerge, MergeConfig, check_merge, merge_into_floats
from loramox.extras.merge.quantize import load_merged, merge_quantized
from loramox.model.config import ModelConfig, check_device
from loramox.model.load import load_reference
from loramox.model.lora import at_scale
from loramox.settings import of_record, setting

KNOWS, FORGETS = "16-bit, reference model", "16-bit, adapter on"


@dataclass
class ForgettingConfig:
    """The rows that tell how much of the forgetting is left in a quantized model."""

    forget: str | None = setting("With --quantize: rows to forget, scored before and after.", None)
    retain: str | None = setting("Rows to retain, scored as well.", None)
    drop_overlap: bool = setting("Leave out retain rows that are also forget rows.", False)
    batch_size: int = setting("Answers scored at a time.", 32)
    use_cpu: bool = setting("Quantize and ask on the CPU even where there is a GPU.", False)

    def __post_init__(self) -> None:
        if self.retain and not self.forget:
            raise SettingsError(
                "--retain needs --forget: how much of the forgetting is left is asked of the forget rows"
            )


def merge(config: MergeConfig, asked: ForgettingConfig | None = None, progress: bool = True) -> dict[str, Any]:
    """Merge as `config` says, into 16- or 32-bit weights, or quantized after that; return the provenance of what was written.

    Raises a `LoramoxError` for what cannot be merged, and for rows what `evaluate` raises; then nothing is left of the output.
    """
    asked = asked or ForgettingConfig()
    if config.quantize is None:
        if asked.forget:
            raise SettingsError(
                "--forget measures what quantizing brings back: it needs --quantize. A model merged into 16 bits is asked by "
                "loramox evaluate --model OUT"
            )
        return merge_into_floats(config, progress)
    device = check_device(ModelConfig("", quantization=config.quantize), asked.use_cpu)
    ready = check_merge(config)
    measure = _Forgetting(config, ready, asked, _device_to_ask(ready, device)).measure if asked.forget else None
    return merge_quantized(config, ready, device, measure, progress)


def _device_to_ask(ready: CheckedMerge, device: torch.device) -> torch.device:
    """Where the rows are asked: on the CPU, with a warning, where the GPU cannot hold the 16-bit model, which is not loaded until
    all is merged, quantized and saved."""
    needed = 1.1 * size(ready.shards, ready.code)
    if device.type != "cuda" or (free := torch.cuda.mem_get_info(device)[0]) >= needed:
        return device
    warnings.warn(
        f"the rows are asked on the CPU, which takes longer: in 16 bits the model needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of "
        "the GPU's memory are free. Without --forget they are not asked",
        stacklevel=3,
    )
    return torch.device("cpu")


def _only_template(requests: list[dict[str, Any]]) -> str | None:
    """The prompt template with which all requests were forgotten. Raises `SettingsError` where they had several."""
    first, *others = dict.fromkeys(request["prompt_template"] for request in requests)
    if others:
        raise SettingsError(
            f"the requests in this adapter were forgotten with several prompt templates ({first!r}, {others[0]!r}), and the rows are asked with "
            "one. Merge without --forget and --retain, and score the result with loramox evaluate, once for each template"
        )
    return first


class _Forgetting:
    """The rows, read and checked, and the five states of the model that they are asked of, one in memory at a time.

    The reference model knows the rows: it is the base, or, for a combined adapter, the base with the user's own adapter.
    All are in the 16-bit type of the merge, weights and arithmetic, but what is quantized.
    """

    def __init__(self, config: MergeConfig, ready: CheckedMerge, asked: ForgettingConfig, device: torch.device) -> None:
        self.config, self.ready, self.device = config, ready, device
        self.base = replace(ready.base, dtype=config.dtype or "bfloat16")
        tokenisation, columns = (of_record(kind, ready.made["settings"]) for kind in (Tokenisation, Columns))
        if "requests" in ready.made:
            tokenisation.prompt_template = _only_template(ready.made["requests"])
        source = read_provenance(Path(config.adapter), "forget")
        self.tuned: str | None = None
        if "tuned_adapter" in source:
            tuned_factors(source)  # raises if it has changed
            self.tuned = source["tuned_adapter"]["path"]
        self.sources = {part: path for part in ("forget", "retain") if (path := getattr(asked, part))}
        read = read_sources(self.sources, columns)
        self.rows = disjoint_parts(read, asked.drop_overlap)
        check_sides(ready.made, self.rows, config.adapter)
        scoring = ScoringConfig(asked.batch_size, max_new_tokens=0)
        self.questions = questions_of(self.rows, self.base, ready.config, tokenisation, scoring)
        self.counts = count_parts(read, self.rows, self.questions)
        self.states: list[dict[str, Any]] = []

    def measure(self, merged: Path) -> dict[str, Any]:
        """{"share": of the forgetting that is left, "states": the metrics of each, "rows": which they were, "row_counts": …}.

        share = (p_reference − p_quantized) / (p_reference − p_forget), p being the mean probability of the forget rows' answers;
        None where the adapter does not lower it, so that there is nothing to measure. `merged` has the merged 16-bit weights.
        """
        kind = self.config.quantize
        if self.tuned:
            (known,) = self._ask_adapted(self.base, {KNOWS: True}, self.tuned)
            (forgotten,) = self._ask_adapted(self.base, {FORGETS: True})
        else:
            known, forgotten = self._ask_adapted(self.base, {KNOWS: False, FORGETS: True})
        self._ask_merged("16-bit, merged", merged, None)
        self._ask_adapted(replace(self.base, quantization=kind), {f"{kind}, adapter on, not merged": True})
        left = self._ask_merged(f"{kind}, merged", merged, kind)
        share = (known - left) / (known - forgotten) if known > forgotten else None
        return {
            "share": share,
            "states": self.states,
            "rows": described(self.sources, self.rows),
            "row_counts": self.counts,
        }

    def _ask_adapted(self, base: ModelConfig, states: dict[str, bool], tuned: str | None = None) -> list[float]:
        """Load the base, ask the rows with the adapter, or `tuned` in its place, on or off, and free it."""
        model = put_on(load_reference(base, self.device), tuned or self.config.adapter)
        found = []
        with at_scale(model, 1 if tuned else self.config.scale):
            for state, on in states.items():
                with nullcontext() if on else model.disable_adapter():
                    found.append(self._ask(state, model))
        del model
        gc.collect()  # modules refer to each other
        return found

    def _ask_merged(self, state: str, merged: Path, kind: str | None) -> float:
        found = self._ask(state, load_merged(self.ready, merged, self.device, kind))
        gc.collect()
        return found

    def _ask(self, state: str, model: nn.Module) -> float:
        """Ask the rows of a state and keep its metrics; return the mean probability of the forget rows' answers."""
        metrics = summarise(self.questions.ask(model, f"{state}, ")).metrics
        self.states.append(
            {"attack": "none", "state": state, "metrics": {name: m.value for name, m in metrics.items()}}
        )
        return metrics["forget_probability"].value
