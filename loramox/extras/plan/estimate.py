"""Peak memory and time of training, sweeping and merging, for one choice of how to train, from traces of a few layers."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from loramox.adapter.folder import served_rank
from loramox.adapter.streaming.shards import BLOCK
from loramox.adapter.streaming.weights import Survival
from loramox.data.encode import Example
from loramox.data.microbatches import OVERHEAD, OVERHEAD_ELSEWHERE, cut
from loramox.data.pairs import Pairs
from loramox.extras.plan.config import EIGHT_BITS, Choice
from loramox.extras.plan.outline import Setting
from loramox.extras.plan.trace import Parts, Stage, at_depth, trace_asking, trace_optimiser, trace_step, trace_watching
from loramox.model.config import skeleton
from loramox.model.lora import add_lora, lora_layers
from loramox.sweep.config import SweepConfig
from loramox.sweep.frontier import grid
from loramox.train.config import UnlearnConfig

T = TypeVar("T")

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
    """The cost of another part of the job."""

    held: dict[str, int]
    seconds: float


class Rows(NamedTuple):
    """The rows as the trainer takes them, and how they come together in an epoch."""

    datasets: dict[str, Sequence[Example]]  # forget, retain, wanted, protected
    retain_per_forget: int

    def micro_batches(self, size: int, seed: int, epoch: int = 0) -> list[Parts]:
        """Those of an epoch, dealt as the trainer deals them."""
        forget, retain, wanted, protected = (
            self.datasets.get(p, ()) for p in ("forget", "retain", "wanted", "protected")
        )
        pairs = Pairs(forget, retain, self.retain_per_forget, wanted, seed, protected)
        pairs.epoch = epoch
        order = torch.randperm(len(forget), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        batches = []
        for start in range(0, len(order), size):
            items = [pairs[i] for i in order[start : start + size]]
            batches.append({part: [e for item in items for e in item[part]] for part in items[0]})
        return batches


def _longest(examples: Sequence[Example], count: int) -> list[Example]:
    order = sorted(examples, key=_length, reverse=True)
    return [order[i % len(order)] for i in range(count)]


def _length(example: Example) -> int:
    return len(example["input_ids"])


def _of_terms(batch: Parts, args: UnlearnConfig) -> list[int]:
    """Tokens, padding included, of each pass of a micro-batch's terms, were all of them at one scale."""
    on_path = {"forget"} if args.spec.gradient else set()
    lengths = [_length(row) for part, rows in batch.items() if part not in on_path for row in rows]
    groups = cut(lengths, OVERHEAD.get(args.device.type, OVERHEAD_ELSEWHERE))
    return [len(group) * max(lengths[row] for row in group) for group in groups]


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


def _padded(rows: Sequence[Example]) -> int:
    return len(rows) * max(map(_length, rows))


def _typical(items: Sequence[T], size: Callable[[T], float]) -> T:
    """The one whose size is nearest to the mean."""
    sizes = [size(item) for item in items]
    mean = sum(sizes) / len(sizes)
    return items[min(range(len(sizes)), key=lambda i: abs(sizes[i] - mean))]


def _dealt(rows: Rows, args: UnlearnConfig) -> Iterator[list[Parts]]:
    """One process's share of the micro-batches of each epoch, for `EPOCHS` epochs at most."""
    size, epoch, last = args.per_device_train_batch_size * args.world_size, 0, 1
    while epoch < last:
        batches = rows.micro_batches(size, args.seed, epoch)
        steps = len(batches) / args.gradient_accumulation_steps
        last = min(EPOCHS, math.ceil(args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs))
        yield [_share(batch, args.world_size) for batch in batches]
        epoch += 1


def estimate(setting: Setting, rows: Rows, choice: Choice, watching: Stage | None) -> Estimate:
    """Memory and time of training with `choice`. `watching` is a batch of the rows scored meanwhile (`watch`), None without."""
    args = copy.copy(setting.args)
    for name, value in choice._asdict().items():
        setattr(args, name, value)
    setting = setting._replace(args=args)
    epochs = list(_dealt(rows, args))
    batches, minibatches = epochs[0], _minibatches(epochs[0], args)
    typical = _typical(batches, lambda batch: sum(_of_terms(batch, args)))
    heaviest = max(itertools.chain(*epochs), key=lambda batch: max(_of_terms(batch, args), default=0))
    if minibatches:
        # A step with one mini-batch of the path: the others cost the same, and are over before the next begins.
        every = [some for epoch in epochs for some in _minibatches(epoch, args)]
        args.inner_steps = 1
        typical = typical | {"forget": _typical(minibatches, _padded)}
        heaviest = heaviest | {"forget": max(every, key=_padded)}
    stages = at_depth(setting, lambda s, depth: trace_step(s, depth, heaviest, typical))
    step, optimiser = stages.get("typical step", stages["step"]), stages["optimiser"]
    steps = math.ceil(len(batches) / choice.gradient_accumulation_steps)
    # Of each stage how often it is in an epoch. A mini-batch of the path is a step without its terms.
    often = [(step, len(batches))]
    if minibatches:
        often = [(stages["terms"], len(batches) - len(minibatches)), (step, len(minibatches))]
    seconds = sum(stage.seconds * times for stage, times in often)
    seconds += steps * optimiser.seconds + stages["momentum"].seconds
    peaks = [stages[name].peak for name in ("step", "optimiser", "momentum")]
    if watching:
        peaks.append(watching.peak._replace(name="watching"))
        seconds += watching.seconds * _watched_batches(rows, args)
    fullest = max(peaks, key=lambda section: section.total)
    flops = sum(stage.flops * times for stage, times in often)
    return Estimate(choice, fullest.held, fullest.name, seconds, flops)


def in_8_bits(setting: Setting, found: Sequence[Estimate]) -> list[Estimate]:
    """The same with bitsandbytes' 8-bit AdamW, which differs in the size of its states."""
    args = copy.copy(setting.args)
    args.optim = OptimizerNames.ADAMW_8BIT
    states = at_depth(setting._replace(args=args), trace_optimiser)["states"].peak.held["optimiser"]
    return [
        each._replace(choice=each.choice._replace(optim=EIGHT_BITS), held=each.held | {"optimiser": states})
        for each in found
    ]


def _share(batch: Parts, processes: int) -> Parts:
    """One process's part of a batch that several share."""
    return {part: rows[: math.ceil(len(rows) / processes)] for part, rows in batch.items()}


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
    watched = [rows.datasets[part][: args.eval_rows] for part in ("forget", "retain")]
    most = max((_longest(part, min(batch_size, len(part))) for part in watched), key=lambda p: len(p) * _length(p[0]))
    setting = setting._replace(args=args)
    return at_depth(setting, lambda s, depth: trace_watching(s, depth, most))["watching"]


def sweeping(setting: Setting, rows: Rows, batch_size: int, max_new_tokens: int) -> Cost:
    """A sweep of its default points over forget and retain rows, every answer generated to its greatest length."""
    examples = [e for part in ("forget", "retain") for e in rows.datasets[part]]
    batch = _longest(examples, min(batch_size, len(examples)))
    served = replace(setting.reference, r=served_rank(setting.reference.r), shared_subspace=False)
    stages = at_depth(
        setting._replace(reference=served), lambda s, depth: trace_asking(s, depth, batch, max_new_tokens)
    )
    # The momentum's average, which the swept adapter was cut from, is in memory as well.
    momentum = stages["scoring"].peak.held["adapter"] // 2 * max(setting.momentum_rank, 1) // served.r
    peak = max((stage.peak for stage in stages.values()), key=lambda section: section.total)
    scored = stages["scoring"].seconds * sum(map(_length, examples)) / (len(batch) * _length(batch[0]))
    answered = math.ceil(len(examples) / batch_size) * max_new_tokens
    once = scored + (answered * stages["answering"].seconds if max_new_tokens else 0)
    points = 1 + len(grid(1.0)) + SweepConfig.refine
    return Cost(peak.held | {"adapter": peak.held["adapter"] + momentum}, points * once)


def merging(setting: Setting) -> tuple[Cost, int]:
    """Merging into the base's own type, and the bytes that it reads and writes: blocks timed here, on the CPU, disk excluded."""
    model = add_lora(skeleton(setting.config, setting.reference), setting.reference)
    layers = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for _, m in lora_layers(model)]
    changed = sum(B.shape[0] * A.shape[1] for A, B in layers)
    adapter = sum(4 * (A.numel() + B.numel()) for A, B in layers)
    kind = setting.config.dtype or torch.float32
    files = 2 * kind.itemsize * sum(p.numel() for p in _weights(model))
    A, _ = max(layers, key=lambda pair: pair[0].shape[1])
    return Cost(
        {"adapter": adapter, "blocks": MERGE_COPIES * 4 * BLOCK}, changed / BLOCK * _block(A.shape, kind)
    ), files


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" not in name]


@torch.no_grad()
def _block(shape: Sequence[int], kind: torch.dtype) -> float:
    """Seconds that one block of W + B·A takes, as `loramox.adapter.streaming.weights` computes it."""
    rank, width = shape
    count = max(1, BLOCK // width)
    A, B, W = torch.rand(rank, width), torch.rand(count, rank), torch.rand(count, width).to(kind)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        old, delta = W.float(), B @ A
        Survival().add("", old, delta, (old + delta).to(kind).float())
        taken.append(time.perf_counter() - start)
    return min(taken)
