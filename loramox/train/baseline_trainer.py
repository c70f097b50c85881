"""The trainer of the other methods: `MemorizeTrainer` with another objective, taken at the model that is shipped as it is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from loramox.data.microbatches import passes_of_pairs
from loramox.model.head import answer_states, mean_over_rows, per_token, sum_over_rows
from loramox.model.lora import AS_TRAINED, lora_layers, with_factors
from loramox.train.baseline_config import BaselineConfig
from loramox.train.baseline_inputs import read_reinforced
from loramox.train.baselines import dpo, generic_targets, gradient_ascent, simnpo, squared_distance, steering_vector
from loramox.train.callbacks import KnowledgeCallback, SaturationCallback
from loramox.train.checkpoint import base_of
from loramox.train.losses import cross_entropy, npo
from loramox.train.trainer import MemorizeTrainer


class BaselineTrainer(MemorizeTrainer):
    """The same data, model, memory habits and folder, with one of `METHODS` as objective, at θ_ref + ΔW:

        L = forget_weight · mean over forget rows of the forget term  +  retain_weight · mean over retain rows of the retain term

    Answers that are taught instead (PO, LLMU) have weight 1. `wanted_dataset` holds them, one for each forget row; DPO and AltPO
    take them together with the forget rows. Watched while training is θ_ref + ΔW too, and there is no momentum.
    """

    LOGGED: ClassVar = {"forget": "forget_loss", "retain": "retain_loss", "wanted": "wanted_loss"}

    def __init__(self, model: PeftModel, args: BaselineConfig, *datasets: Any, **kwargs: Any) -> None:
        super().__init__(model, args, *datasets, **kwargs)
        self.remove_callback(SaturationCallback)  # its remedies are memorization's
        self.add_callback(KnowledgeCallback())
        if args.method == "rmu":
            size = self.causal_lm.config.hidden_size
            freeze_after(model, args.rmu_layer)
            self.steering = steering_vector(size, args.steering, args.seed).to(args.device)
        if args.method == "whp":
            self.reinforced = read_reinforced(args.reinforced, base_of(model), model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward passes of each term of the sum, all at the adapter's own strength."""
        terms = [(AS_TRAINED, some) for parts in self._terms(inputs) for some in passes_of_pairs(parts, self._overhead)]
        return self._in_passes(model, terms, num_items_in_batch)

    def _terms(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The parts that share a term: DPO's has two answers in one logarithm, PO's has no true answer in it."""
        method = self.args.method
        of_forget = {"dpo": ["forget wanted"], "altpo": ["forget wanted"], "po": ["wanted"]}
        for term in [*of_forget.get(method, ["forget", "wanted"]), "retain"]:
            parts = {part: inputs[part] for part in term.split() if part in inputs}
            if parts:
                yield parts

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """One weighted term of the objective: its rows' share of the mean over the step's."""
        part = next(iter(inputs))
        weight = {"forget": self.args.forget_weight, "wanted": 1.0, "retain": self.args.retain_weight}[part]
        term = {"forget": self._forget, "wanted": self._taught, "retain": self._retain}[part]
        return weight * self._shared(part, inputs[part], term(model, inputs))

    def _forget(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        args, batch = self.args, inputs["forget"]
        match args.method:
            case "npo":
                values = npo(self._log_ratio(model, batch), args.beta)
            case "simnpo":
                values = simnpo(self._mean_log_p(model, batch), args.beta, args.margin)
            case "dpo" | "altpo":
                wanted = self._log_ratio(model, inputs["wanted"])
                values = dpo(wanted, self._log_ratio(model, batch), args.beta)
            case "rmu":
                states = answer_states(model, self.causal_lm, batch, args.rmu_layer)
                values = mean_over_rows(squared_distance(states.hidden, self.steering), states)
            case "whp":
                values = self._towards_generic(model, batch)
            case _:
                values = gradient_ascent(self._mean_log_p(model, batch))
        return values.mean()

    def _taught(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return -self._mean_log_p(model, inputs["wanted"]).mean()

    def _retain(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        batch = inputs["retain"]
        if self.args.retain_term == "kl":
            known = self.reference.states(model, batch)
            return self._hold(answer_states(model, self.causal_lm, batch), known)
        if self.args.retain_term == "ce":
            return -self._mean_log_p(model, batch).mean()
        known = self.reference.states(model, batch, self.args.rmu_layer)
        states = answer_states(model, self.causal_lm, batch, self.args.rmu_layer)
        return mean_over_rows(squared_distance(states.hidden, known), states).mean()

    def _log_ratio(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """log(p_θ(y|x) / p_ref(y|x)), [rows]."""
        known = self.reference.states(model, batch)
        states = answer_states(model, self.causal_lm, batch)
        return sum_over_rows(self._log_p(states.hidden, states) - self._log_p(known, states), states)

    def _mean_log_p(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """(1/|y|) · log p_θ(y|x), [rows]."""
        states = answer_states(model, self.causal_lm, batch)
        return mean_over_rows(self._log_p(states.hidden, states), states)

    def _towards_generic(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """CE of WHP's generic tokens, mean over each row's answer, [rows]."""
        with torch.no_grad(), with_factors(self.model, self.reinforced):
            reinforced = answer_states(model, self.causal_lm, batch)
        known = self.reference.states(model, batch)
        states = answer_states(model, self.causal_lm, batch)

        def loss(logits: Tensor, reference: Tensor, raised: Tensor) -> Tensor:
            return cross_entropy(logits, generic_targets(reference, raised, self.args.whp_strength))

        values = per_token(loss, self.head, [states.hidden, known, reinforced.hidden])
        return mean_over_rows(values, states)

    @contextmanager
    def forget_model(self):
        """The model as it is: θ_ref + ΔW, what ships."""
        yield


def freeze_after(model: PeftModel, layer: int) -> None:
    """Freeze the adapter of every block after the first `layer` ones: a loss of their states does not reach it, and where
    processes share a batch, a weight that waits for a gradient stops them."""
    for name, adapted in lora_layers(model):
        block = re.search(r"\.(\d+)\.", name)
        if block and int(block[1]) >= layer:
            adapted.requires_grad_(False)
