"""The main job: rows and a model in, a forget adapter out. Everything that can be wrong is checked first."""

import functools
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from loramox.adapter.export import ShippingConfig, check_shipping, extrapolate
from loramox.adapter.folder import PROVENANCE
from loramox.data.encode import DEFAULT_TEMPLATE, Example, Tokenisation, encode
from loramox.data.rows import Columns, Data, Row, fingerprint, keep_disjoint, read_rows
from loramox.errors import RowsError, SettingsError
from loramox.model.config import check_device, context_of, identify, read_config, read_tokenizer, skeleton
from loramox.model.head import Head
from loramox.model.load import load_reference
from loramox.model.lora import ReferenceConfig, add_lora
from loramox.model.sharding import shard
from loramox.run import RunConfig, command, memory_now, open_run, peak_memory, read_record, update_record, versions
from loramox.train.checkpoint import last_whole_checkpoint
from loramox.train.config import UnlearnConfig
from loramox.train.diagnostics import advice
from loramox.train.earlier import (
    TUNED,
    Earlier,
    Tuned,
    check_checkpoint,
    check_memorize_at,
    put_on,
    read_tuned,
    to_load,
)
from loramox.train.inputs import check_layer, read_reinforced, taught_rows
from loramox.train.trainer import UnlearnTrainer

TRAINED = "trained"
SHIPPED = "forget-adapter"
COMBINED = "combined-adapter"


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
    train(run, reference, data, args, columns, tokenisation)
    if args.process_index == 0:
        start = time.perf_counter()
        shipped = extrapolate(
            out / TRAINED, out / SHIPPED, shipping=shipping, overwrite=run.resume, combined=out / COMBINED
        )
        record = read_record(out)
        update_record(
            out,
            status="done",
            forget_adapter={key: shipped[key] for key in ("alpha", "rank", "truncation_error", "dtype")},
            timings=record["timings"] | {"extrapolate_seconds": time.perf_counter() - start},
            **{key: shipped[key] for key in ("combined_adapter",) if key in shipped},
        )
    PartialState().wait_for_everyone()
    return read_record(out)


class Prepared(NamedTuple):
    """What a job needs besides the model's weights, all of it checked."""

    tokenizer: PreTrainedTokenizerBase
    forget: list[Row]
    retain: list[Row]
    datasets: dict[str, list[Example]]  # as the trainer's arguments are called
    plan: dict[str, Any]
    lora_weights: int
    tuned: Tuned | None


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
    first one writes. `earlier` is what is forgotten already: it stays on, and its rows are held where they are.

    Raises:
        LoramoxError: names the file, row or flag at fault, before the model is loaded.
    """
    args.output_dir = str(Path(run.out) / TRAINED)
    prepared = prepare(reference, data, args, columns or Columns(), tokenisation or Tokenisation(), earlier)
    if args.process_index == 0:
        # A checkpoint has the adapter, two optimiser states and the momentum; two are kept while a third is written.
        momentum = (args.momentum_rank or 4 * reference.r) / reference.r
        open_run(run, prepared.plan, disk_needed=int(4 * prepared.lora_weights * 3 * (3 + momentum)))
    PartialState().wait_for_everyone()
    folder = Path(args.output_dir)
    if run.resume and (folder / PROVENANCE).exists() and read_record(Path(run.out)).get("status") != "running":
        return read_record(Path(run.out))

    start = time.perf_counter()
    set_seed(args.seed)
    model = add_lora(load_reference(to_load(reference), args.device), reference)
    if earlier:
        put_on(model, earlier.change)
    if prepared.tuned:
        put_on(model, prepared.tuned.change, TUNED)
    if reference.shard:
        shard(model, args.device)
    loaded = {"seconds": time.perf_counter() - start, "bytes": memory_now(args.device)}
    trainer = UnlearnTrainer(
        model,
        args,
        **prepared.datasets,
        processing_class=prepared.tokenizer,
        plan=prepared.plan,
        memorize_at=reference.memorize_at,
    )
    seconds = _train(trainer, last_whole_checkpoint(folder) if run.resume else None)
    trainer.save_model()
    peak = peak_memory(args.device)
    if trainer.is_world_process_zero():
        update_record(
            Path(run.out),
            status="trained",
            momentum=trainer.momentum.summary(),
            timings={"load_seconds": loaded["seconds"], "train_seconds": seconds},
            memory={
                "reference_bytes": loaded["bytes"],
                "peak_bytes": peak,
                "peak_over_reference": peak / loaded["bytes"],
            },
            log=trainer.state.log_history,
            advice=advice(trainer.state.log_history, prepared.forget, prepared.retain, args, trainer.at_checkpoint),
        )
    PartialState().wait_for_everyone()
    return read_record(Path(run.out))


def _train(trainer: UnlearnTrainer, checkpoint: str | None) -> float:
    """Train from the checkpoint on, if there is one; how many seconds it took."""
    if checkpoint:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:
            # Trained to the end. `train` would take one more step where the end is inside an epoch.
            trainer.finish_from(checkpoint, state)
            return 0.0
    return trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]


def prepare(
    reference: ReferenceConfig,
    data: Data,
    args: UnlearnConfig,
    columns: Columns,
    tokenisation: Tokenisation,
    earlier: Earlier | None = None,
) -> Prepared:
    """Read, check and tokenise everything, and describe the run; of the model, only the config and tokenizer are read."""
    check_device(reference, args.use_cpu)
    if reference.lora_alpha is None:
        reference.lora_alpha = round(args.spec.lora_scale * reference.r)
    if reference.shard and args.rmu_layer is not None:
        # What is between layers that are cut transformers does not hand out.
        raise SettingsError(
            "--method rmu steers a layer in the middle, and --shard cuts the layers up: say --shard false"
        )
    forget = read_rows(data.forget, columns)
    protected = earlier.rows if earlier else ()
    retain = keep_disjoint(
        [*forget, *protected],
        read_rows(data.retain, replace(columns, wanted_column=None)),
        data.drop_overlap,
    )
    _warn_if_swapped(len(forget), len(retain))
    config = read_config(reference)
    model = skeleton(config, reference)
    tuned = read_tuned(reference, model) if reference.tuned_adapter is not None else None
    model = add_lora(model, reference)
    Head(model.get_base_model())
    tokenizer = read_tokenizer(reference)
    context = context_of(config)
    taught = taught_rows(args, forget, retain)
    check_memorize_at(reference, args, bool(taught))
    parts = {"forget": forget, "retain": retain, "wanted": taught}
    datasets = {
        f"{part}_dataset": encode(rows, tokenizer, tokenisation, context) if rows else []
        for part, rows in parts.items()
    }
    datasets["protected_dataset"] = _as_forgotten(earlier, tokenizer, tokenisation, context) if earlier else []
    _check_both_answers(datasets, data.forget)
    base = identify(reference, config)
    checkpoint = None
    if to_load(reference) is not reference:
        encoded = functools.partial(encode, forget, how=tokenisation, context=context)
        checkpoint = check_checkpoint(reference, config, encoded, datasets["forget_dataset"])
    check_layer(args, config.num_hidden_layers)
    if args.reinforced is not None:
        read_reinforced(args.reinforced, base, model)
    sources = {"forget": (data.forget, forget), "retain": (data.retain, retain)}
    if protected:
        sources["protected"] = "earlier requests", protected
    if taught and not columns.wanted_column:  # else they are in the forget rows' fingerprint
        sources["taught"] = args.refusals or data.retain, taught
    template = tokenisation.prompt_template or (None if tokenizer.chat_template else DEFAULT_TEMPLATE)
    settings = {k: v for each in (reference, columns, tokenisation) for k, v in asdict(each).items()} | args.to_dict()
    settings |= {"prompt_template": template, "processes": args.world_size}  # on which the batch of a step depends
    plan = {
        "command": command(),
        "method": args.title,
        "alpha": args.alpha,
        "base": base,
        "data": {
            part: {"source": source, "rows": len(rows), "sha256": fingerprint(rows)}
            for part, (source, rows) in sources.items()
        },
        "settings": settings,
        "versions": versions(),
    }
    # What lies behind these two paths is part of the settings, so that --resume refuses other contents.
    if tuned:
        settings["tuned_adapter_sha256"], plan["tuned_adapter"] = tuned.source["sha256"], tuned.source
    if checkpoint:
        settings["memorize_at_weights"] = checkpoint["weights"] or checkpoint["revision"]
        plan["memorize_at"] = checkpoint
    return Prepared(tokenizer, forget, retain, datasets, plan, model.get_nb_trainable_parameters()[0], tuned)


def _warn_if_swapped(forget: int, retain: int) -> None:
    if forget > retain:
        warnings.warn(
            f"{forget} rows to forget, {retain} to retain: if that is the wrong way round, swap --forget and --retain. The retain set "
            "should be larger",
            stacklevel=3,
        )


def _check_both_answers(datasets: dict[str, list[Example]], source: str) -> None:
    """Raises `RowsError` where long rows were left out, and of a forget row but one of its two answers."""
    kept, wanted = ([e["row"] for e in datasets[f"{part}_dataset"]] for part in ("forget", "wanted"))
    if wanted and wanted != kept:
        other = next(iter(set(kept) ^ set(wanted)), source)
        raise RowsError(
            f"{other}: only one of its two answers, the true and the wanted one, is within the context. Shorten the other, or use --long_rows "
            "truncate"
        )


def _as_forgotten(
    earlier: Earlier, tokenizer: PreTrainedTokenizerBase, tokenisation: Tokenisation, context: int
) -> list[Example]:
    """Rows of requests in force, each with the text around its question with which it was forgotten."""
    examples = []
    for template in dict.fromkeys(earlier.templates):
        rows = [row for row, its in zip(earlier.rows, earlier.templates, strict=True) if its == template]
        examples += encode(rows, tokenizer, replace(tokenisation, prompt_template=template), context)
    return examples
