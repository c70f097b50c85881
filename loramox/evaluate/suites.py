"""The rows of public benchmarks, from the hub or from a folder, and the form of their questions."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from loramox.data.row import Row
from loramox.data.rows import Columns, read_rows
from loramox.errors import RowsError, RunError
from loramox.evaluate.answers import Answering
from loramox.files import read_json

HUBS = {"tofu": "locuslab/TOFU", "muse": "muse-bench/MUSE-News"}

# MUSE's own lengths and stops (arXiv 2407.06460); its membership texts are scored, and nothing is asked about them. They are
# of 2048 tokens of Llama 2; OpenUnlearning scores no more than that with any tokenizer, and so does this.
TEXT = Answering(0, scored=2048)
SHORT = Answering(32, stops=("\n\n", "\nQuestion", "Question:"))
ANSWERING = {
    "muse": {
        "verbmem": Answering(128),
        "knowmem_forget": SHORT,
        "knowmem_retain": SHORT,
        "forget": TEXT,
        "holdout": TEXT,
    }
}


def suite_sources(suite: str, split: str, folder: str | None) -> dict[str, str]:
    """part → file or hub data set, of TOFU (arXiv 2401.06121), which has three forget splits, or MUSE-News (arXiv 2407.06460).
    Raises `RowsError` when the folder lacks one of the suite's files.
    """
    names = {
        "tofu": {
            "forget": [f"{split}_perturbed"],
            "retain": ["retain_perturbed"],
            "real_authors": ["real_authors_perturbed"],
            "world_facts": ["world_facts_perturbed"],
        },
        "muse": {
            "verbmem": ["verbmem/forget"],
            "knowmem_forget": ["knowmem/forget_qa"],
            "knowmem_retain": ["knowmem/retain_qa", "knowmem/retain2_qa"],
            "forget": ["privleak/forget"],
            "holdout": ["privleak/holdout"],
        },
    }[suite]
    if folder is None:
        return {part: f"{HUBS[suite]}:{known[0].replace('/', ':')}" for part, known in names.items()}
    found = {part: _file(Path(folder), known) for part, known in names.items()}
    missing = [names[part][0] for part, path in found.items() if path is None]
    if missing:
        raise RowsError(
            f"--data {folder} has no {', '.join(f'{name}.jsonl' for name in missing)} (or .json, .parquet). They are the suite's own "
            f"files, from {HUBS[suite]} on the hub"
        )
    return {part: str(path) for part, path in found.items()}


def read_part(suite: str | None, part: str, source: str, columns: Columns) -> list[Row]:
    """The rows of one part, MUSE's in the form in which it puts them: few-shot questions, and texts with their continuation."""
    if suite != "muse":
        return read_rows(source, columns)
    if part.startswith("knowmem"):
        shots = "".join(f"Question: {r.prompt}\nAnswer: {r.answer}\n\n" for r in read_rows(_shots(source)))
        return [
            Row(r.source, r.number, f" {r.answer}", f"{shots}Question: {r.prompt}\nAnswer:", verbatim=True)
            for r in read_rows(source)
        ]
    if part == "verbmem":
        rows = read_rows(source, Columns(prompt_column="prompt", answer_column="gt"))
        return [Row(r.source, r.number, f" {r.answer}", r.prompt, verbatim=True, ends=False) for r in rows]
    # An empty question, so that a text is one row and not cut into blocks.
    return [Row(source, i, text, "", verbatim=True, ends=False) for i, text in enumerate(_texts(source), 1)]


def _file(folder: Path, names: Sequence[str]) -> Path | None:
    paths = (folder / f"{name}{end}" for name in names for end in (".jsonl", ".json", ".parquet"))
    return next((path for path in paths if path.is_file()), None)


def _shots(source: str) -> str:
    """The few-shot examples beside a question file: forget_qa.json has forget_qa_icl.json."""
    path = Path(source)
    return str(path.with_name(f"{path.stem}_icl{path.suffix}")) if path.suffix else f"{source}_icl"


def _texts(source: str) -> list[str]:
    """MUSE's own files are JSON lists of texts; on the hub they have a column text."""
    if source.endswith(".json"):
        with suppress(RunError):  # it may be rows all the same
            texts = read_json(source, list)
            if all(isinstance(text, str) and text.strip() for text in texts):
                return texts
    return [row.answer for row in read_rows(source)]
