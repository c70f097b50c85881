"""The evaluation job: a model, an adapter and rows in, records and metrics out. Everything that can be wrong is checked first."""

import logging
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from loramox.adapter.folder import CONFIG, PROVENANCE, WEIGHTS
from loramox.adapter.loading import check_whole, put_on
from loramox.adapter.provenance import check_alone, check_base, read_any
from loramox.data.count import RowCount, count_rows
from loramox.data.encode import DEFAULT_TEMPLATE, Tokenisation
from loramox.data.rows import Columns, Row, fingerprint, keep_disjoint
from loramox.errors import AdapterError, RowsError, RunError, SettingsError
from loramox.evaluate.measure import Questions, Record, ScoringConfig, check_numbers
from loramox.evaluate.records import RECORDS, SUMMARY, check_template, read_records, write_records
from loramox.evaluate.suites import ANSWERING, read_part, suite_sources
from loramox.evaluate.summary import summarise
from loramox.files import LOCK, read_json, remove
from loramox.model.config import ModelConfig, check_device, context_of, identify, read_config, read_tokenizer, skeleton
from loramox.model.load import load_reference
from loramox.model.lora import at_scale
from loramox.model.sharding import shard
from loramox.run import command, one_writer, versions
from loramox.settings import check_choices

log = logging.getLogger(__name__)

HOLDOUT = "holdout"


@dataclass
class Subject:
    """The adapter to evaluate, and where to write."""

    out: str = field(metadata={"help": "Folder to write records.jsonl and summary.json to."})
    adapter: str | None = field(
        default=None, metadata={"help": "Adapter folder to put on the model. Default: none, the model as it is."}
    )
    scale: float = field(
        default=1.0, metadata={"help": "Scale of that adapter: 1 is as shipped, 0.5 half of it, 0 off. Not --alpha."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the evaluation in that folder."})

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise SettingsError(f"scale is {self.scale}; --scale needs a number of 0 or more, 1 being as shipped")
        if self.scale != 1 and self.adapter is None:
            raise SettingsError(f"scale is {self.scale:g}, but there is no adapter: --scale needs --adapter")


@dataclass
class Asked:
    """Which rows to ask, and what to compare the answers to."""

    forget: str | None = field(default=None, metadata={"help": "Rows that are to be forgotten, as for unlearn."})
    retain: str | None = field(default=None, metadata={"help": "Rows that are to stay."})
    holdout: str | None = field(
        default=None, metadata={"help": "Rows like the forget rows that no model has seen, for membership inference."}
    )
    suite: str | None = field(
        default=None,
        metadata={
            "help": "A benchmark's own rows, instead of files: tofu or muse (MUSE-News).",
            "choices": ["tofu", "muse"],
        },
    )
    split: str = field(
        default="forget10",
        metadata={"help": "TOFU's forget split: forget01, forget05 or forget10.", "choices": ["forget01", "forget05", "forget10"]},
    )  # fmt: skip
    data: str | None = field(
        default=None, metadata={"help": "Folder with the suite's files. Default: the suite's data set on the hub."}
    )
    retrained: str | None = field(
        default=None,
        metadata={"help": "Evaluation, by this command and on the same rows, of a model trained without the forget rows."},
    )  # fmt: skip
    drop_overlap: bool = field(
        default=False, metadata={"help": "Leave out retain and holdout rows that are also forget rows."}
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.suite and (self.forget or self.retain):
            raise SettingsError(
                "--suite brings its own forget and retain rows: give either it, or --forget and --retain"
            )
        if self.data and not self.suite:
            raise SettingsError("--data is the folder of a suite's files: it needs --suite")
        if not (self.suite or self.forget or self.retain):
            raise SettingsError("no rows to ask: give --forget and --retain, or --suite tofu")
        if self.suite == "muse" and self.holdout:
            raise SettingsError("--suite muse brings its own holdout rows: leave out --holdout")

    def sources(self) -> dict[str, str]:
        """part → file or hub data set."""
        if self.suite:
            return suite_sources(self.suite, self.split, self.data) | ({HOLDOUT: self.holdout} if self.holdout else {})
        named = {"forget": self.forget, "retain": self.retain, HOLDOUT: self.holdout}
        return {part: source for part, source in named.items() if source}


@one_writer
def evaluate(
    subject: Subject,
    model: ModelConfig,
    asked: Asked,
    scoring: ScoringConfig | None = None,
    tokenisation: Tokenisation | None = None,
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Ask `asked`'s rows of `model` with `subject.adapter` on it; write records and summary to `subject.out`, return the summary.

    Under `torchrun` or `accelerate launch` every process calls this; they share the rows, and the first one writes. Raises a
    `LoramoxError` that names the file, row or flag at fault, before the model is loaded.
    """
    start = time.perf_counter()
    scoring, tokenisation = scoring or ScoringConfig(), tokenisation or Tokenisation()
    process = PartialState(cpu=scoring.use_cpu)  # its device is this process's from here on
    out = Path(subject.out)
    check_out(out, subject.overwrite)
    device = check_device(model, scoring.use_cpu)
    read = read_sources(asked.sources(), columns or Columns(), asked.suite)
    rows = disjoint_parts(read, asked.drop_overlap)
    config = read_config(model, weights=True)
    base = identify(model, config)
    made_by = check_adapter(Path(subject.adapter), base, skeleton(config, model)) if subject.adapter else None
    if subject.scale != 1 and subject.adapter:
        check_scales(Path(subject.adapter), f"--scale {subject.scale:g}")
    check_sides(made_by, rows, subject.adapter)
    questions = questions_of(rows, model, config, tokenisation, scoring, asked.suite)
    counts = count_parts(read, rows, questions)
    retrained = read_retrained(
        asked.retrained, questions, base if subject.adapter else None, tokenisation.prompt_template
    )

    try:  # now, and not when everything has been asked
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be made: {error.strerror}. Choose another folder") from error
    loaded: nn.Module = load_reference(model, device)
    if subject.adapter:
        loaded = put_on(loaded, subject.adapter)
    if model.shard:
        shard(loaded, process.device)
    if subject.adapter:
        with loaded.disable_adapter():
            questions.remember_reference(loaded)
        with at_scale(loaded, subject.scale):
            records = questions.ask(loaded)
    else:
        records = questions.ask(loaded)
    check_numbers(records)
    about = {
        "base": base,
        "adapter": subject.adapter and {"folder": subject.adapter, "scale": subject.scale, "made_by": made_by},
        "data": described(asked.sources(), rows),
        "row_counts": {part: count.record() for part, count in counts.items()},
        "retrained": asked.retrained,
        "settings": {k: v for each in (model, scoring, tokenisation) for k, v in asdict(each).items()},
        "device": str(device),
        "seconds": time.perf_counter() - start,
        "command": command(),
        "versions": versions(),
    }  # fmt: skip
    summary = summarise(records, retrained)
    if process.is_main_process:
        if subject.overwrite:
            remove(out / SUMMARY)
        write_records(out, records, summary, about)
    return about | summary.as_json()


def read_sources(sources: dict[str, str], columns: Columns, suite: str | None = None) -> dict[str, Sequence[Row]]:
    """The rows of each part. Wanted answers are for training, and are not read. Raises `RowsError`."""
    columns = replace(columns, wanted_column=None)
    return {part: read_part(suite, part, source, columns) for part, source in sources.items()}


def disjoint_parts(read: dict[str, Sequence[Row]], drop_overlap: bool) -> dict[str, Sequence[Row]]:
    """The parts, without rows that are also forget rows. Raises `RowsError` if there are any and they may not be dropped."""
    parts = dict(read)
    for part in [part for part in parts if part != "forget"]:
        if part == HOLDOUT and "forget" in parts and not drop_overlap:
            _check_never_seen(parts["forget"], parts[part])
        if "forget" in parts:
            parts[part] = keep_disjoint(parts["forget"], parts[part], drop_overlap)
    return parts


def count_parts(
    read: dict[str, Sequence[Row]], rows: dict[str, Sequence[Row]], *questions: Questions
) -> dict[str, RowCount]:
    """How many rows of each part were read, and are in `questions`; logged, a line for each part."""
    examples = [example for each in questions for part in each.parts for example in part.answers]
    counts = {part: count_rows(read[part], rows[part], examples) for part in read}
    for part, count in counts.items():
        log.info("%s", count.line(part))
    return counts


def _check_never_seen(forget: Sequence[Row], holdout: Sequence[Row]) -> None:
    known = {row.key() for row in forget}
    shared = [row for row in holdout if row.key() in known]
    if shared:
        raise RowsError(
            f"{len(shared)} of {len(holdout)} holdout rows of {shared[0].source} are also forget rows (first: row "
            f"{shared[0].number}). Holdout rows are ones that no model has seen: give others, or leave these out with --drop_overlap"
        )


def questions_of(
    rows: dict[str, Sequence[Row]],
    model: ModelConfig,
    config: PretrainedConfig,
    how: Tokenisation,
    scoring: ScoringConfig,
    suite: str | None = None,
) -> Questions:
    """The rows, tokenised for `model`, and answered as their suite has it. Raises `RowsError`."""
    if suite == "muse" and how.long_rows == "refuse":
        how = replace(how, long_rows="truncate")  # as OpenUnlearning does with MUSE's texts
    return Questions(rows, read_tokenizer(model), how, context_of(config), scoring, ANSWERING.get(suite or ""))


def read_retrained(
    folder: str | None,
    questions: Questions,
    reference: dict[str, Any] | None,
    template: str | None,
) -> list[Record]:
    """The retrained model's records of the same rows; none where none are given.

    Raises `RunError` for records of other rows, of other wrong answers or another prompt template, and for those of `reference`,
    which knows the forget rows.
    """
    if folder is None:
        return []
    records = read_records(Path(folder), like=questions.identities())
    summary = (Path(folder) if Path(folder).is_dir() else Path(folder).parent) / SUMMARY
    about = read_json(summary, dict) if summary.is_file() else {}
    own = None if questions.tokenizer.chat_template else DEFAULT_TEMPLATE
    check_template(Path(folder), about, template, own)
    theirs = about.get("base") or {}
    if reference and reference["weights"] is not None and theirs.get("weights") == reference["weights"]:
        raise RunError(
            f"--retrained {folder} is an evaluation of {theirs.get('model')}, the model that knows the forget rows. Expected one of a "
            "model that was trained without the forget rows: loramox evaluate --model RETRAINED_MODEL, with the same rows"
        )
    return records


def check_sides(made_by: dict[str, Any] | None, rows: dict[str, Sequence[Row]], adapter: str | None) -> None:
    """Raises `RowsError` when what the adapter was to forget is given as retain rows, or what it was to retain as forget rows."""
    learned = (made_by or {}).get("data") or {}
    for part, other in (("forget", "retain"), ("retain", "forget")):
        its = (learned.get(other) or {}).get("sha256")
        if part in rows and its is not None and fingerprint(rows[part]) == its:
            raise RowsError(
                f"--{part} is the very rows that were the {other} rows when {adapter} was trained. Are --forget and --retain swapped?"
            )


def check_adapter(adapter: Path, base: dict[str, Any], outline: PreTrainedModel) -> dict[str, Any] | None:
    """The adapter's provenance, if it is one of loramox. Raises `AdapterError` when it is none, would not load whole in PEFT, or
    was made for another base; `outline` is the base without weights.
    """
    for name in (WEIGHTS, CONFIG):
        if not (adapter / name).exists():
            raise AdapterError(
                f"--adapter {adapter} is no adapter: it has no {name}. Give the folder forget-adapter of a run"
            )
    provenance = read_any(adapter) if (adapter / PROVENANCE).exists() else None
    if provenance:
        check_base(provenance, base, adapter)
        check_alone(provenance, adapter)
    check_whole(adapter, outline)
    if provenance is None:
        return None
    # Methods without an alpha train the forget model itself.
    if provenance.get("kind") == "trained" and provenance.get("alpha") is not None:
        warnings.warn(
            f"{adapter} is the trained adapter, θ_ref + ΔW, with which the model forgets nothing. It is not what ships: the forget adapter, "
            "θ_ref − alpha·ΔW, is in the folder forget-adapter of the run, or made by loramox extrapolate",
            stacklevel=2,
        )
    return {key: provenance.get(key) for key in ("kind", "alpha", "scale", "rank", "command", "data")}


def check_scales(adapter: Path, needed_by: str) -> None:
    """Raises `AdapterError` unless a scale multiplies everything that the adapter changes, as it does for plain LoRA alone."""
    config = LoraConfig.from_pretrained(str(adapter))
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        kept = [name for name in file.keys() if ".lora_A." not in name and ".lora_B." not in name]  # noqa: SIM118 (a file, not a dict)
    if kept or config.use_dora:
        what = "use_dora" if config.use_dora else f"it also has {kept[0]}"
        raise AdapterError(
            f"{needed_by}: --adapter {adapter} is no plain LoRA adapter ({what}), and a scale would change only a part of it. It can be evaluated "
            "as it is, without --scale"
        )


def check_out(out: Path, overwrite: bool) -> None:
    """Raises `RunError` unless evaluations may be written to `out`."""
    if out.is_file():
        raise RunError(f"--out {out} is a file. Give a folder")
    if (out / SUMMARY).exists() and not overwrite:
        raise RunError(
            f"--out {out} holds an evaluation already. Replace it with --overwrite, or choose another folder"
        )
    ours = {LOCK, RECORDS, SUMMARY, f".{RECORDS}.partial", f".{SUMMARY}.partial"}  # the last two are left by a kill
    if out.exists() and any(p.name not in ours for p in out.iterdir()):
        raise RunError(f"--out {out} has other files in it; they are left alone. Choose another folder")


def described(sources: dict[str, str], rows: dict[str, Sequence[Row]]) -> dict[str, Any]:
    """What tells each part's rows from others; `variants` are the paraphrases and wrong answers, which truth ratios are of."""
    variants = {
        part: [replace(r, answer=text) for r in some for text in (r.paraphrase, *r.wrong_answers) if text]
        for part, some in rows.items()
    }
    return {
        part: {"source": source, "rows": len(rows[part]), "sha256": fingerprint(rows[part])}
        | ({"variants": fingerprint(variants[part])} if variants[part] else {})
        for part, source in sources.items()
    }
