"""The main job: rows and a model in, a forget adapter out. Everything that can be wrong is checked first."""

import functools
import logging
import math
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from loramox.adapter.export import ShippingConfig, check_shipping, extrapolate
from loramox.adapter.folder import PROVENANCE
from loramox.adapter.provenance import check_out
from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns, Data
from loramox.model.load import load_reference
from loramox.model.lora import ReferenceConfig, add_lora
from loramox.model.sharding import shard
from loramox.model.stored import check_weights
from loramox.run import (
    RunConfig,
    memory_now,
    one_writer,
    open_run,
    peak_memory,
    peak_reserved,
    read_record,
    resumed_settings,
    update_record,
)
from loramox.train.checkpoint import drop_newer, lacks_scores, last_whole_checkpoint
from loramox.train.config import UnlearnConfig
from loramox.train.diagnostics import advice
from loramox.train.earlier import TUNED, Earlier, put_on, to_load
from loramox.train.momentum import momentum_rank
from loramox.train.prepare import Prepared, prepare, same_generated, with_generated
from loramox.train.side_by_side import advice_on, fluent_share, side_by_side
from loramox.train.target import advice_on_target, choose_share, said
from loramox.train.trainer import UnlearnTrainer

log = logging.getLogger(__name__)

TRAINED = "trained"
SHIPPED = "forget-adapter"
COMBINED = "combined-adapter"


@one_writer
def unlearn(
    run: RunConfig,
    reference: ReferenceConfig,
    data: Data,
    args: UnlearnConfig,
    columns: Columns | None = None,
    tokenisation: Tokenisation | None = None,
    shipping: ShippingConfig | None = None,
) -> dict[str, Any]:
    """Rows and a model in, `run.out`/forget-adapter out; the record of both halves is in `run.out`/run.json and returned.

    With `reference.tuned_adapter`, `run.out`/combined-adapter is that adapter and the forget adapter in one.

    Raises what `train` and `extrapolate` raise.
    """
    out = Path(run.out)
    shipping = shipping or ShippingConfig()
    check_shipping(shipping, reference, out)
    if run.resume and args.process_index == 0:  # an adapter that is there is replaced after training
        check_out(out / SHIPPED, "forget", overwrite=True)
    train(run, reference, data, args, columns, tokenisation)
    if args.process_index == 0:
        log.info("Writing the forget adapter")
        start = time.perf_counter()
        record = read_record(out)
        shipped = extrapolate(
            out / TRAINED,
            out / SHIPPED,
            shipping=shipping,
            overwrite=run.resume,
            combined=out / COMBINED,
            **chosen(record),
        )
        update_record(
            out,
            status="done",
            forget_adapter={key: shipped[key] for key in ("alpha", "rank", "truncation_error", "dtype")},
            timings=record["timings"] | {"extrapolate_seconds": time.perf_counter() - start},
            **{key: shipped[key] for key in ("combined_adapter",) if key in shipped},
        )
    PartialState().wait_for_everyone()
    return read_record(out)


@one_writer
def train(
    run: RunConfig,
    reference: ReferenceConfig,
    data: Data,
    args: UnlearnConfig,
    columns: Columns | None = None,
    tokenisation: Tokenisation | None = None,
    earlier: Earlier | None = None,
) -> dict[str, Any]:
    """Train ΔW and write it to `run.out`/trained, with the record in `run.out`/run.json; return the record.

    `trained/` is a plain PEFT adapter, ΔW as it was trained; `trained/momentum/` is another, the momentum average of ΔW that
    ships; `trained/checkpoint-*` are for resuming. Under `torchrun` or `accelerate launch` every process calls this, and the
    first one writes. `earlier` has the requests that are in force already: they stay on, and their rows stay forgotten.
    Raises `LoramoxError`, which names the file, row or flag at fault, before the model is loaded.
    """
    args.output_dir = str(Path(run.out) / TRAINED)
    last_epoch = _last_epoch(run, args)
    for name in {reference.model, to_load(reference).model}:
        check_weights(name)
    prepared = prepare(reference, data, args, columns or Columns(), tokenisation or Tokenisation(), earlier)
    if args.process_index == 0:
        # A checkpoint has the adapter, two optimiser states and the momentum; two are kept while a third is written.
        momentum = momentum_rank(reference, args) / reference.r
        open_run(run, prepared.plan, disk_needed=int(4 * prepared.lora_weights * 3 * (3 + momentum)))
    PartialState().wait_for_everyone()
    folder = Path(args.output_dir)
    if run.resume and (folder / PROVENANCE).exists() and read_record(Path(run.out)).get("status") != "running":
        return read_record(Path(run.out))

    start = time.perf_counter()
    set_seed(args.seed)
    model = _loaded(reference, args, earlier, prepared)
    loaded = {"seconds": time.perf_counter() - start, "bytes": memory_now(args.device)}
    prepared = with_generated(prepared, Path(run.out), model, args)
    if (generated := prepared.plan.get("generated")) is not None:
        same_generated(Path(run.out), generated)
        if args.process_index == 0:
            update_record(Path(run.out), generated=generated)
    trainer = UnlearnTrainer(
        model,
        args,
        **prepared.datasets,
        processing_class=prepared.tokenizer,
        plan=prepared.plan,
        memorize_at=reference.memorize_at,
    )
    log.info("Training")
    trainer.around_steps.epochs = last_epoch
    checkpoint = last_whole_checkpoint(folder) if run.resume else None
    if run.resume and trainer.is_world_process_zero():
        drop_newer(folder, checkpoint)
    seconds = _train(trainer, checkpoint)
    trainer.save_model()
    # Processes that share layers generate together or not at all; at an earlier checkpoint there is no forget model yet.
    can_ask = not (trainer.sharded or trainer.at_checkpoint)
    taught = prepared.datasets["wanted_dataset"] and any(row.prompt is not None for row in prepared.forget)
    fluent = functools.partial(fluent_share, trainer, prepared) if can_ask and taught else None
    target = choose_share(trainer, fluent) if args.forget_to is not None else {}
    if trainer.is_world_process_zero():
        answers = side_by_side(trainer, prepared) if can_ask and args.eval_strategy != "no" else {}
        _record(Path(run.out), trainer, prepared, loaded, seconds, target, answers)
    PartialState().wait_for_everyone()
    return read_record(Path(run.out))


def chosen(record: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `extrapolate` that ship what `--forget_to` chose; {} if there was no target."""
    found = record.get("forget_to")
    return {found["unit"]: found["at"], "chosen_by": said(found)} if found else {}


def _last_epoch(run: RunConfig, args: UnlearnConfig) -> float:
    """Where training ends: at the `num_train_epochs` of `args`, if a resumed run had planned more of them; else infinity.

    `args` then has the planned ones again, which the schedule of the learning rate depends on.
    """
    given, planned = args.num_train_epochs, resumed_settings(run).get("num_train_epochs", 0)
    if given >= planned:
        return math.inf
    args.num_train_epochs = planned
    return given


def _loaded(reference: ReferenceConfig, args: UnlearnConfig, earlier: Earlier | None, prepared: Prepared) -> PeftModel:
    """The model to train, with the adapters that are on it besides the new one."""
    model = add_lora(load_reference(to_load(reference), args.device), reference)
    if earlier:
        put_on(model, earlier.change)
    if prepared.tuned:
        put_on(model, prepared.tuned.change, TUNED)
    if reference.shard:
        shard(model, args.device)
    return model


def _record(
    out: Path,
    trainer: UnlearnTrainer,
    prepared: Prepared,
    loaded: dict[str, float],
    seconds: float,
    target: dict[str, Any],
    answers: dict[str, Any],
) -> None:
    """Add to the run's record how training went: times, memory, losses, answers and advice."""
    args, state, peak = trainer.args, trainer.state, peak_memory(trainer.args.device)
    early = trainer.around_steps.reason(state) if state.global_step < state.max_steps else None
    update_record(
        out,
        status="trained",
        momentum=trainer.momentum.summary(),
        timings={"load_seconds": loaded["seconds"], "train_seconds": seconds},
        memory={
            "reference_bytes": loaded["bytes"],
            "peak_bytes": peak,
            "peak_reserved_bytes": peak_reserved(args.device),
            "peak_over_reference": peak / loaded["bytes"],
        },
        log=trainer.state.log_history,
        advice=[
            *advice(trainer.state.log_history, prepared.forget, prepared.retain, args, trainer.at_checkpoint),
            *advice_on(answers, args),
            *advice_on_target(target, args),
        ],
        **({"side_by_side": answers} if answers else {}),
        **({"forget_to": target} if target else {}),
        **({"ended_early": {"epoch": state.epoch, "why": early}} if early else {}),
    )


def _train(trainer: UnlearnTrainer, checkpoint: str | None) -> float:
    """Train from the checkpoint on, if there is one; how many seconds it took."""
    if checkpoint:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        unscored, ended = lacks_scores(state, trainer.args), state.global_step >= state.max_steps
        if ended or trainer.around_steps.reason(state) or (unscored and trainer.around_steps.target is not None):
            trainer.finish_from(checkpoint, state)
            if unscored:
                trainer.evaluate()
            if ended or trainer.around_steps.reason(state):
                return 0.0  # `train` would take one more step
        trainer.args.eval_on_start = unscored
        log.info("Continuing from %s", Path(checkpoint).name)
    return trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
