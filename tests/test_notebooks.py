"""Every notebook runs from top to bottom on the suite's pico model, in a kernel of its own, and is committed without outputs."""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "recipes" / "notebooks"
# Set behind the cell that is tagged "parameters", as papermill does.
SHORT: dict[str, dict[str, Any]] = {
    "demo": {"EPOCHS": 1},
    "own_rows": {"SMALL": True},
    "choose_alpha": {},
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == SHORT.keys()


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_is_committed_without_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert notebook.cells[0].cell_type == "markdown"


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_runs(name: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = read(name)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    given = "\n".join(f"{key} = {value!r}" for key, value in SHORT[name].items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(given))
    # A kernel may take minutes to start on a machine that is busy.
    waits = {"timeout": 600, "startup_timeout": 300}
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(demo)}}, **waits).execute()
