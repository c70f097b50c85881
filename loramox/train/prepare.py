"""Read, check and tokenise all that a run needs besides the model's weights, and describe the run."""

import functools
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from loramox.data.count import count_rows
from loramox.data.encode import DEFAULT_TEMPLATE, Example, Tokenisation, encode, may_think, served_otherwise
from loramox.data.row import Row, each_answer, fingerprint, keep_disjoint
from loramox.data.rows import Columns, Data, read_rows
from loramox.errors import RowsError, RunError, SettingsError
from loramox.model.config import check_device, context_of, identify, read_config, read_tokenizer, skeleton
from loramox.model.head import Head
from loramox.model.lora import ReferenceConfig, add_lora
from loramox.run import read_record
from loramox.train.checkpoint import plan_of
from loramox.train.config import UnlearnConfig
from loramox.train.earlier import Earlier, Tuned, check_checkpoint, check_memorize_at, is_at_checkpoint, read_tuned
from loramox.train.inputs import (
    choose_instead,
    choose_learning_rate,
    read_reinforced,
    refusals_digest,
    taught_rows,
)
from loramox.train.synthetic import AUTO, GUESSES_FILE, RETAIN_FILE, check_auto, generated_rows, rows_to_write
from loramox.train.target import check_target, choose_target
from loramox.train.writer import Writer

log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """All that a job needs besides the model's weights, checked."""

    tokenizer: PreTrainedTokenizerBase
    forget: list[Row]
    retain: list[Row]
    datasets: dict[str, list[Example]]  # as the trainer's arguments are called
    plan: dict[str, Any]
    lora_weights: int
    tuned: Tuned | None
    protected: Sequence[Row]
    tokenisation: Tokenisation
    context: int  # tokens that the model takes
    to_write: int  # retain rows that the reference writes
    columns: Columns


def prepare(
    reference: ReferenceConfig,
    data: Data,
    args: UnlearnConfig,
    columns: Columns,
    tokenisation: Tokenisation,
    earlier: Earlier | None = None,
) -> Prepared:
    """Read, check and tokenise everything, and describe the run; of the model, only the config and tokenizer are read."""
    _settle(reference, data, args)
    protected = earlier.rows if earlier else ()
    read, kept = _read(data, columns, protected, args.auto_retain or 0)
    forget, retain = (each_answer(kept[part]) for part in ("forget", "retain"))
    config = read_config(reference)
    model = skeleton(config, reference)
    choose_learning_rate(args, model)
    tuned = read_tuned(reference, model) if reference.tuned_adapter is not None else None
    model = add_lora(model, reference)
    Head(model.get_base_model())
    tokenizer = read_tokenizer(reference)
    context = context_of(config)
    taught, to_write = _taught(reference, args, forget, retain, bool(tokenizer.chat_template))
    log.info("Tokenising %d forget rows and %d retain rows", len(forget), len(retain))
    datasets = {
        f"{part}_dataset": encode(some, tokenizer, tokenisation, context) if some else []
        for part, some in {"forget": forget, "retain": retain}.items()
    }
    forget, retain = _used(forget, datasets["forget_dataset"]), _used(retain, datasets["retain_dataset"])
    if not columns.wanted_column:
        taught = _used(taught, datasets["forget_dataset"])
    datasets["wanted_dataset"] = encode(taught, tokenizer, tokenisation, context) if taught else []
    datasets["protected_dataset"] = _as_forgotten(earlier, tokenizer, tokenisation, context) if earlier else []
    _check_both_answers(datasets, data.forget)
    base = identify(reference, config)
    template = tokenisation.prompt_template or (None if tokenizer.chat_template else DEFAULT_TEMPLATE)
    settings = asdict(reference) | asdict(columns) | asdict(tokenisation) | args.to_dict()
    settings |= {"prompt_template": template, "processes": args.world_size}  # on which the batch of a step depends
    settings["drop_overlap"] = data.drop_overlap
    counts = {part: count_rows(part, read[part], kept[part], datasets[f"{part}_dataset"]) for part in read}
    more: dict[str, Any] = {"row_counts": counts}
    # What lies behind the paths of these two is part of the settings, so that --resume refuses other contents.
    if tuned:
        more["tuned_adapter"] = tuned.source
        settings["tuned_adapter_sha256"] = tuned.source["sha256"]
    if is_at_checkpoint(reference):
        encoded = functools.partial(encode, forget, how=tokenisation, context=context)
        checkpoint = check_checkpoint(reference, config, encoded, datasets["forget_dataset"])
        more["memorize_at"] = checkpoint
        settings["memorize_at_weights"] = checkpoint["weights"] or checkpoint["revision"]
    _check_inputs(args, base, config.num_hidden_layers, model)
    if otherwise := _warn_of_thoughts([*forget, *retain, *taught], tokenizer, tokenisation):
        more["served_otherwise"] = otherwise
    # Wanted answers are in the forget rows' fingerprint.
    rows = {**kept, "protected": protected, "taught": () if columns.wanted_column else taught}
    plan = plan_of(args, base, _described(rows, data, args), settings) | more
    weights = model.get_nb_trainable_parameters()[0]
    return Prepared(
        tokenizer, forget, retain, datasets, plan, weights, tuned, protected, tokenisation, context, to_write, columns
    )


def _settle(reference: ReferenceConfig, data: Data, args: UnlearnConfig) -> None:
    """Settle and check what depends on the settings alone."""
    check_device(reference, args.use_cpu)
    args.match_precision(reference.dtype)
    if reference.lora_alpha is None:
        reference.lora_alpha = round(args.spec.lora_scale * reference.r)
    if reference.shard and args.rmu_layer is not None:
        # transformers does not hand out the states between sharded layers.
        raise SettingsError(
            "--method rmu steers a layer in the middle, whose output is not available with --shard. Use --shard false"
        )
    check_auto(args, data, reference)


def _read(
    data: Data, columns: Columns, protected: Sequence[Row], asked: int
) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """All rows of each part, and those that are in no other part. The user asks the reference for `asked` more retain rows."""
    log.info("Reading the rows")
    read = {"forget": read_rows(data.forget, columns)}
    kept = read | {"retain": []}
    if data.retain != AUTO:
        read["retain"] = read_rows(data.retain, replace(columns, wanted_column=None))
        kept["retain"] = keep_disjoint([*read["forget"], *protected], read["retain"], data.drop_overlap)
    forget, retain = len(kept["forget"]), len(kept["retain"]) + asked
    if forget > retain:
        warnings.warn(
            f"{forget} rows to forget, but only {retain} to retain. If the two sets are exchanged, swap --forget and --retain. The retain set "
            "should be larger",
            stacklevel=3,
        )
    return read, kept


def _taught(
    reference: ReferenceConfig, args: UnlearnConfig, forget: Sequence[Row], retain: Sequence[Row], chat: bool
) -> tuple[list[Row], int]:
    """Choose the answers to teach in place of the forgotten ones, and the defaults that follow.

    Returns rows that teach them, and how many retain rows the reference writes.
    """
    choose_instead(args, forget, chat, reference.memorize_at is not None)
    taught = taught_rows(args, forget, retain)
    replaces = args.spec.answers == "wanted if given" and bool(taught or args.instead == "guess")
    choose_target(args, targeted=replaces and not is_at_checkpoint(reference))
    asks = any(row.prompt is not None and not row.verbatim for row in forget)
    to_write = rows_to_write(args, (replaces and chat) or (args.spec.writes_retain and asks), reference)
    check_target(args, reference)
    check_memorize_at(reference, args, bool(taught))
    if args.instead is not None:
        log.info("Answers that are taught in place of the forgotten ones (--instead): %s", args.instead)
    return taught, to_write


def _check_inputs(args: UnlearnConfig, base: dict[str, Any], layers: int, model: nn.Module) -> None:
    """Check the inputs of single methods, a layer and a reinforced adapter, against the model."""
    if args.rmu_layer is not None and args.rmu_layer > layers:
        raise SettingsError(
            f"rmu_layer is {args.rmu_layer}, and the model has {layers} layers. Give --rmu_layer from 1 to {layers}; the paper takes the "
            "7th of 32"
        )
    if args.reinforced is not None:
        read_reinforced(args.reinforced, base, model)


def _warn_of_thoughts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, tokenisation: Tokenisation
) -> dict[str, str] | None:
    """Warn if the served model may think first, but rows are trained without thoughts; return what `served_otherwise` found."""
    otherwise = served_otherwise(rows, tokenizer, tokenisation)
    if otherwise:
        warnings.warn(
            f"served prompt differs: the rows are trained with {otherwise['trained']!r} between question and answer, and a server puts "
            f"{otherwise['served']!r} there. With the server's prompt, the model may think first, and may still reveal forgotten facts. To "
            "measure this, run loramox attack, which also uses that prompt",
            stacklevel=3,
        )
    elif may_think(rows, tokenizer, tokenisation):
        warnings.warn(
            "the chat template has enable_thinking, and these rows are trained without thoughts. A model that thinks first may still reveal "
            "forgotten facts: serve it with thinking off",
            stacklevel=3,
        )
    return otherwise


def _used(rows: Sequence[Row], examples: Sequence[Example]) -> list[Row]:
    """Those of the rows that `encode` did not leave out of `examples`."""
    encoded = {example["row"] for example in examples}
    return [row for row in rows if row.where in encoded]


def _check_both_answers(datasets: dict[str, list[Example]], source: str) -> None:
    """Raises `RowsError` if only one of the two answers of a forget row was left out as too long."""
    kept, wanted = ([e["row"] for e in datasets[f"{part}_dataset"]] for part in ("forget", "wanted"))
    if wanted and wanted != kept:
        other = next(iter(set(kept) ^ set(wanted)), source)
        raise RowsError(
            f"{other}: only one of its two answers (the true one and the wanted one) fits into the context. Shorten the other, or use "
            "--long_rows truncate"
        )


def _as_forgotten(
    earlier: Earlier, tokenizer: PreTrainedTokenizerBase, tokenisation: Tokenisation, context: int
) -> list[Example]:
    """Rows of requests in force, each with the prompt template with which it was forgotten."""
    examples = []
    for template in dict.fromkeys(earlier.templates):
        rows = [row for row, its in zip(earlier.rows, earlier.templates, strict=True) if its == template]
        examples += encode(rows, tokenizer, replace(tokenisation, prompt_template=template), context)
    return examples


def _described(rows: dict[str, Sequence[Row]], data: Data, args: UnlearnConfig) -> dict[str, dict[str, Any]]:
    """The rows of each part, as the record has them. Only forget and retain may have none."""
    sources = {
        "forget": data.forget,
        "retain": data.retain,
        "protected": "earlier requests",
        "taught": args.refusals or data.retain,
    }
    found = {
        part: {"source": sources[part], "rows": len(some), "sha256": fingerprint(some)}
        for part, some in rows.items()
        if some or part in ("forget", "retain")
    }
    if "taught" in found and args.refusals:
        found["taught"]["refusals"] = refusals_digest(args.refusals)
    return found


def with_generated(prepared: Prepared, out: Path, model: nn.Module, args: UnlearnConfig) -> Prepared:
    """Add the rows that the reference writes: retain rows, and answers for `--instead guess`.

    `model` is the reference: B of its adapter is still 0. The rows are written to `out`.
    """
    context, tokenizer = prepared.context, prepared.tokenizer
    if not prepared.to_write and args.instead != "guess":
        return prepared
    writer = Writer(
        model,
        tokenizer,
        prepared.forget,
        prepared.tokenisation,
        context,
        prepared.protected,
        prepared.retain,
        whole=args.retain_term == "ce",
    )
    how = replace(prepared.tokenisation, long_rows="truncate")  # an answer of the reference may be cut anywhere
    written, guesses = generated_rows(
        out, writer, args, prepared.to_write, show=not args.disable_tqdm, columns=prepared.columns
    )
    datasets = dict(prepared.datasets)
    if written:
        datasets["retain_dataset"] = [*datasets["retain_dataset"], *encode(written, tokenizer, how, context)]
    if guesses:
        datasets["wanted_dataset"] = encode(guesses, tokenizer, how, context)
        _check_both_answers(datasets, prepared.forget[0].source)
    generated = {"retain": written, "instead": guesses}
    prepared.plan["generated"] = {
        part: {"rows": len(rows), "sha256": fingerprint(rows)} for part, rows in generated.items() if rows
    }
    return prepared._replace(retain=[*prepared.retain, *written], datasets=datasets)


def same_generated(out: Path, generated: dict[str, Any]) -> None:
    """Raises `RunError` if the generated rows of an interrupted run were changed before it is resumed."""
    before = read_record(out).get("generated", generated)
    if before != generated:
        raise RunError(
            f"--resume: {RETAIN_FILE} or {GUESSES_FILE} in {out} has changed since the run was started. Start again with --overwrite, and give "
            "the changed rows as --retain or --wanted_column"
        )
