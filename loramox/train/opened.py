"""Open a model's name and rows, in the forms that TRL's trainers take, for `UnlearnTrainer`."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loramox.data.encode import Example, Tokenisation, encode
from loramox.data.row import Row, each_answer, keep_disjoint
from loramox.data.rows import read_rows, rows_of
from loramox.errors import SettingsError
from loramox.model.config import context_of, read_tokenizer
from loramox.model.load import load_reference
from loramox.model.lora import ReferenceConfig, add_lora
from loramox.train.config import UnlearnConfig
from loramox.train.inputs import choose_instead, taught_rows
from loramox.train.target import check_stop

Rows = str | Path | Iterable[dict[str, Any]]  # a file or hub data set, a `datasets.Dataset`, or what `encode` returns


def opened(
    model: PeftModel | ReferenceConfig | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    args: UnlearnConfig,
    forget: Rows,
    retain: Rows,
    wanted: Sequence[Example],
) -> tuple[PeftModel, PreTrainedTokenizerBase, Sequence[Example], Sequence[Example], Sequence[Example]]:
    """Load a model that is given by name, as `loramox unlearn` loads it; read and tokenise the rows that are not tokenised yet.

    To forget rows that are not tokenised, the method also teaches what `args.instead` says. Returns the model, its tokenizer, and
    the tokenised rows: forget, retain and wanted.
    """
    parts = {"forget_dataset": _rows(forget, "forget_dataset"), "retain_dataset": _rows(retain, "retain_dataset")}
    for name, some in parts.items():
        if not some and (name == "forget_dataset" or args.holds_retain):
            raise SettingsError(f"{name} is empty. Give a file of rows, a data set, or what loramox.encode returns")
    rows = {name: some for name, some in parts.items() if some and isinstance(some[0], Row)}
    if rows and args.auto_retain:
        raise SettingsError(
            f"auto_retain={args.auto_retain} is for loramox.unlearn, which has the reference write rows first. Leave it out"
        )
    if rows and args.forget_to and not args.stop_when_forgotten:
        raise SettingsError(
            f"forget_to={args.forget_to:g} is for loramox.unlearn, which chooses what ships after training. Leave it out, or give "
            "stop_when_forgotten=True as well"
        )
    check_stop(args)
    if len(rows) == 2:
        rows["retain_dataset"] = keep_disjoint(rows["forget_dataset"], rows["retain_dataset"])
    if not isinstance(model, PeftModel):
        reference = model if isinstance(model, ReferenceConfig) else ReferenceConfig(str(model))
        for name in ("tuned_adapter", "memorize_at", "shard"):
            if getattr(reference, name):
                raise SettingsError(f"{name} is for loramox.unlearn, which loads the model in that way. Leave it out")
        if reference.lora_alpha is None:
            reference = replace(reference, lora_alpha=round(args.spec.lora_scale * reference.r))
        args.match_precision(reference.dtype)
        tokenizer = tokenizer or read_tokenizer(reference)
        model = add_lora(load_reference(reference, args.device), reference)
    if tokenizer is None:
        raise SettingsError("processing_class is missing. Give the tokenizer of the model, or the model by its name")
    context, how = context_of(model.get_base_model().config), Tokenisation()
    if "forget_dataset" in rows and not wanted:
        choose_instead(args, rows["forget_dataset"], bool(tokenizer.chat_template), memorize_at=False)
        if args.instead == "guess":
            raise SettingsError(
                "instead='guess' is for loramox.unlearn, which asks the reference first. Give 'refuse' or 'none'"
            )
        taught = taught_rows(args, rows["forget_dataset"], rows.get("retain_dataset", ()))
        wanted = encode(taught, tokenizer, how, context) if taught else ()
    if not wanted and args.spec.answers in ("refusals", "random", "wanted"):
        raise SettingsError(
            f"method {args.method} teaches another answer to each forget question, and these rows are tokenised already. Give wanted_dataset, "
            "or forget_dataset as a file or data set"
        )
    parts |= {name: encode(some, tokenizer, how, context) for name, some in rows.items()}
    return model, tokenizer, parts["forget_dataset"], parts["retain_dataset"], wanted


def _rows(given: Rows, name: str) -> Sequence[Any]:
    """The rows of a file or of records in memory; tokenised rows as they are."""
    if isinstance(given, str | Path):
        return each_answer(read_rows(str(given)))
    records = list(given)
    return records if not records or "input_ids" in records[0] else each_answer(rows_of(records, name))
