"""Unlearning depth score (UDS): at which layers the forgotten knowledge is still present, by activation patching.

Another model's hidden states replace the reference's own after layer l, where the answer is predicted from. What the answer
loses by that is what the other model lacks at layer l. Nothing is trained. y is an answer of n tokens, without its end:

    Δ_l(m)  1/n Σ_t [log p_ref(y_t) − log p_ref(y_t | the states after layer l are m's)], nats
    K       {l : Δ_l(retrained) > 0.05}, the layers that encode what only the reference knows
    UDS     Σ_K Δ_l(retrained) · clip(Δ_l(forget) / Δ_l(retrained), 0, 1) / Σ_K Δ_l(retrained)

0: every layer still has the knowledge. 1: every layer lacks it as the retrained model's do. A row without K has no UDS.

Source: Lee, Kim, Jo, arXiv 2605.24614. Two differences: the paper scores annotated entities, here the whole answer counts; the
authors' code takes the last layer's states after the final norm, which then acts twice, here they are what the layer returns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad

from loramox.data.encode import IGNORED, Example
from loramox.data.pairs import Collator
from loramox.errors import NonFiniteLossError, SettingsError
from loramox.evaluate.measure import Questions
from loramox.evaluate.metric import Metric, Record, Summary
from loramox.evaluate.scores import piece
from loramox.evaluate.shares import everyones, in_batches, mine, progress
from loramox.evaluate.subject import check_retrained_model
from loramox.model.config import ModelConfig, read_config, skeleton
from loramox.model.head import in_eval_mode
from loramox.model.load import load_reference
from loramox.model.lora import at_scale
from loramox.model.patching import patched_pass
from loramox.model.sharding import layers_of
from loramox.settings import setting

NAME = "unlearning_depth"
THRESHOLD = 0.05  # nats per token, the paper's τ
SOURCE = "UDS of whole answers, mean over rows; arXiv 2605.24614"


@dataclass
class DepthConfig:
    """Whether to measure the unlearning depth score, and against which model."""

    depth: bool = setting("Also measure at which layers the forgotten knowledge is still present. Needs --retrained_model.", False)  # fmt: skip
    retrained_model: str | None = setting(
        "Folder or hub id of a model trained without the forget rows, for --depth.", None
    )

    def __post_init__(self) -> None:
        if self.retrained_model and not self.depth:
            raise SettingsError("--retrained_model needs --depth. A retrained model's evaluation goes to --retrained")


class Gaps(NamedTuple):
    """Δ of both models, [rows, layers] each."""

    retrained: np.ndarray
    forget: np.ndarray

    def erased(self) -> np.ndarray:
        """clip(Δ(forget) / Δ(retrained), 0, 1) where a layer is in K, NaN elsewhere, [rows, layers]."""
        return np.clip(self.forget / np.where(self.retrained > THRESHOLD, self.retrained, np.nan), 0, 1)

    def depth(self) -> np.ndarray:
        """UDS of each row, [rows]; NaN where K is empty."""
        total = np.where(self.retrained > THRESHOLD, self.retrained, 0).sum(-1)
        return np.nansum(self.retrained * self.erased(), -1) / np.where(total > 0, total, np.nan)

    def by_layer(self) -> list[dict[str, Any]]:
        """For each layer, counted from 1: rows with it in K, both models' mean Δ over all rows, and the mean share erased."""
        columns = zip(self.retrained.T, self.forget.T, self.erased().T, strict=True)
        return [
            {
                "layer": layer,
                "rows": int((~np.isnan(erased)).sum()),
                "retrained": float(retrained.mean()),
                "forget": float(forget.mean()),
                "erased": None if np.isnan(erased).all() else float(np.nanmean(erased)),
            }
            for layer, (retrained, forget, erased) in enumerate(columns, 1)
        ]


class Depth:
    """One adapter, measured in steps: in memory are one model at a time, and the retrained model's states of the answers."""

    def __init__(
        self, config: DepthConfig, adapter: str | None, model: ModelConfig, base: dict[str, Any], questions: Questions
    ) -> None:
        """Raises a `LoramoxError` when the models cannot be compared."""
        self.config, self.batch, self.collate = config, questions.batch, Collator(questions.tokenizer.pad_token_id or 0)
        forget = (part.answers for part in questions.parts if part.name == "forget")
        self.examples = [_without_end(example, questions.ends) for example in next(forget, [])]
        if config.depth and model.shard:
            raise SettingsError("--depth needs whole layers: leave out --shard")
        if config.retrained_model:
            self.retrained, _ = check_retrained_model(config.retrained_model, model, base, knows=base)
            layers_of(skeleton(read_config(model), model))
        wanting = {
            "forget rows (--forget)": self.examples,
            "an adapter (--adapter)": adapter,
            "a model trained without the forget rows (--retrained_model)": config.retrained_model,
        }
        self.lacking = [what for what, given in wanting.items() if not given]
        self.possible = config.depth and not self.lacking

    def read_retrained(self, device: torch.device) -> None:
        """Load the retrained model, keep its hidden states of the answers, and free it."""
        if self.possible:
            model = load_reference(self.retrained, device)
            self.theirs = self.batch.ask(lambda size: self._read(model, size))
            del model
            clear_device_cache(garbage_collection=True)

    def measure(self, model: PeftModel, scale: float) -> None:
        """Both models' gaps. `model` is the reference with the adapter on it: at `scale` it is the forget model."""
        if self.possible:
            found = everyones(self.batch.ask(lambda size: self._measure(model, scale, size)))
            self.gaps = Gaps(*np.stack([found[i] for i in range(len(self.examples))], axis=1))
            if np.isnan(self.gaps).any():
                raise NonFiniteLossError(
                    "--depth: hidden states of --retrained_model or of the adapter are not numbers. Try --dtype bfloat16"
                )

    def report(self, records: Sequence[Record], summary: Summary) -> dict[str, Any]:
        """Each forget row's score into its record, their mean or what is lacking into the summary; returns the layers' gaps."""
        if not self.possible:
            if self.config.depth:
                summary.absent[NAME] = f"needs {' and '.join(self.lacking)}"
            return {}
        scores = self.gaps.depth()
        forget = [record for record in records if record["part"] == "forget"]
        for record, score in zip(forget, scores.tolist(), strict=True):
            record |= {} if np.isnan(score) else {NAME: score}
        if n := int((~np.isnan(scores)).sum()):
            summary.metrics[NAME] = Metric(float(np.nanmean(scores)), "higher", n, "the retrained model", SOURCE)
        else:
            summary.absent[NAME] = (
                f"the retrained model lacks no more than {THRESHOLD} nats per token of any forget row at any layer"
            )
        return {"depth": {"retrained_model": self.config.retrained_model, "layers": self.gaps.by_layer()}}

    @torch.no_grad()
    def _read(self, model: nn.Module, size: int) -> dict[int, Tensor]:
        """The hidden states of this process's examples, [tokens, layers, hidden size] each."""
        found: dict[int, Tensor] = {}
        for order, batch, at in self._batches(model, size, "depth, retrained model"):
            states = torch.stack(patched_pass(model, batch, at)[1], dim=1).cpu()
            found |= zip(order, states.split(at.sum(1).tolist()), strict=True)
        return found

    @torch.no_grad()
    def _measure(self, model: PeftModel, scale: float, size: int) -> dict[int, np.ndarray]:
        """Δ of this process's examples, [2, layers] each: of the retrained model and of the forget model."""
        found: dict[int, np.ndarray] = {}
        for order, batch, at in self._batches(model, size, "depth"):
            with at_scale(model, scale):
                _, forget = patched_pass(model, batch, at)
            retrained = torch.cat([self.theirs[i] for i in order]).unbind(1)
            with model.disable_adapter():
                known, own = patched_pass(model, batch, at)
                of = [patched_pass(model, batch, at, i % len(own), h)[0] for i, h in enumerate([*retrained, *forget])]
            gaps = (known - torch.stack(of)).T.reshape(len(order), 2, len(own))
            found |= zip(order, gaps.cpu().double().numpy(), strict=True)
        return found

    def _batches(self, model: nn.Module, size: int, bar: str) -> Iterator[tuple[list[int], dict[str, Any], Tensor]]:
        """Examples of similar length, their batch, and the positions that predict their answers, [rows, tokens].

        The longest come first: where memory runs out, few passes are made again.
        """
        order = sorted(range(len(self.examples)), key=lambda i: len(self.examples[i]["input_ids"]), reverse=True)
        batches = mine(in_batches(order, size), model)
        device = next(model.parameters()).device
        with in_eval_mode(model):
            for some in progress(bar, "batches", batches):
                batch = send_to_device(self.collate([self.examples[i] for i in some]), device)
                yield some, batch, pad(batch["labels"][:, 1:] != IGNORED, (0, 1))


def _without_end(example: Example, ends: frozenset[int]) -> Example:
    """The example without the token that ends its answer, unless that is all of it."""
    answer = [i for i, label in enumerate(example["labels"]) if label != IGNORED]
    if len(answer) < 2 or example["labels"][answer[-1]] not in ends:
        return example
    return piece(example, end=answer[-1])
