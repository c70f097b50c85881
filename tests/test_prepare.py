"""What is looked at before a model is loaded: rows that belong together, sides that look swapped, the base of an adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramox import Data, ReferenceConfig, RunConfig, Tokenisation, UnlearnConfig
from loramox.adapter.folder import check_base
from loramox.data.rows import Columns
from loramox.errors import AdapterError, RowsError, RunError
from loramox.unlearning import train


def run(pico: Path, data: Data, out: Path, columns: Columns | None = None, **how: Any) -> None:
    args = UnlearnConfig(method="altpo" if columns else "mox", use_cpu=True, report_to="none")
    train(
        RunConfig(str(out)), ReferenceConfig(str(pico), quantization="none"), data, args, columns, Tokenisation(**how)
    )


def test_a_forget_row_of_which_one_answer_is_too_long_is_named(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    """As many true answers as wanted ones are left, and they are not those of the same rows."""
    records = [{"question": f"{i}?", "answer": f"True {i}.", "other": f"Wanted {i}."} for i in range(4)]
    records[1]["answer"] = records[2]["other"] = "Rome " * 60
    forget = tmp_path / "forget.jsonl"
    forget.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(RowsError, match=r"forget.jsonl, row [23]: only one of its two answers"):
        run(
            pico("llama"),
            Data(str(forget), str(rows[1])),
            tmp_path / "run",
            Columns(wanted_column="other"),
            long_rows="drop",
        )
    assert not (tmp_path / "run").exists()


def test_more_rows_to_forget_than_to_retain_are_asked_about_before_anything_is_written(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.warns(UserWarning, match="12 rows to forget, 4 to retain.*swap"),
        pytest.raises(RunError, match="is a file"),
    ):
        run(pico("llama"), Data(str(rows[1]), str(rows[0])), tmp_path / "file")


def test_of_the_hub_a_commit_tells_one_base_from_another() -> None:
    base = {"model": "a/b", "revision": "one", "shape": "s", "weights": None}
    check_base({"base": base}, base | {"model": "mirror/b"}, Path("adapter"))
    check_base({"base": base}, base | {"revision": None}, Path("adapter"))
    with pytest.raises(
        AdapterError, match=r"was made for the base a/b, and a/c is at revision two, not at its one \(--revision\)"
    ):
        check_base({"base": base}, base | {"model": "a/c", "revision": "two"}, Path("adapter"))
