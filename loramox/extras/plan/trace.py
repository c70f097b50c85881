"""Memory and time of each stage of a job: its own code, run on a model of a few layers without data.

The training step is `UnlearnTrainer`'s, with all passes that its method makes; the optimiser, the momentum and the evaluation
are the job's own as well. Memory and time are affine in the number of layers, so two depths give those of any.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import PretrainedConfig

from loramox.data.encode import Example
from loramox.data.pairs import Collator
from loramox.evaluate import scores
from loramox.extras.plan.outline import Setting, adapted
from loramox.extras.plan.recorder import Recorder, Section
from loramox.extras.plan.rows import Parts
from loramox.model.algebra import Factors
from loramox.model.head import Head, answer_states, backbone
from loramox.model.lora import at_scale, current_factors, with_factors
from loramox.train.inputs import RATE
from loramox.train.trainer import UnlearnTrainer


class Stage(NamedTuple):
    """One part of a job: how long it takes, and the stretches of it with what each holds at its fullest."""

    seconds: float
    flops: float
    sections: list[Section]

    @property
    def peak(self) -> Section:
        return max(self.sections, key=lambda section: section.total)


def at_depth(trace: Callable[..., dict[str, Stage]], setting: Setting, *inputs: Any) -> dict[str, Stage]:
    """The stages of `trace(setting, depth, *inputs)` for the whole model, from two shallow ones."""
    depth = setting.config.num_hidden_layers
    few, more = shallow(setting.config, setting.args.rmu_layer or 0)
    if more >= depth:
        return trace(setting, depth, *inputs)
    low, high = trace(setting, few, *inputs), trace(setting, more, *inputs)
    at = (depth - few) / (more - few)

    def stage(a: Stage, b: Stage) -> Stage:
        sections = [
            Section(s.name, {p: round(_affine(s.held.get(p, 0), t.held.get(p, 0), at)) for p in s.held | t.held})
            for s, t in zip(a.sections, b.sections, strict=True)
        ]
        return Stage(_affine(a.seconds, b.seconds, at), _affine(a.flops, b.flops, at), sections)

    return {name: stage(low[name], high[name]) for name in low}


def _affine(low: float, high: float, at: float) -> float:
    return low + at * (high - low)


def shallow(config: PretrainedConfig, least: int) -> tuple[int, int]:
    """Two depths that tell of any: 2 and 3 layers, or multiples of the pattern in which kinds of layers alternate."""
    kinds = getattr(config, "layer_types", None) or ["same"]
    period = next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))
    few = period * -(-max(least, 2) // period)
    return few, few + period


def trace_step(setting: Setting, depth: int, rows: Parts) -> dict[str, Stage]:
    """A step in the middle of training, on one micro-batch; the optimiser's step; the momentum's.

    It is the last micro-batch of its step, in which mox passes the forget rows of the step along its path.
    """
    stages = {}
    with _trainer(setting, depth) as (recorder, trainer, model):
        _mark_passes(trainer, recorder)
        recorder.section("begin")
        trainer.training_step(model, {part: Collator(0)(examples) for part, examples in rows.items()})
        stages["step"] = _taken(recorder)
        recorder.section("optimiser", "optimiser")
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        stages["optimiser"] = _taken(recorder)
        trainer.optimizer.zero_grad()
        recorder.section("momentum", "momentum")
        trainer.momentum.tick(current_factors(trainer.model))
        stages["momentum"] = _taken(recorder)
    return stages


def trace_optimiser(setting: Setting, depth: int) -> dict[str, Stage]:
    with _trainer(setting, depth) as (recorder, _, _):
        recorder.section("states", "optimiser")
        return {"states": _taken(recorder)}


def trace_watching(setting: Setting, depth: int, examples: Sequence[Example]) -> dict[str, Stage]:
    """A batch on which the forget model is scored while training."""
    with _trainer(setting, depth) as (recorder, trainer, model):
        trainer.model.zero_grad()
        _mark_passes(trainer, recorder)
        model.eval()
        recorder.section("begin")
        with trainer.forget_model():
            trainer.prediction_step(model, Collator(0)(list(examples)), False)
        return {"watching": _taken(recorder)}


def trace_asking(setting: Setting, depth: int, examples: Sequence[Example], max_new_tokens: int) -> dict[str, Stage]:
    """A batch of the sweep: the scores of its answers, and the last token of generated answers of `max_new_tokens` tokens."""
    stages = {}
    with torch.no_grad(), adapted(setting, depth) as (recorder, model):
        causal_lm = model.get_base_model()
        shipped = current_factors(model)
        recorder.belongs("adapter", *(t for f in shipped.values() for t in f))
        model.eval()
        with with_factors(model, shipped), at_scale(model, -1.0):
            batch = Collator(0)(list(examples))
            recorder.section("scoring")
            states = answer_states(model, causal_lm, batch)
            recorder.section("scores", "loss")
            scores._on_logits(scores._columns, Head(causal_lm), states.hidden, states.targets)
            del states
            stages["scoring"] = _taken(recorder)
            ids = batch["input_ids"]
            room = getattr(setting.config, "max_position_embeddings", None) or ids.shape[1] + max_new_tokens
            length = min(ids.shape[1] + max_new_tokens, room)
            ids = torch.zeros((len(ids), length), dtype=torch.long, device=ids.device)
            if max_new_tokens:
                prefix = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1)
                cached = (t for layer in prefix.past_key_values.layers for t in (layer.keys, layer.values))
                recorder.belongs("cache", *cached)
                recorder.restart()
                recorder.section("answering", "cache")
                model(input_ids=ids[:, -1:], past_key_values=prefix.past_key_values, use_cache=True)
                stages["answering"] = _taken(recorder)
    return stages


def _taken(recorder: Recorder) -> Stage:
    stage = Stage(recorder.seconds, recorder.flops, list(recorder.sections))
    recorder.restart()
    return stage


@contextmanager
def _trainer(setting: Setting, depth: int) -> Iterator[tuple[Recorder, UnlearnTrainer, nn.Module]]:
    """A trainer as it is in the middle of `train()`, and the model as it trains it; nothing is written."""
    args = copy.copy(setting.args)
    args.learning_rate = args.learning_rate or RATE  # of no effect here
    row = {"input_ids": [0, 0], "labels": [0, 0], "row": ""}
    held = dict(AcceleratorState._shared_state)  # one for a process, which a job that follows has to itself
    AcceleratorState._reset_state()
    try:
        with tempfile.TemporaryDirectory() as folder, adapted(setting, depth) as (recorder, model):
            args.output_dir, args.report_to, args.disable_tqdm = folder, [], True
            trainer = UnlearnTrainer(model, args, [row], [row], setting.tokenizer, plan={})
            trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
            if args.activation_checkpointing:
                # Some of these are not torch's: as Trainer has it.
                checkpoint = dict(args.activation_checkpointing_kwargs or {})
                others = {name: checkpoint.pop(name) for name in ("every_n_layers", "offload") if name in checkpoint}
                trainer.model.activation_checkpointing_enable(checkpoint or None, **others)
            prepared = trainer.accelerator.prepare(trainer.model)
            _as_in_the_middle(trainer, recorder, setting.momentum_rank)
            yield recorder, trainer, prepared
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(held)


def _as_in_the_middle(trainer: UnlearnTrainer, recorder: Recorder, rank: int) -> None:
    """Give the trainer the optimiser's states, the momentum's average and, where they add up over micro-batches, gradients."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        recorder.belongs("gradients", parameter.grad)
        parameter.register_post_accumulate_grad_hook(lambda p: recorder.belongs("gradients", p.grad))
    recorder.purpose = "optimiser"
    trainer.create_optimizer().step()
    if trainer.args.gradient_accumulation_steps == 1:
        trainer.optimizer.zero_grad()
    recorder.purpose = "momentum"
    trainer.momentum.average = {
        name: Factors(f.A.new_empty(rank, f.A.shape[1]), f.B.new_empty(f.B.shape[0], rank))
        for name, f in current_factors(trainer.model).items()
    }
    recorder.purpose = "activations"
    recorder.restart()


def _mark_passes(trainer: UnlearnTrainer, recorder: Recorder) -> None:
    """Begin a section with each pass through the layers, each loss on its states, and each way back."""
    layers = backbone(trainer.causal_lm)

    def forward(module: nn.Module, args: Any) -> None:
        recorder.section("forward")

    def loss(module: nn.Module, args: Any, output: Any) -> None:
        recorder.section("loss", "loss")
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: recorder.section("backward"))

    layers.register_forward_pre_hook(forward)
    layers.register_forward_hook(loss)
