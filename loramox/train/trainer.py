"""The trainer of ΔW: plain gradient descent on the forget rows' objective while retain rows are held in place."""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainerState

from loramox.data.encode import Example
from loramox.data.microbatches import OVERHEAD, OVERHEAD_ELSEWHERE, passes
from loramox.data.pairs import Collator, Pairs
from loramox.errors import NonFiniteLossError
from loramox.model.head import (
    AnswerStates,
    Head,
    answer_states,
    mean_over_rows,
    per_token,
    states_of_parts,
    weighted_mean_over_rows,
)
from loramox.model.lora import AS_TRAINED, adapter_off, at_strength, check_trained, current_factors, with_factors
from loramox.model.sharding import is_sharded
from loramox.train.callbacks import (
    KnowledgeCallback,
    KnownCallback,
    MomentumCallback,
    PairsEpoch,
    Progress,
    SaturationCallback,
    StopUnlessFinite,
)
from loramox.train.checkpoint import plan_of, write_memorization
from loramox.train.config import MemorizeConfig
from loramox.train.earlier import EARLIER, switch_on
from loramox.train.losses import cross_entropy, kl_divergence, log_prob, npo
from loramox.train.momentum import Momentum
from loramox.train.reference_cache import Known
from loramox.train.watched import means, row_scores


class MemorizeTrainer(Trainer):
    """transformers' `Trainer` with the objective of MOX (arXiv 2602.06441) and momentum over ΔW.

        L = mean over forget rows of the objective  +  kl_weight · mean over retain rows of KL(p_ref ‖ p_θ)

    The objective is NPO's loss at θ_ref − α·ΔW, or, as in the paper, cross-entropy that memorizes, at θ_ref + ΔW. NPO's is of
    the mean of log(p_θ/p_ref) over an answer's tokens, in which each weighs p_ref, as much as the reference knows of it.

    With `earlier` requests in force (see `loramox.train.earlier`) θ_now takes the place of θ_ref wherever the adapter is on,
    retain rows are still held at θ_ref, and one more term holds the rows that are forgotten already where they are:

        + kl_weight · mean over protected rows of KL(p_now ‖ p_θ)

    `model` is a PEFT model with one fresh LoRA adapter (`loramox.add_lora`); the datasets are what `loramox.encode` returns.
    Parts of the objective at one strength go through the model together, in passes of rows of like length (`data.microbatches`):
    forward, backward, and forward with the adapter off where the reference is not known yet. Evaluation is that of the forget
    model at `args.strength`, momentum included: `eval_forget_probability` is to fall and `eval_retain_probability` to stay, and
    so are `eval_forget_tokens_right` and `eval_retain_tokens_right`, the shares of answer tokens that are the first choice.
    `save_model()` writes the folder that `loramox.extrapolate` starts from; `plan` is what its provenance says of the run.
    """

    LOGGED: ClassVar = {
        "forget": "forget_loss",
        "retain": "retain_kl",
        "protected": "protected_kl",
        "wanted": "wanted_loss",
    }

    def __init__(
        self,
        model: PeftModel,
        args: MemorizeConfig,
        forget_dataset: Sequence[Example],
        retain_dataset: Sequence[Example],
        processing_class: PreTrainedTokenizerBase,
        wanted_dataset: Sequence[Example] = (),
        plan: dict[str, Any] | None = None,
        protected_dataset: Sequence[Example] = (),
        **kwargs: Any,
    ) -> None:
        self.plan = plan
        self.causal_lm = model.get_base_model()
        check_trained(model)
        self.sharded = is_sharded(model)
        self.head = Head(self.causal_lm)
        self.reference = Known(model, lambda: adapter_off(model))
        self.now = Known(model, lambda: at_strength(model, 0))  # θ_ref, with what is forgotten already
        lora = model.peft_config["default"]
        self.momentum = Momentum(args.momentum, args.momentum_rank or 4 * lora.r)
        watched = {"forget": list(forget_dataset)[: args.eval_rows], "retain": list(retain_dataset)[: args.eval_rows]}
        retain_rows = args.retain_per_forget if args.holds_retain else 0
        tokenizer = processing_class
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        super().__init__(
            model=model,
            args=args,
            train_dataset=Pairs(
                forget_dataset,
                retain_dataset,
                retain_rows,
                wanted_dataset,
                args.seed,
                protected_dataset if args.holds_retain else (),
            ),
            eval_dataset=watched,
            data_collator=Collator(pad or 0),
            processing_class=processing_class,
            compute_metrics=means,
            **kwargs,
        )
        if self.sharded:
            # No DistributedDataParallel around it, which does not take it: `_in_passes` adds its gradients up.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self._logged: dict[str, list[tuple[float, Tensor]]] = defaultdict(list)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        for callback in (
            PairsEpoch(self.train_dataset),
            StopUnlessFinite(),  # before the momentum takes the weights in
            MomentumCallback(self),
            SaturationCallback(args) if args.memorizes else KnowledgeCallback(),
            KnownCallback(self),
        ):
            self.add_callback(callback)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward passes of the parts at each strength: it must not change in between."""
        descent = self.args.targeted == "descent"
        strengths = {
            "forget": AS_TRAINED if self.args.memorizes else self.args.strength,
            "wanted": self.args.strength if descent else AS_TRAINED,
            "retain": self.args.kl_strength,
            "protected": self.args.kl_strength,
        }
        together = []
        for strength in dict.fromkeys(strengths[part] for part in inputs):
            parts = {part: batch for part, batch in inputs.items() if strengths[part] == strength}
            together += [(strength, some) for some in passes(parts, self._overhead)]
        return self._in_passes(model, together, num_items_in_batch)

    def _in_passes(
        self, model: nn.Module, together: list[tuple[float, dict[str, Any]]], num_items_in_batch: Any
    ) -> Tensor:
        """Forward and backward, pass by pass, each at its strength; the loss."""
        total = torch.zeros((), device=self.args.device)
        for number, (strength, parts) in enumerate(together, 1):
            # Processes that share a batch add up their gradients in the last pass alone: each may make as many as its rows need.
            by_itself = self.accelerator.no_sync(model) if number < len(together) else nullcontext()
            with by_itself, at_strength(self.model, strength):
                total += super().training_step(model, parts, num_items_in_batch)
            self._stop_unless_finite(total, parts)
        if self.sharded:
            trained = [p for p in self.model.parameters() if p.grad is not None]
            for p, mean in zip(trained, self.accelerator.reduce([p.grad for p in trained], "mean"), strict=True):
                p.grad = mean
        return total

    @property
    def _overhead(self) -> int:
        """What a pass costs besides its tokens, in tokens."""
        if self.sharded:
            # So that a strength's rows are in one pass. Processes go through the layers together and in the same order, passes of
            # the reference included, which depend on the parts in a pass: out of step they would compute with other layers.
            return 1 << 40
        return OVERHEAD.get(self.args.device.type, OVERHEAD_ELSEWHERE)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The terms of the objective that the parts in `inputs` stand for: their rows' share of the mean over the step's."""
        terms = {"forget": self._forget, "wanted": self._wanted, "retain": self._hold, "protected": self._hold}
        compared = {"retain": self.reference, "protected": self.now}
        if self.args.objective == "npo":
            compared["forget"] = self.reference
        known = {part: compared[part].states(model, batch) for part, batch in inputs.items() if part in compared}
        loss = torch.zeros((), device=self.args.device)
        for part, states in states_of_parts(model, self.causal_lm, inputs).items():
            weight = self.args.kl_weight if part in ("retain", "protected") else 1.0
            loss = loss + weight * self._shared(part, inputs[part], terms[part](states, known.get(part)))
        return loss

    def _shared(self, part: str, batch: dict[str, Any], loss: Tensor) -> Tensor:
        """A pass's share of the mean over all rows, of the mean over its own; noted for the log."""
        share = batch.get("share", 1.0)
        self._logged[part].append((share, loss.detach()))
        return share * loss

    def _forget(self, states: AnswerStates, reference: Tensor | None) -> Tensor:
        """The objective: −log p at θ_ref + ΔW, which memorizes, or NPO's loss at θ_ref − α·ΔW."""
        if self.args.objective == "cross_entropy":
            temperature = self.args.temperature
            loss = per_token(lambda z, y: cross_entropy(z, y, temperature), self.head, [states.hidden], states.targets)
            return mean_over_rows(loss, states).mean()
        # A mean over tokens: by their sum, short answers would be pushed much further down a token than long ones. Tokens that
        # the reference never knew give way first, and if they counted as much, those that are to be forgotten would stay.
        known = self._log_p(reference, states)
        ratios = weighted_mean_over_rows(self._log_p(states.hidden, states) - known, known.exp(), states)
        return npo(ratios, self.args.npo_beta).mean()

    def _log_p(self, hidden: Tensor, states: AnswerStates) -> Tensor:
        """log p of each answer token where the hidden states are these, [N]."""
        return per_token(log_prob, self.head, [hidden], states.targets)

    def _wanted(self, states: AnswerStates, reference: None = None) -> Tensor:
        loss = mean_over_rows(per_token(cross_entropy, self.head, [states.hidden], states.targets), states).mean()
        return loss if self.args.targeted == "descent" else -loss

    def _hold(self, states: AnswerStates, known: Tensor) -> Tensor:
        """KL(p_known ‖ p_θ), mean over the rows of the mean over a row's answer tokens."""
        kl = per_token(lambda logits, others: kl_divergence(others, logits), self.head, [states.hidden, known])
        return mean_over_rows(kl, states).mean()

    def _stop_unless_finite(self, loss: Tensor, parts: dict[str, Any]) -> None:
        if not math.isfinite(loss.item()):
            part = next((p for p in parts if not math.isfinite(self._logged[p][-1][1].item())), next(iter(parts)))
            rows = parts[part]["rows"]
            shown = "; ".join(rows[:3]) + ("; …" if len(rows) > 3 else "")
            # Going on from the last checkpoint would come to the same loss: it has the same learning rate and rows.
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, in the {part} rows of its batch ({shown}). Nothing of "
                f"this step is written, and the last checkpoint in {self.args.output_dir} is as it was. Start again with --overwrite and "
                "a lower --learning_rate, a lower --alpha, or without --fp16"
            )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ):
        """`row_scores` of a plain batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            states = answer_states(model, self.causal_lm, inputs)
            scores = row_scores(self.head, states, self.args.temperature if self.args.memorizes else None)
        return -scores[:, 0].mean(), scores, inputs["labels"][:, 0]

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        with self.forget_model():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def forget_model(self):
        """Within it the model is θ_ref − α·M, with M the momentum average so far (ΔW before its first update)."""
        with (
            with_factors(self.model, self.momentum.average or current_factors(self.model)),
            at_strength(self.model, self.args.strength),
        ):
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the objective, before weighting: forget_loss, retain_kl (nats per token), wanted_loss."""
        if "loss" in logs:
            # In the same order in each process, whichever part its first pass had.
            for part, noted in sorted(self._logged.items()):
                mean = sum(share * loss for share, loss in noted) / sum(share for share, _ in noted)
                logs[self.LOGGED[part]] = self.accelerator.gather(mean).mean().item()
            self._logged.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the memorization folder; for a checkpoint (an internal call), what `Trainer` writes."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            plan = self.plan or plan_of(self.model, self.args)
            write_memorization(Path(output_dir or self.args.output_dir), self.model, self.momentum, plan)

    def finish_from(self, checkpoint: str, state: TrainerState) -> None:
        """Be as after the last step, from the checkpoint that was written then."""
        self.state = state
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if EARLIER in self.model.peft_config:
            switch_on(self.model)  # Trainer leaves one adapter active
        self.momentum = Momentum.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.momentum = Momentum.load(Path(self.state.best_model_checkpoint))
