"""What an install has: few dependencies, extras that ask for themselves by name, and a package that is found from anywhere."""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml

from loramox import UnlearnConfig
from loramox.errors import MissingExtraError, needs
from loramox.evaluate.asked import Asked
from loramox.evaluate.measure import ScoringConfig
from loramox.sweep.sweep import FRONTIER, PICTURE, SweepConfig, sweep

ROOT = Path(__file__).parents[1]
# The packages of each extra, as the installed package has them; those that are always installed under "".
EXTRAS = defaultdict(set)
for requirement in requires("loramox") or []:
    package, _, condition = requirement.partition(";")
    extra = re.search(r'extra == "(.+)"', condition)
    EXTRAS[extra[1] if extra else ""].add(re.split(r"[><=!~\[ ]", package)[0].lower().replace("-", "_"))
# Packages that an extra installs and nothing else does. (jinja2 is there with torch.)
OPTIONAL = ("matplotlib", "gguf", "tensorboard", "fastapi", "uvicorn", "openai")
# Imported, and installed by a dependency whose own code cannot do without it.
ALWAYS_THERE = {
    "filelock": "datasets",
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "numpy": "transformers",
    "psutil": "accelerate",
    "pyarrow": "datasets",
    "regex": "transformers",
    "tokenizers": "transformers",
    "tqdm": "transformers",
    "yaml": "transformers",
}


def python(code: str, folder: Path | None = None) -> str:
    """What a new Python process prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_needs_at_most_ten_packages_and_no_optional_one() -> None:
    assert len(EXTRAS[""]) <= 10
    assert not EXTRAS[""] & set(OPTIONAL)


def test_a_citation_says_what_the_package_says_of_itself() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["title"], str(cited["version"])) == (package["name"], package["version"])
    assert cited["abstract"] == package["description"]
    assert {part: cited[part] for part in ("authors", "license", "keywords")} == {
        part: package[part] for part in ("authors", "license", "keywords")
    }
    assert package["urls"]["MOX, the paper"] in [reference["url"] for reference in cited["references"]]


def imported(path: Path) -> set[str]:
    """The packages that a source file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - {"loramox"}


def test_every_package_imported_is_a_dependency_or_of_an_extra() -> None:
    declared = EXTRAS[""] | EXTRAS["report"] | EXTRAS["gguf"] | EXTRAS["tensorboard"] | EXTRAS["eval"]
    for path in sorted((ROOT / "loramox").rglob("*.py")):
        assert imported(path) <= declared | set(ALWAYS_THERE), path


def test_every_extra_that_a_message_names_exists() -> None:
    named = {
        name for p in (ROOT / "loramox").rglob("*.py") for name in re.findall(r'\bneeds\("([^"]+)"\)', p.read_text())
    }
    assert named == {"report", "gguf", "tensorboard", "eval"}
    assert named <= EXTRAS.keys()


def test_without_the_optional_packages_the_core_works_and_each_extra_asks_for_itself(tmp_path: Path) -> None:
    said = python(
        f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # None: not installed
import loramox
from loramox.errors import MissingExtraError

without = [m.name for m in pkgutil.walk_packages(loramox.__path__, "loramox.") if m.name not in
           ("loramox.__main__", "loramox.extras.gguf") and not m.name.startswith("loramox.extras.report")]
for name in without:
    importlib.import_module(name)
print(len(without))
args = loramox.UnlearnConfig({str(tmp_path)!r}, use_cpu=True)
print(args.report_to)
for make in (lambda: importlib.import_module("loramox.extras.report"), lambda: importlib.import_module("loramox.extras.gguf"),
             lambda: loramox.UnlearnConfig({str(tmp_path)!r}, use_cpu=True, report_to="tensorboard")):
    try:
        make()
    except MissingExtraError as error:
        print(error)
"""
    ).splitlines()
    assert int(said[0]) > 60
    assert said[1] == "[]"
    install = '{} is not installed. Install it with: pip install "loramox[{}]"'
    assert said[2:] == [
        install.format(*each) for each in (("matplotlib", "report"), ("gguf", "gguf"), ("tensorboard",) * 2)
    ]


def test_logs_go_to_tensorboard_where_it_is_installed(tmp_path: Path) -> None:
    assert UnlearnConfig(str(tmp_path), use_cpu=True).report_to == ["tensorboard"]


def test_a_module_of_our_own_that_is_missing_is_a_bug_and_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"loramox\.extras\.nothing"), needs("report"):
        import loramox.extras.nothing  # noqa: F401
    with pytest.raises(MissingExtraError, match="nothing_such is not installed"), needs("report"):
        import nothing_such.part  # noqa: F401


def test_a_sweep_without_matplotlib_says_so_and_lacks_only_its_picture(
    tmp_path: Path, trained: Path, rows: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    config = SweepConfig(trained=str(trained / "trained"), out=str(tmp_path), alphas=[2.0], refine=0)
    asked = Asked(forget=str(rows[0]), retain=str(rows[1]))
    with pytest.warns(UserWarning, match=rf'{PICTURE} is not drawn: .*pip install "loramox\[report\]"'):
        sweep(config, asked, ScoringConfig(use_cpu=True, max_new_tokens=0))
    assert (tmp_path / FRONTIER).exists()
    assert not (tmp_path / PICTURE).exists()


@pytest.mark.parametrize("place", [lambda above: above, lambda above: above / "loramox"], ids=["above", "inside"])
def test_a_script_above_the_clone_imports_the_package_and_not_the_clones_folder(
    tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    os.symlink(ROOT, tmp_path / "loramox")
    found = python("import loramox; print(loramox.__file__, loramox.LoramoxError)", place(tmp_path)).split()
    assert Path(found[0]).resolve() == ROOT / "loramox" / "__init__.py"
