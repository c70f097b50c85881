"""The evaluation job: a model, an adapter and rows in, records and metrics out. Everything that can be wrong is checked first."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from loramox.adapter.loading import put_on
from loramox.data.encode import Tokenisation
from loramox.data.rows import Columns
from loramox.evaluate.asked import (
    Asked,
    count_parts,
    described,
    disjoint_parts,
    questions_of,
    read_sources,
    with_neighbours,
)
from loramox.evaluate.depth import Depth, DepthConfig
from loramox.evaluate.harness import Harness, HarnessConfig
from loramox.evaluate.measure import Questions, Record, ScoringConfig, check_numbers
from loramox.evaluate.records import PROMPTS, SUMMARY, check_out, prompts_of, read_retrained, write_records
from loramox.evaluate.subject import Subject, check_adapter, check_scales, check_sides, model_that_knows
from loramox.evaluate.summary import summarise
from loramox.files import remove
from loramox.model.config import ModelConfig, check_device, identify, read_config, skeleton
from loramox.model.load import load_reference
from loramox.model.lora import at_scale
from loramox.model.sharding import shard
from loramox.run import command, one_writer, versions


@one_writer
def evaluate(
    subject: Subject,
    model: ModelConfig,
    asked: Asked,
    scoring: ScoringConfig | None = None,
    tokenisation: Tokenisation | None = None,
    columns: Columns | None = None,
    depth: DepthConfig | None = None,
    tasks: HarnessConfig | None = None,
) -> dict[str, Any]:
    """Ask `asked`'s rows of `model` with `subject.adapter` on it; write records and summary to `subject.out`, return the summary.

    Under `torchrun` or `accelerate launch` every process calls this; they share the rows, and the first one writes. Raises a
    `LoramoxError` that names the file, row or flag at fault, before the model is loaded.
    """
    start = time.perf_counter()
    scoring, tokenisation, columns = scoring or ScoringConfig(), tokenisation or Tokenisation(), columns or Columns()
    process = PartialState(cpu=scoring.use_cpu)  # its device is this process's from here on
    out = Path(subject.out)
    check_out(out, subject.overwrite)
    device = check_device(model, scoring.use_cpu)
    read = read_sources(asked.sources(), columns, asked.suite)
    rows = disjoint_parts(read, asked.drop_overlap)
    config = read_config(model, weights=True)
    base = identify(model, config)
    made_by = check_adapter(Path(subject.adapter), base, skeleton(config, model)) if subject.adapter else None
    if subject.scale != 1:
        check_scales(Path(subject.adapter), f"--scale {subject.scale:g}")
    check_sides(made_by, rows, subject.adapter)
    rows = with_neighbours(rows, asked.neighbours)
    questions = questions_of(rows, model, config, tokenisation, scoring, asked.suite)
    counts = count_parts(read, rows, questions)
    knows = model_that_knows(Path(subject.adapter), base) if subject.adapter else None
    retrained, *others = read_retrained(asked.retrained, questions, knows, tokenisation.prompt_template) or [[]]
    deep = Depth(depth or DepthConfig(), subject.adapter, model, base, questions)
    harness = Harness(tasks or HarnessConfig(), subject.adapter)

    deep.read_retrained(device)
    loaded: nn.Module = load_reference(model, device)
    if subject.adapter:
        loaded = put_on(loaded, subject.adapter)
    if model.shard:
        shard(loaded, process.device)
    records = _records(loaded, subject, questions)
    deep.measure(loaded, subject.scale)
    scores = harness.measure(loaded, subject.scale, questions)
    about = {
        "base": base,
        "adapter": subject.adapter and {"folder": subject.adapter, "scale": subject.scale, "made_by": made_by},
        "data": described(asked.sources(), rows),
        "row_counts": counts,
        "retrained": asked.retrained_record(),
        "settings": {k: v for each in (model, scoring, tokenisation, harness.config) for k, v in asdict(each).items()},
        PROMPTS: prompts_of(questions, tokenisation.prompt_template),
        "device": str(device),
        "seconds": time.perf_counter() - start,
        "command": command(),
        "versions": versions(),
    }  # fmt: skip
    summary = summarise(records, retrained, others, asked.equivalence, scores)
    about |= deep.report(records, summary)
    if process.is_main_process:
        if subject.overwrite:
            remove(out / SUMMARY)
        write_records(out, records, summary, about)
    return about | summary.as_json()


def _records(model: nn.Module, subject: Subject, questions: Questions) -> list[Record]:
    """The records of the model, compared with its reference where an adapter is on it."""
    if subject.adapter is None:
        records = questions.ask(model)
    else:
        with model.disable_adapter():
            questions.remember_reference(model)
        with at_scale(model, subject.scale):
            records = questions.ask(model)
    check_numbers(records)
    return records
