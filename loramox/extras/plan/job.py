"""The planning job: rows and a model's config in; memory and time of each combination out, and the fastest that fits."""

import copy
from collections.abc import Set
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns, Data
from loramox.errors import LoramoxError, SettingsError
from loramox.extras.plan.config import EIGHT_BITS, Choice, PlanConfig, budget_of, choices, optimiser_of, size_of
from loramox.extras.plan.estimate import Cost, Estimate, Stage, estimate, in_8_bits, merging, sweeping, watch
from loramox.extras.plan.outline import Setting
from loramox.extras.plan.recorder import Speed
from loramox.extras.plan.rows import Rows, made_up, rows_of
from loramox.extras.plan.speed import given_speed, measured_speed
from loramox.model.config import context_of, read_config, read_tokenizer, skeleton
from loramox.model.lora import ReferenceConfig
from loramox.run import RunConfig, resumed_settings
from loramox.train.config import UnlearnConfig
from loramox.train.earlier import read_tuned
from loramox.train.momentum import momentum_rank

LENGTHS = (256, 1024, 2048)  # planned for when no rows are given


class Planned(NamedTuple):
    length: int  # of the longest row, in tokens
    forget_rows: int
    estimates: list[Estimate]  # fastest first
    sweep: Cost


class Plan(NamedTuple):
    memory: int
    budget: int  # bytes of it that a prediction may fill
    device: str
    speed: Speed | None  # None: of a card that is not here, and whose speed was not given
    planned: list[Planned]
    sweep_batch_size: int
    merge: dict[str, int]  # bytes of main memory, by purpose
    merge_files: int  # bytes read and written

    def fits(self, peak: int) -> bool:
        return peak <= self.budget


def plan(
    config: PlanConfig,
    reference: ReferenceConfig,
    args: UnlearnConfig,
    columns: Columns | None = None,
    tokenisation: Tokenisation | None = None,
    given: Set[str] = frozenset(),
) -> Plan:
    """Memory and time of unlearning, for every choice that leaves the settings in `given` as they are. No weights are read.
    Raises what `train` raises for its settings and rows, and `SettingsError` for what cannot be planned.
    """
    here = args.use_cpu or torch.cuda.is_available()
    if not (here or args.fp16 or "bf16" in given):  # as it would be where there is a GPU
        args = copy.copy(args)
        args.bf16, args.mixed_precision = True, "bf16"
    args.match_precision(reference.dtype)
    card = torch.device("cpu" if args.use_cpu else "cuda")
    dtype = torch.bfloat16 if not here and reference.dtype == "auto" else reference.torch_dtype(card)
    setting = _setting(reference, args, dtype)
    tokenisation = tokenisation or Tokenisation()
    if config.forget:
        data = Data(config.forget, config.retain, config.drop_overlap)
        cases = [rows_of(reference, data, args, columns or Columns(), tokenisation)]
    else:
        context = context_of(setting.config)
        lengths = [n for n in LENGTHS if n <= context] or [context]
        if tokenisation.max_length:
            lengths = [min(context, tokenisation.max_length)]
        cases = [made_up(n, args) for n in lengths]
    speed = given_speed(config.tflops, config.bandwidth) if config.tflops else None
    if speed is None and here:
        speed = _measured(setting, cases[-1])
    # For a card whose speed is not known, the order is that on an average card: only its seconds would be wrong.
    setting = setting._replace(speed=speed or given_speed(100, None))
    memory = size_of(config.gpu_memory, "gpu_memory")
    budget = budget_of(memory, card, here=here and config.tflops is None)
    planned = [
        Planned(
            rows.longest,
            len(rows.datasets["forget"]),
            estimates(setting, rows, budget, given, eight_bits=card.type == "cuda"),
            sweeping(setting, rows, config.sweep_batch_size, config.max_new_tokens),
        )
        for rows in cases
    ]
    name = "this CPU" if card.type == "cpu" else "this GPU" if here else "a GPU that is not here"
    return Plan(memory, budget, name, speed, planned, config.sweep_batch_size, *merging(setting))


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


def _watching(setting: Setting, rows: Rows, budget: int, given: Set[str]) -> tuple[int, Stage | None]:
    """The rows that are scored at a time while training, fewer than set where those do not fit, and a batch of them."""
    size = setting.args.per_device_eval_batch_size
    while True:
        stage = watch(setting, rows, size)
        if stage is None or stage.peak.total <= budget or size == 1 or "per_device_eval_batch_size" in given:
            return size, stage
        size //= 2


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
    return Setting(reference, args, config, tokenizer, dtype, Speed(1, 1, ""), momentum_rank(reference, args), tuned)


def _measured(setting: Setting, rows: Rows) -> Speed:
    config, args = setting.config, setting.args
    tokens = min(4096, args.per_device_train_batch_size * rows.longest)
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
