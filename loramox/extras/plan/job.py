"""The planning job: rows and a model's config in, memory and time of each way to train out; and the fastest that fits."""

import copy
import math
from collections.abc import Callable, Set
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns, Data
from loramox.errors import LoramoxError, SettingsError
from loramox.extras.plan.config import EIGHT_BITS, Choice, PlanConfig, budget_of, choices, optimiser_of, size_of
from loramox.extras.plan.estimate import Cost, Estimate, Rows, estimate, in_8_bits, merging, sweeping, watch
from loramox.extras.plan.ledger import Speed
from loramox.extras.plan.outline import Setting
from loramox.extras.plan.rows import longest_of, made_up, rows_of
from loramox.extras.plan.speed import given_speed, measured_speed
from loramox.model.config import read_config, read_tokenizer, skeleton
from loramox.model.lora import ReferenceConfig
from loramox.run import RunConfig, resumed_settings
from loramox.train.config import UnlearnConfig
from loramox.train.earlier import read_tuned

T = TypeVar("T")

LENGTHS = (256, 1024, 2048)  # planned for when no rows are given


class Planned(NamedTuple):
    """Estimates for rows of one length, fastest first, and the costs of sweeping and merging."""

    length: int  # of the longest row, in tokens
    forget_rows: int
    estimates: list[Estimate]
    longest: (
        int | None
    )  # about the longest row, in tokens, with which the fastest that fits still does; None where nothing fits
    sweep: Cost
    sweep_batch_size: int  # answers at a time: as given, or fewer than the default where those do not fit
    merge: Cost
    merge_files: int  # bytes read and written


class Plan(NamedTuple):
    """The results of `loramox plan`."""

    memory: int
    budget: int  # bytes of it that a prediction may fill
    device: str
    speed: Speed | None  # None: of a card that is not here, and whose speed was not given
    planned: list[Planned]

    def fits(self, estimate: Estimate) -> bool:
        return estimate.peak <= self.budget


def plan(
    config: PlanConfig,
    reference: ReferenceConfig,
    args: UnlearnConfig,
    columns: Columns | None = None,
    tokenisation: Tokenisation | None = None,
    given: Set[str] = frozenset(),
) -> Plan:
    """Memory and time of unlearning, for every choice that leaves the settings in `given` as they are. No weights are read.

    Raises:
        SettingsError: a model, method or budget that cannot be planned.
        LoramoxError: all that `train` raises for its settings and rows.
    """
    here = args.use_cpu or torch.cuda.is_available()
    args = args if here else _for_a_card(args, given)
    columns, tokenisation = columns or Columns(), tokenisation or Tokenisation()
    card = torch.device("cuda") if not args.use_cpu or not here else torch.device("cpu")
    dtype = torch.bfloat16 if not here and reference.dtype == "auto" else reference.torch_dtype(card)
    setting = _setting(reference, args, dtype)
    if config.forget:
        data = Data(config.forget, config.retain, config.drop_overlap)
        cases = [rows_of(reference, data, args, columns, tokenisation)]
    else:
        cases = [made_up(n, args) for n in _lengths(setting, tokenisation)]
    speed = given_speed(config.tflops, config.bandwidth) if config.tflops else None
    if speed is None and here:
        speed = _measured(setting, cases[-1])
    # For a card whose speed is not known, the order is that on an average card: only its seconds would be wrong.
    setting = setting._replace(speed=speed or given_speed(100, None))
    memory = size_of(config.gpu_memory, "gpu_memory")
    budget = budget_of(memory, card, here=here and config.tflops is None)
    merge, files = merging(setting)
    planned = []
    for rows in cases:
        found = estimates(setting, rows, budget, given, eight_bits=card.type == "cuda")
        sweep = _sweep_that_fits(setting, rows, config, budget, given)
        length, forget_rows = longest_of(rows), len(rows.datasets["forget"])
        longest = _longest_that_fits(setting, length, found, budget)
        planned.append(Planned(length, forget_rows, found, longest, *sweep, merge, files))
    name = "this CPU" if card.type == "cpu" else "this GPU" if here else "a GPU that is not here"
    return Plan(memory, budget, name, speed, planned)


def _sweep_that_fits(
    setting: Setting, rows: Rows, config: PlanConfig, budget: int, given: Set[str]
) -> tuple[Cost, int]:
    """The cost of a sweep, and its batch size."""
    return _halved(
        config.sweep_batch_size,
        "sweep_batch_size" in given,
        lambda size: sweeping(setting, rows, size, config.max_new_tokens),
        lambda cost: sum(cost.held.values()) <= budget,
    )


def _halved(size: int, fixed: bool, take: Callable[[int], T], fits: Callable[[T], bool]) -> tuple[T, int]:
    """The cost of a batch of `size`; unless that is fixed, half of it and so on until it fits."""
    while True:
        taken = take(size)
        if fixed or size == 1 or fits(taken):
            return taken, size
        size = max(1, size // 2)


def _longest_that_fits(setting: Setting, length: int, found: list[Estimate], budget: int) -> int | None:
    """Of the fastest choice that fits: between the rows' own length and a far larger one, on the line between their peaks."""
    best = next((each for each in found if each.peak <= budget), None)
    far = min(_context(setting), max(LENGTHS[-1], 4 * length))
    if best is None or far <= length:
        return best and length
    at_far = estimate(setting, made_up(far, setting.args), best.choice, None).peak
    share = (budget - best.peak) / max(1, at_far - best.peak)
    return min(far, int(length + share * (far - length)))


def fit(
    budget: str,
    run: RunConfig,
    reference: ReferenceConfig,
    data: Data,
    args: UnlearnConfig,
    columns: Columns,
    tokenisation: Tokenisation,
    given: Set[str] = frozenset(),
) -> tuple[Choice, Estimate | None]:
    """The fastest choice that is predicted to fit into `budget`, with its estimate; of a resumed run, its first choice.

    Under several processes the first one chooses. Raises `SettingsError` when none fits, naming what the smallest would take.
    """
    before = resumed_settings(run)
    if before.keys() >= set(Choice._fields):
        return Choice(**{name: before[name] for name in Choice._fields}), None
    taken: list[Any] = [None]
    if args.process_index == 0:
        try:
            taken = [_fastest(budget, reference, data, args, columns, tokenisation, given)]
        except LoramoxError as error:  # the other processes wait for it
            taken = [error]
    (best,) = broadcast_object_list(taken)
    if isinstance(best, LoramoxError):
        raise best
    return best.choice, best


def _fastest(
    budget: str,
    reference: ReferenceConfig,
    data: Data,
    args: UnlearnConfig,
    columns: Columns,
    tokenisation: Tokenisation,
    given: Set[str],
) -> Estimate:
    if reference.shard:
        raise SettingsError("--fit counts the whole model in each process, and --shard cuts it up: give one of them")
    setting = _setting(reference, args, reference.torch_dtype(args.device))
    rows = rows_of(reference, data, args, columns, tokenisation)
    setting = setting._replace(speed=_measured(setting, rows))
    usable = budget_of(size_of(budget, "fit"), args.device, here=True)
    found = estimates(setting, rows, usable, given, eight_bits=args.device.type == "cuda")
    fitting = [each for each in found if each.peak <= usable]
    if not fitting:
        raise SettingsError(_nothing_fits(budget, usable, min(found, key=lambda e: e.peak), given))
    return fitting[0]


def estimates(setting: Setting, rows: Rows, budget: int, given: Set[str], eight_bits: bool = False) -> list[Estimate]:
    """An estimate for every choice, fastest first; `eight_bits` when the optimiser may have 8-bit states."""
    size, stage = _watching(setting, rows, budget, given)
    found = [
        estimate(setting, rows, choice._replace(per_device_eval_batch_size=size), stage)
        for choice in tqdm(list(choices(setting.args, given)), desc="Planning", unit="choices", leave=False)
    ]
    if eight_bits and "optim" not in given and found[0].choice.optim != EIGHT_BITS:
        found += in_8_bits(setting, found)
    return sorted(found, key=lambda e: (round(e.seconds, 6), e.choice.optim == EIGHT_BITS))


def _watching(setting: Setting, rows: Rows, budget: int, given: Set[str]) -> tuple[int, Any]:
    """The rows that are scored at a time while training, and a batch of them."""
    stage, size = _halved(
        setting.args.per_device_eval_batch_size,
        "per_device_eval_batch_size" in given,
        lambda size: watch(setting, rows, size),
        lambda stage: stage is None or stage.peak.total <= budget,
    )
    return size, stage


def _setting(reference: ReferenceConfig, args: UnlearnConfig, dtype: torch.dtype) -> Setting:
    for name, value, planned in (
        ("quantization", reference.quantization, ("nf4", "none")),
        ("optim", optimiser_of(args), ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "sgd")),
    ):
        if value not in planned:
            raise SettingsError(f"{name} is {value}; memory and time are predicted for --{name} {', '.join(planned)}")
    if args.method == "whp":
        raise SettingsError("method is whp; memory and time are predicted for every other --method")
    config, tokenizer = read_config(reference), read_tokenizer(reference)
    tuned = None
    if reference.tuned_adapter is not None:
        tuned = read_tuned(reference, skeleton(config, reference)).change
    return Setting(reference, args, config, tokenizer, dtype, Speed(1, 1, ""), _momentum_rank(reference, args), tuned)


def _momentum_rank(reference: ReferenceConfig, args: UnlearnConfig) -> int:
    """The largest rank of the momentum's average: each update adds the adapter's rank, up to a limit."""
    most = args.momentum_rank or 4 * reference.r
    if args.momentum == 1 or reference.shared_subspace:
        return min(most, reference.r)
    an_epoch = args.momentum_every is None and args.max_steps <= 0
    return min(most, reference.r * max(1, math.ceil(args.num_train_epochs))) if an_epoch else most


def _for_a_card(args: UnlearnConfig, given: Set[str]) -> UnlearnConfig:
    """The same settings as they would be where there is a GPU."""
    args = copy.copy(args)
    if not args.fp16 and "bf16" not in given:
        args.bf16, args.mixed_precision = True, "bf16"
    return args


def _lengths(setting: Setting, tokenisation: Tokenisation) -> list[int]:
    context = _context(setting)
    if tokenisation.max_length:
        return [min(context, tokenisation.max_length)]
    return [n for n in LENGTHS if n <= context] or [context]


def _context(setting: Setting) -> int:
    return getattr(setting.config, "max_position_embeddings", None) or LENGTHS[-1]


def _measured(setting: Setting, rows: Rows) -> Speed:
    config, args = setting.config, setting.args
    tokens = min(4096, args.per_device_train_batch_size * longest_of(rows))
    between = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return measured_speed(
        args.device, torch.bfloat16 if args.bf16 else setting.dtype, tokens, config.hidden_size, between
    )


def _nothing_fits(budget: str, usable: int, least: Estimate, given: Set[str]) -> str:
    fixed = sorted(given & set(Choice._fields))
    most = max((p for p in least.held if p != "weights"), key=lambda p: least.held[p])
    instead = (
        f"Leave out {', '.join('--' + name for name in fixed)}"
        if fixed
        else "Shorten the rows (--max_length), lower --r"
    )
    return (
        f"--fit {budget}: nothing fits. The smallest choice (micro-batch {least.choice.per_device_train_batch_size}, "
        f"checkpointing {'on' if least.choice.activation_checkpointing else 'off'}) is predicted to take {least.peak / 2**30:.2f} GB, "
        f"{least.held['weights'] / 2**30:.2f} of it weights and {least.held[most] / 2**30:.2f} {most}, and {usable / 2**30:.2f} GB may be filled. "
        f"{instead}, or take a larger card or a smaller model"
    )
