"""Estimate memory and time of training, a sweep and a merge for one combination of settings, from traces of a few layers."""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers.training_args import OptimizerNames

from loramox.adapter.folder import served_rank
from loramox.adapter.streaming.shards import BLOCK
from loramox.data.encode import Example
from loramox.data.microbatches import OVERHEAD, OVERHEAD_ELSEWHERE, cut
from loramox.data.row import spread
from loramox.extras.plan.config import EIGHT_BITS, Choice
from loramox.extras.plan.outline import Setting
from loramox.extras.plan.rows import Parts, Rows
from loramox.extras.plan.trace import Stage, at_depth, trace_asking, trace_optimiser, trace_step, trace_watching
from loramox.model.config import skeleton
from loramox.model.lora import add_lora
from loramox.sweep.config import SweepConfig
from loramox.sweep.frontier import grid
from loramox.train.config import UnlearnConfig

# Bytes of main memory that merging one block takes, in blocks of fp32: W, ΔW, their sum, the rounded sum in its type and in fp32,
# and the difference to W.
MERGE_COPIES = 6

EPOCHS = 8  # in which the heaviest micro-batch is looked for: more have hardly a heavier one, and take as long again


class Estimate(NamedTuple):
    """The cost of training with a choice: bytes by purpose at its fullest moment, and seconds."""

    choice: Choice
    held: dict[str, int]
    when: str
    seconds: float  # per epoch, with the scoring of the rows watched
    flops: float  # of the training steps of an epoch

    @property
    def peak(self) -> int:
        return sum(self.held.values())


class Cost(NamedTuple):
    """The cost of a sweep."""

    held: dict[str, int]
    seconds: float


def _longest(examples: Sequence[Example], count: int) -> list[Example]:
    order = sorted(examples, key=_length, reverse=True)
    return [order[i % len(order)] for i in range(count)]


def _length(example: Example) -> int:
    return len(example["input_ids"])


def _padded(rows: Sequence[Example]) -> int:
    """Tokens of a pass, padding included."""
    return len(rows) * max(map(_length, rows))


def _passes(batch: Parts, args: UnlearnConfig) -> list[int]:
    """Tokens of each pass of a micro-batch's terms, were all of them at one scale."""
    on_path = {"forget"} if args.spec.gradient else set()
    rows = [row for part, some in batch.items() if part not in on_path for row in some]
    groups = cut([_length(row) for row in rows], OVERHEAD.get(args.device.type, OVERHEAD_ELSEWHERE))
    return [_padded([rows[i] for i in group]) for group in groups]


def _minibatches(batches: list[Parts], args: UnlearnConfig) -> list[list[Example]]:
    """The forget rows of an epoch as mox's path passes them: in each step min(K, rows) mini-batches, of all its micro-batches.

    None for other methods, whose forget rows are in the terms.
    """
    found: list[list[Example]] = []
    for first in range(0, len(batches) if args.spec.gradient else 0, args.gradient_accumulation_steps):
        step = batches[first : first + args.gradient_accumulation_steps]
        rows = [row for batch in step for row in batch["forget"]]
        count = min(args.inner_steps or 1, len(rows))
        found += [rows[k::count] for k in range(count)]
    return found


def _dealt(rows: Rows, args: UnlearnConfig) -> Iterator[list[Parts]]:
    """One process's share of the micro-batches of each epoch, for `EPOCHS` epochs at most."""
    size = args.per_device_train_batch_size * args.world_size
    steps = math.ceil(len(rows.datasets["forget"]) / size) / args.gradient_accumulation_steps
    epochs = math.ceil(args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs)
    for epoch in range(max(1, min(EPOCHS, epochs))):
        batches = rows.micro_batches(size, args.seed, epoch)
        yield [{part: each[: math.ceil(len(each) / args.world_size)] for part, each in b.items()} for b in batches]


def estimate(setting: Setting, rows: Rows, choice: Choice, watching: Stage | None) -> Estimate:
    """Memory and time of training with `choice`, from its heaviest micro-batch; time is in proportion to tokens.

    `watching` is a batch of the rows scored meanwhile (`watch`), None without.
    """
    args = copy.copy(setting.args)
    for name, value in choice._asdict().items():
        setattr(args, name, value)
    setting = setting._replace(args=args)
    epochs = list(_dealt(rows, args))
    heaviest = max(itertools.chain(*epochs), key=lambda batch: max(_passes(batch, args), default=0))
    traced, tokens = sum(_passes(heaviest, args)), sum(sum(_passes(batch, args)) for batch in epochs[0])
    if args.spec.gradient:
        # A step with one mini-batch of the path: the others cost the same, and are over before the next begins.
        every = [_minibatches(epoch, args) for epoch in epochs]
        args.inner_steps = 1
        heaviest = heaviest | {"forget": max(itertools.chain(*every), key=_padded)}
        traced, tokens = traced + _padded(heaviest["forget"]), tokens + sum(map(_padded, every[0]))
    stages = at_depth(trace_step, setting, heaviest)
    peaks = [stages[name].peak for name in ("step", "optimiser", "momentum")]
    seconds = stages["step"].seconds * tokens / traced + stages["momentum"].seconds
    seconds += stages["optimiser"].seconds * math.ceil(len(epochs[0]) / choice.gradient_accumulation_steps)
    if watching:
        peaks.append(watching.peak._replace(name="watching"))
        seconds += watching.seconds * _watched_batches(rows, args)
    fullest = max(peaks, key=lambda section: section.total)
    return Estimate(choice, fullest.held, fullest.name, seconds, stages["step"].flops * tokens / traced)


def in_8_bits(setting: Setting, found: Sequence[Estimate]) -> list[Estimate]:
    """The same with bitsandbytes' 8-bit AdamW, which differs in the size of its states."""
    args = copy.copy(setting.args)
    args.optim = OptimizerNames.ADAMW_8BIT
    states = at_depth(trace_optimiser, setting._replace(args=args))["states"].peak.held["optimiser"]
    return [
        each._replace(choice=each.choice._replace(optim=EIGHT_BITS), held=each.held | {"optimiser": states})
        for each in found
    ]


def _watched_batches(rows: Rows, args: UnlearnConfig) -> int:
    """Batches of rows that are scored in an epoch."""
    if args.eval_strategy != "epoch":
        return 0
    size = args.per_device_eval_batch_size * args.world_size
    return sum(math.ceil(min(args.eval_rows, len(rows.datasets[part])) / size) for part in ("forget", "retain"))


def watch(setting: Setting, rows: Rows, batch_size: int) -> Stage | None:
    """The heaviest batch on which the forget model is scored while training; None where it never is."""
    args = copy.copy(setting.args)
    if args.eval_strategy == "no" and not args.eval_on_start:
        return None
    args.activation_checkpointing = False
    watched = [spread(rows.datasets[part], args.eval_rows) for part in ("forget", "retain")]
    most = max((_longest(part, min(batch_size, len(part))) for part in watched), key=lambda p: len(p) * _length(p[0]))
    return at_depth(trace_watching, setting._replace(args=args), most)["watching"]


def sweeping(setting: Setting, rows: Rows, batch_size: int, max_new_tokens: int) -> Cost:
    """A sweep of its default points over forget and retain rows, every answer generated to its greatest length."""
    examples = [e for part in ("forget", "retain") for e in rows.datasets[part]]
    batch = _longest(examples, min(batch_size, len(examples)))
    served = replace(setting.reference, r=served_rank(setting.reference.r), shared_subspace=False)
    stages = at_depth(trace_asking, setting._replace(reference=served), batch, max_new_tokens)
    # The momentum's average, which the swept adapter was cut from, is in memory as well.
    momentum = stages["scoring"].peak.held["adapter"] // 2 * setting.momentum_rank // served.r
    peak = max((stage.peak for stage in stages.values()), key=lambda section: section.total)
    scored = stages["scoring"].seconds * sum(map(_length, examples)) / (len(batch) * _length(batch[0]))
    answered = math.ceil(len(examples) / batch_size) * max_new_tokens
    once = scored + (answered * stages["answering"].seconds if max_new_tokens else 0)
    points = 1 + len(grid(1.0)) + SweepConfig.refine
    return Cost(peak.held | {"adapter": peak.held["adapter"] + momentum}, points * once)


def merging(setting: Setting) -> tuple[dict[str, int], int]:
    """Bytes of main memory, by purpose, that merging into the base's own type takes, and the bytes that it reads and writes."""
    model = add_lora(skeleton(setting.config, setting.reference), setting.reference)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    adapter = sum(size for name, size in sizes.items() if "lora_" in name)
    kind = setting.config.dtype or torch.float32
    held = {"adapter": 4 * adapter, "blocks": MERGE_COPIES * 4 * BLOCK}
    return held, 2 * kind.itemsize * (sum(sizes.values()) - adapter)
