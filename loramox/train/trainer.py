"""The trainer of ΔW: transformers' `Trainer` as a loop over the terms of a method's loss."""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainerState

from loramox.data.encode import Example
from loramox.data.microbatches import (
    ONE_PASS,
    OVERHEAD,
    OVERHEAD_ELSEWHERE,
    concatenated,
    microbatches,
    microbatches_of_pairs,
    rows_of,
)
from loramox.data.pairs import Collator, Pairs
from loramox.data.row import spread
from loramox.model.fitting import FittingBatch, ran_out_of_memory
from loramox.model.head import Head, answer_states, states_of_parts
from loramox.model.lora import (
    ReferenceConfig,
    adapter_off,
    at_scale,
    check_trained,
    current_factors,
    what_trains_as_before,
    with_factors,
)
from loramox.model.sharding import is_sharded
from loramox.train.callbacks import AroundSteps, Progress
from loramox.train.checkpoint import base_of, plan_of, write_trained
from loramox.train.config import UnlearnConfig
from loramox.train.earlier import TUNED, switch_on
from loramox.train.inputs import choose_learning_rate
from loramox.train.momentum import Momentum
from loramox.train.opened import Rows, opened
from loramox.train.passes import Passes
from loramox.train.reference_cache import FrozenStates
from loramox.train.terms import Answers, Place
from loramox.train.watched import means, row_scores


class UnlearnTrainer(Trainer):
    """transformers' `Trainer` with the loss of an unlearning method, and momentum over ΔW.

    The loss is the sum of the terms of `args.method` (`loramox.train.registry`), each a weighted mean over rows. Terms taken at
    one scale of the adapter share their forward and backward passes, in micro-batches of rows of similar length. Evaluation is of
    the forget model, momentum included: `eval_forget_probability` is to fall, `eval_retain_probability` to stay, and likewise the
    shares of answer tokens that are the model's first choice, `eval_forget_tokens_right` and `eval_retain_tokens_right`, and the
    probability of second halves, `eval_forget_late_probability`.

    Args:
        model: a folder or hub id, which is loaded as `loramox unlearn` loads it; a `ReferenceConfig`, to load it otherwise; or a
            PEFT model with one fresh LoRA adapter (`loramox.add_lora`).
        args: the settings. Default: `UnlearnConfig()`.
        forget_dataset: the forget rows: a file, a `datasets.Dataset`, a list of records, or what `loramox.encode` returns.
        retain_dataset: the retain rows, in any of these forms.
        processing_class: the model's tokenizer. Default: the one in the model's folder.
        wanted_dataset: other answers to the forget prompts, one for each forget row, for methods that teach them.
        protected_dataset: rows that earlier requests made the model forget; they are held where they are.
        memorize_at: as in `ReferenceConfig`. Static methods memorize without the tuned adapter, if one is on the model. If not,
            the model in memory is the checkpoint that never saw the forget rows, and θ_earlier + ΔW is what is scored.
        plan: what the provenance says of the run; by default what is known from Python.

    Raises:
        ModelError: the adapter is no plain LoRA, or more than it is trained.
        LoramoxError: the model or the rows cannot be used; the message says why.
    """

    def __init__(
        self,
        model: PeftModel | ReferenceConfig | str | Path,
        args: UnlearnConfig | None = None,
        forget_dataset: Rows = (),
        retain_dataset: Rows = (),
        processing_class: PreTrainedTokenizerBase | None = None,
        wanted_dataset: Sequence[Example] = (),
        plan: dict[str, Any] | None = None,
        protected_dataset: Sequence[Example] = (),
        memorize_at: str | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or UnlearnConfig()
        model, tokenizer, forget_dataset, retain_dataset, wanted_dataset = opened(
            model, processing_class, args, forget_dataset, retain_dataset, wanted_dataset
        )
        check_trained(model)
        choose_learning_rate(args, model.get_base_model())
        self.plan = plan
        self._take_states_of(model, memorize_at)
        self.share = 1.0  # of the scale trained for, at which the forget model is taken
        self.momentum = Momentum(args.momentum, args.momentum_rank or 4 * model.peft_config["default"].r)
        scored = {"forget": spread(forget_dataset, args.eval_rows), "retain": spread(retain_dataset, args.eval_rows)}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        super().__init__(
            model=model,
            args=args,
            train_dataset=Pairs(
                forget_dataset,
                retain_dataset,
                args.retain_per_forget if args.holds_retain else 0,
                wanted_dataset,
                args.seed,
                protected_dataset if args.holds_retain else (),
            ),
            eval_dataset=scored,
            data_collator=Collator(pad or 0),
            processing_class=tokenizer,
            compute_metrics=means,
            **kwargs,
        )
        self.terms = args.spec.terms(args, self)
        self._term_of = {part: term for term in self.terms for part in term.parts}
        self.passes = Passes(self._term_of)
        self.watched = FittingBatch(args.per_device_eval_batch_size, "--per_device_eval_batch_size")
        self._batches: list[dict[str, Any]] = []  # of a step that gradient accumulation has not closed yet
        self._logged: dict[str, list[tuple[float, Tensor]]] = defaultdict(list)
        if self.sharded:
            # No DistributedDataParallel around it, which does not take it: `training_step` averages its gradients.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self._add_callbacks()

    def _take_states_of(self, model: PeftModel, memorize_at: str | None) -> None:
        """The models in `model` whose hidden states are trained on or compared with."""
        self.causal_lm = model.get_base_model()
        self.sharded = is_sharded(model)
        self.head = Head(self.causal_lm)
        base = FrozenStates(model, lambda: adapter_off(model))
        self.tuned = TUNED in model.peft_config
        self.reference = FrozenStates(model, lambda: self.at(0)) if self.tuned else base
        self.now = FrozenStates(model, lambda: self.at(0))  # the reference, with earlier requests in force
        # Whether static methods memorize with the tuned adapter on, and from which model.
        self.memorize_beside = not (self.tuned and memorize_at)
        self.origin = self.reference if self.memorize_beside else base
        self.at_checkpoint = bool(memorize_at) and not self.tuned  # the model in memory is not the one that ships

    def _add_callbacks(self) -> None:
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        self.around_steps = AroundSteps(self)
        self.add_callback(self.around_steps)

    @property
    def base(self) -> dict[str, Any]:
        """What tells the base model from others."""
        return self.plan["base"] if self.plan else base_of(self.model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The gradients of one step: the method's own, then those of every term; in smaller passes where memory runs out."""
        model.train()
        self._batches.append(inputs)
        batches = [inputs]
        while True:
            try:
                loss = self._own_gradient(model)
                losses = [self._gradients_of_terms(model, batch, num_items_in_batch) for batch in batches]
                break
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                self.passes.take_smaller(error)
            # After the error is gone, whose traceback holds the activations. Gradients of the step's earlier batches go as well:
            # a backward pass that broke off has added to some.
            self.model.zero_grad()
            self.passes.losses.clear()
            clear_device_cache(garbage_collection=True)
            batches = self._batches
        if self.accelerator.sync_gradients:
            for each in self.passes.close(self.state.global_step + 1, self.args.output_dir):
                self._logged[each.name].append((each.share, each.loss))
            self._batches = []
        return loss + losses[-1]

    def _gradients_of_terms(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Add the gradients of every term of one batch; return its loss, []."""
        loss = torch.zeros((), device=self.args.device)
        work = list(self._microbatches(inputs))
        for number, ((scale, beside, _), parts) in enumerate(work, 1):
            # Processes that share a batch add up their gradients in the last pass alone: each may make as many as its rows need.
            by_itself = self.accelerator.no_sync(model) if number < len(work) else nullcontext()
            self.passes.begin(parts)
            # The scale must not change before the backward pass has ended.
            with by_itself, self.at(scale, beside):
                loss += super().training_step(model, parts, num_items_in_batch)
        if self.sharded or not work:
            trained = [p for p in self.model.parameters() if p.grad is not None]
            for p, mean in zip(trained, self.mean_over_processes([p.grad for p in trained]), strict=True):
                p.grad = mean
        return loss

    def _own_gradient(self, model: nn.Module) -> Tensor:
        """What the method adds to the gradients besides its terms, and its loss. Rows of accumulated batches are one batch."""
        if not (self.args.spec.gradient and self.accelerator.sync_gradients):
            return torch.zeros((), device=self.args.device)
        forget = concatenated([self._prepare_inputs(batch["forget"]) for batch in self._batches])
        with self.accelerator.no_sync(model):
            return self.args.spec.gradient(self, model, forget)

    def mean_over_processes(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of each tensor the mean over the processes; in one process the tensors themselves."""
        return self.accelerator.reduce(tensors, "mean") if self.accelerator.num_processes > 1 else tensors

    @contextmanager
    def at(self, scale: float, beside: bool = True) -> Iterator[None]:
        """Within it the model is θ_ref + scale·ΔW; where not `beside`, without the tuned adapter."""
        with at_scale(self.model, scale), at_scale(self.model, float(beside), TUNED):
            yield

    def _microbatches(self, inputs: dict[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
        """(the place, the rows of each part) of each pass. Terms of one part each share passes where they are at one place."""
        alone = [term for term in self.terms if len(term.parts) == 1 and term.parts[0] in inputs]
        for place in dict.fromkeys(term.place for term in alone):
            parts = {term.parts[0]: inputs[term.parts[0]] for term in alone if term.place == place}
            yield from ((place, some) for some in microbatches(parts, self.overhead, self.passes.most))
        for term in self.terms:
            if len(term.parts) > 1:
                pairs = {part: inputs[part] for part in term.parts}
                made = microbatches_of_pairs(pairs, self.overhead, self.passes.most)
                yield from ((term.place, some) for some in made)

    @property
    def overhead(self) -> int:
        """What a pass costs besides its tokens, in tokens."""
        if self.sharded:
            # So that a scale's rows are in one pass. Processes go through the layers together and in the same order, passes of
            # the reference included, which depend on the parts in a pass: out of step they would compute with other layers.
            return ONE_PASS
        return OVERHEAD.get(self.args.device.type, OVERHEAD_ELSEWHERE)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The weighted terms of the parts in `inputs`: their rows' share of the mean over the step's."""
        terms = list(dict.fromkeys(self._term_of[part] for part in inputs))
        layer = terms[0].layer
        frozen = {
            part: tuple(each.states(model, batch, layer) for each in self._term_of[part].frozen)
            for part, batch in inputs.items()
        }
        states = states_of_parts(model, self.causal_lm, inputs, layer)
        loss = torch.zeros((), device=self.args.device)
        for term in terms:
            answers = (Answers(self.head, states[part], frozen[part]) for part in term.parts)
            part = term.parts[0]
            loss = loss + term.weight * self.passes.note(term.name, part, inputs[part], term.loss(*answers).mean())
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`row_scores` of a plain batch; in smaller passes where memory runs out."""
        inputs = self._prepare_inputs(inputs)
        temperature = self.args.temperature if self.args.spec.static else None
        rows = list(range(len(inputs["rows"])))

        def scored(size: int) -> Tensor:
            passes = (rows_of(inputs, rows[start : start + size]) for start in range(0, len(rows), size))
            states = (answer_states(model, self.causal_lm, some) for some in passes)
            return torch.cat([row_scores(self.head, each, temperature) for each in states])

        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.watched.ask(scored)
        return -scores[:, 0].mean(), scores, inputs["labels"][:, 0]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.forget_model():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def forget_model(self) -> Iterator[None]:
        """Within it the model is what ships: of the momentum average so far, ΔW itself before its first update or without one.

        At the checkpoint of `memorize_at` it is θ_earlier + ΔW, the memorizing one: what ships is not in memory.
        """
        averaged = self.momentum.average if self.momentum.eta < 1 else None
        with (
            with_factors(self.model, averaged or current_factors(self.model)),
            at_scale(self.model, 1.0 if self.at_checkpoint else self.share * self.args.forget_scale),
        ):
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term before weighting: forget_loss, retain_kl (nats per token), wanted_loss, …"""
        if "loss" in logs:
            # In the same order in each process, whichever term its first pass had.
            for name, noted in sorted(self._logged.items()):
                mean = sum(share * loss for share, loss in noted) / sum(share for share, _ in noted)
                logs[name] = self.accelerator.gather(mean).mean().item()
            self._logged.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the folder of the trained ΔW; for a checkpoint (an internal call), what `Trainer` writes."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            settings = {"r": self.model.peft_config["default"].r} | self.args.to_dict()
            plan = self.plan or plan_of(self.args, self.base, {}, settings)
            write_trained(Path(output_dir or self.args.output_dir), self.model, self.momentum, plan)

    def finish_from(self, checkpoint: str, state: TrainerState) -> None:
        """Be as after the last step, from the checkpoint that was written then."""
        self.state = state
        self._load_from_checkpoint(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with what_trains_as_before(self.model):  # Trainer leaves one adapter active, and all of it training
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        switch_on(self.model)
        self.momentum = Momentum.load(Path(resume_from_checkpoint))
