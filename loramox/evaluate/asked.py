"""The rows to score: their files, the checks on them, and their tokenisation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from loramox.data.count import count_rows
from loramox.data.encode import Tokenisation
from loramox.data.row import Row, also_in, fingerprint, keep_disjoint
from loramox.data.row_files import FORMATS
from loramox.data.rows import Columns, read_rows, rows_of
from loramox.errors import RowsError, SettingsError
from loramox.evaluate.ability import NEIGHBOURS, RETAIN_TEST, TEXT
from loramox.evaluate.measure import Questions, ScoringConfig
from loramox.evaluate.neighbours import nearest
from loramox.evaluate.suites import ANSWERING, read_part, suite_sources
from loramox.model.config import ModelConfig, context_of, read_tokenizer
from loramox.settings import check_choices, refuse, setting

HOLDOUT = "holdout"


@dataclass
class Asked:
    """Which rows to ask, and what to compare the answers to."""

    forget: str | None = setting("Rows to forget, as for unlearn.", None)
    retain: str | None = setting("Rows to retain, as for unlearn, except auto.", None)
    retain_test: str | None = setting("Rows to retain that training did not get, for general ability.", None)
    text: str | None = setting(
        "Text whose perplexity is compared with the reference's: a text file, or rows with a column text.", None
    )
    neighbours: int = setting(
        "Number of retain rows to report separately: those most like the forget rows, from --retain_test if given. 0: none.",
        20,
    )
    holdout: str | None = setting("Rows like the forget rows that no model has seen, for membership inference.", None)
    suite: str | None = setting(
        "A benchmark's own rows, instead of files: tofu or muse (MUSE-News).", None, choices=["tofu", "muse"]
    )
    split: str = setting("TOFU's forget split: forget01, forget05 or forget10.", "forget10", choices=["forget01", "forget05", "forget10"])  # fmt: skip
    data: str | None = setting("Folder with the suite's files. Default: the suite's data set on the hub.", None)
    retrained: list[str] | None = setting(
        "Folder that loramox evaluate wrote for a model trained without the forget rows, on the same rows. Several folders: one per "
        "seed. They show how much such models differ by chance.",
        None,
    )
    equivalence: float = setting(
        "Differences that count as none, as a share of the distance between the reference and the retrained model.", 0.1
    )
    drop_overlap: bool = setting(
        "Leave out retain and holdout rows that are also forget rows, and holdout rows that are also retain rows.",
        False,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        self.retrained = [self.retrained] if isinstance(self.retrained, str) else self.retrained
        refuse("neighbours", self.neighbours, self.neighbours >= 0, "0 or more")
        refuse("equivalence", self.equivalence, 0 < self.equivalence < 1, "a share above 0 and below 1, like 0.1")
        if self.suite and (self.forget or self.retain):
            raise SettingsError(
                "--suite brings its own forget and retain rows: give either it, or --forget and --retain"
            )
        if self.data and not self.suite:
            raise SettingsError("--data is the folder of a suite's files: it needs --suite")
        if not (self.suite or self.forget or self.retain or self.retain_test or self.text):
            raise SettingsError("no rows to ask: give --forget and --retain, or --suite tofu")
        if self.suite == "muse" and self.holdout:
            raise SettingsError("--suite muse brings its own holdout rows: leave out --holdout")

    def sources(self) -> dict[str, str]:
        """part → file or hub data set."""
        named = {
            "forget": self.forget,
            "retain": self.retain,
            RETAIN_TEST: self.retain_test,
            HOLDOUT: self.holdout,
            TEXT: self.text,
        }
        own = suite_sources(self.suite, self.split, self.data) if self.suite else {}
        return own | {part: source for part, source in named.items() if source}

    def retrained_record(self) -> str | list[str] | None:
        """`retrained` as a record has it: a single one as text."""
        return self.retrained[0] if self.retrained and len(self.retrained) == 1 else self.retrained


def read_sources(sources: dict[str, str], columns: Columns, suite: str | None = None) -> dict[str, Sequence[Row]]:
    """The rows of each part. Wanted answers are for training, and are not read. Raises `RowsError`."""
    columns = replace(columns, wanted_column=None)
    return {
        part: read_text(source, columns) if part == TEXT else read_part(suite, part, source, columns)
        for part, source in sources.items()
    }


def read_text(source: str, columns: Columns) -> list[Row]:
    """Plain text: the whole of a text file, or the column text of a file of rows. Raises `RowsError`."""
    path = Path(source)
    if not path.is_file() or path.suffix in FORMATS:
        rows = read_rows(source, Columns(text_column=columns.text_column))
        if any(row.prompt is not None for row in rows):
            raise RowsError(f"--text {source} has questions and answers. Give a text file, or rows with a column text")
        return rows
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(f"--text {source} cannot be read: {error}. Expected text in UTF-8") from error
    return rows_of([{"text": text}], source)


def with_neighbours(rows: dict[str, Sequence[Row]], count: int) -> dict[str, Sequence[Row]]:
    """The parts, and as one more the `count` retain rows that are most like the forget rows, if there are more than that.

    They are of the rows that training did not get, where there are any.
    """
    part = RETAIN_TEST if RETAIN_TEST in rows else "retain"
    if not count or "forget" not in rows or len(rows.get(part, ())) <= count:
        return rows
    return rows | {f"{part}{NEIGHBOURS}": nearest(rows[part], rows["forget"], count)}


def disjoint_parts(read: dict[str, Sequence[Row]], drop_overlap: bool) -> dict[str, Sequence[Row]]:
    """The parts, without rows that are also forget rows, and holdout rows that are in any other part. Raises `RowsError` if there
    are any and they may not be dropped, and for rows that training did not get among the retain rows."""
    if "retain" in read and RETAIN_TEST in read:
        remedy = "It takes rows that training did not get: remove them"
        _refuse_shared(read[RETAIN_TEST], read["retain"], "rows of --retain_test", "in --retain", remedy)
    if HOLDOUT in read:
        learned = [row for part, some in read.items() if part not in ("forget", HOLDOUT, TEXT) for row in some]
        if not drop_overlap:
            remedy = "Holdout rows are ones that no model has seen: give others, or leave these out with --drop_overlap"
            _refuse_shared(read[HOLDOUT], read.get("forget", ()), "holdout rows of", "forget rows", remedy)
            _refuse_shared(read[HOLDOUT], learned, "rows of --holdout", "rows that a model learned", remedy)
        read = read | {HOLDOUT: keep_disjoint(learned, read[HOLDOUT], drop_overlap)}
    if "forget" not in read:
        return dict(read)
    others = {part: rows for part, rows in read.items() if part != "forget"}
    return read | {part: keep_disjoint(read["forget"], rows, drop_overlap) for part, rows in others.items()}


def _refuse_shared(rows: Sequence[Row], others: Sequence[Row], what: str, also: str, remedy: str) -> None:
    if shared := also_in(rows, others):
        first = shared[0]
        raise RowsError(
            f"{len(shared)} of {len(rows)} {what} {first.source} are also {also} (first: row {first.number}). {remedy}"
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


def count_parts(
    read: dict[str, Sequence[Row]], rows: dict[str, Sequence[Row]], *questions: Questions
) -> dict[str, Any]:
    """How many rows of each part were read, and are in `questions`, as a record has it; logged, a line for each part."""
    examples = [example for each in questions for part in each.parts for example in part.answers]
    return {part: count_rows(part, read[part], rows[part], examples) for part in read}


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
