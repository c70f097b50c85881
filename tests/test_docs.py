"""Every shell and Python block of the README and the docs is run here, on the suite's pico model and with one epoch of training.

A block that cannot be run has a comment above it that says why: `<!-- not run: needs a GPU -->`. Then its command lines are
parsed, its Python is compiled, and its imports are resolved.
"""

import ast
import importlib
import re
import shlex
import shutil
import string
import subprocess
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import HfArgumentParser

from loramox.cli import HOMES, main
from loramox.evaluate.row_metrics import ROW_METRICS
from loramox.extras.check.servers import SERVERS
from loramox.train.registry import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"<!-- not run: (.+) -->")
LANGUAGES = {"", "bash", "python", "json", "yaml"}
TRAINS = (["unlearn"], ["train"], ["requests", "add"])
EPOCHS = "num_train_epochs"
# So that a command does its work on a few tokens, points and steps.
SHORT = {
    "evaluate": "--max_new_tokens 2",
    "attack": "--max_new_tokens 2 --relearn_steps 1",
    "sweep": "--max_new_tokens 2 --refine 0",
}


class Block(NamedTuple):
    """A fenced block of a page, and why it is not run, if it is not."""

    line: int
    language: str
    text: str
    why_not: str | None


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        mark = MARK.fullmatch(lines[start - 1].strip() or lines[start - 2].strip())
        yield Block(
            start + 1, lines[start].strip("` "), "\n".join(lines[start + 1 : number]), mark[1] if mark else None
        )
        start = None
    assert start is None, f"{page}: the block in line {start} does not end"


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The command lines of a shell block, and their words, with the variables that the block sets."""
    names: dict[str, str] = {}
    line = ""
    for more in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = string.Template(f"{line}\n{more}" if line else more).safe_substitute(names)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            continue
        if words and (given := re.fullmatch(r"([A-Z]+)=(.*)", words[0])):
            names[given[1]] = given[2]
        elif words:
            yield line, words
        line = ""


def verb_of(words: list[str]) -> list[str] | None:
    """The words after `loramox`, or after `-m loramox`, if it is what the command line runs."""
    if words[0] == "loramox":
        return words[1:]
    at = words.index("-m") if "-m" in words else -1
    return words[at + 2 :] if at >= 0 and words[at + 1] == "loramox" else None


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_says_what_language_it_is_in(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}"
        if block.language == "":  # output, or a file
            assert not re.search(r"^(loramox|pip|make) ", block.text, re.MULTILINE), f"{page}:{block.line} is bash"


def test_the_tree_in_contributing_is_that_of_the_package() -> None:
    code = (ROOT / "docs" / "tree.py").read_text()
    names: dict[str, Any] = {"__file__": str(ROOT / "docs" / "tree.py"), "__name__": "tree"}
    exec(code, names)
    assert names["tree"]() in (ROOT / "CONTRIBUTING.md").read_text(), "run make tree"


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "upgrading-from-0.1"], ids=ids)
def test_names_and_paths_in_the_text_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`(loramox(?:\.[A-Za-z_]+)+)\(?", text):
        home, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(home), attribute), name
    for path in re.findall(r"`((?:loramox|tests|recipes|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


RETAIN_TERMS = {"KL_R": "kl", "CE_R": "ce", "none": "none", "‖h − h_ref‖²": "states"}
SHARED = {
    "retain_term": ...,
    "retain_weight": 1.0,
    "forget_weight": 1.0,
    "instead": ...,
    "targeted": ...,
    "refusals": ...,
}


def test_the_table_of_methods_has_the_defaults_of_the_registry() -> None:
    listed = {}
    for line in (ROOT / "docs" / "methods.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        name, _, retain, alpha, source, defaults = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        method = METHODS[name.strip("`")]
        listed[method.name] = method
        assert RETAIN_TERMS[retain] == method.settings["retain_term"], line
        assert (alpha == "free") == method.alpha_is_free, line
        assert set(re.findall(r"\d{4}\.\d{5}", source)) == set(re.findall(r"\d{4}\.\d{5}", method.title)), line
        given = dict(re.findall(r"--(\w+) ([\w.]+)", defaults))
        for setting, default in method.settings.items():
            if default is None:
                assert f"needs `--{setting}`" in defaults, line
            elif setting in given:
                assert given.pop(setting) in (str(default), f"{default:g}" if isinstance(default, float) else ""), line
            else:
                assert SHARED.get(setting, "not listed") in (default, ...), line
        assert not given, line
    assert listed == {
        name: method for name, method in METHODS.items() if method.terms.__module__.startswith("loramox.")
    }


class Parsed(Exception):
    """Ends a command once its flags are read and its settings are made."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Read a command line as loramox does, and stop before it does anything."""
    to_dataclasses, to_namespace = HfArgumentParser.parse_args_into_dataclasses, ArgumentParser.parse_args

    def dataclasses(self: HfArgumentParser, *args: Any, **more: Any) -> None:
        unknown = to_dataclasses(self, *args, **more)[-1]
        assert unknown == []
        raise Parsed

    def namespace(self: ArgumentParser, *args: Any, **more: Any) -> Any:
        given = to_namespace(self, *args, **more)
        if self.prog in ("loramox ship", "loramox requests"):
            return given
        raise Parsed

    def parse(words: list[str]) -> None:
        monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", dataclasses)
        monkeypatch.setattr(ArgumentParser, "parse_args", namespace)
        verb, *rest = words
        with pytest.raises(Parsed):
            getattr(importlib.import_module(f"loramox.cli.{HOMES[verb]}"), verb)(rest)

    return parse


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_a_block_that_is_not_run_is_right_as_far_as_it_can_be_read(
    page: Path, parse: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        if block.why_not and block.language == "bash":
            for line, words in commands(block.text):
                if verb := verb_of(words):
                    monkeypatch.setenv("WORLD_SIZE", "2" if words[0] == "torchrun" else "1")
                    parse([word for word in verb if word != "…"])
                else:
                    check_other(line, words)
        elif block.why_not and block.language == "python":
            resolve(compile(block.text, f"{page}:{block.line}", "exec", ast.PyCF_ONLY_AST))


def resolve(tree: ast.AST) -> None:
    """Import what a block imports, name by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def check_other(line: str, words: list[str]) -> None:
    """Of commands that set something up: what they name exists."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), line
    if words[:2] == ["python", "-m"] and words[2].startswith("recipes"):
        module = ROOT / words[2].replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), line
    if words[0] == "python" and words[1].startswith("recipes/"):
        assert (ROOT / words[1]).exists(), line


SETS_UP = ("make", "source", "pip")


@pytest.fixture
def registries() -> Iterator[None]:
    """Afterwards the registries are as before: examples register a method, a metric and a server."""
    before = [(registry, dict(registry)) for registry in (METHODS, ROW_METRICS, SERVERS)]
    yield
    for registry, registered in before:
        registry.clear()
        registry.update(registered)


def run(line: str, words: list[str]) -> None:
    """Run a command line. Training takes one epoch, and replaces what lies there."""
    if (verb := verb_of(words)) is None:
        if words[0] in SETS_UP:
            check_other(line, words)
        else:
            assert words[0] in ("head", "tail"), f"{line}: mark its block as not run"
            subprocess.run(line, shell=True, check=True)
        return
    if any(verb[: len(trains)] == trains for trains in TRAINS):
        verb += [f"--{EPOCHS}", "1"]
        if "--out" in verb:
            shutil.rmtree(verb[verb.index("--out") + 1], ignore_errors=True)
    main([*verb, *SHORT.get(verb[0], "").split()])


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language for b in blocks(page))], ids=ids)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path, demo: Path, registries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.why_not:
            continue
        if block.language == "bash":
            for line, words in commands(block.text):
                run(line, words)
        elif block.language == "python":
            exec(compile(re.sub(rf"{EPOCHS}=\d+", f"{EPOCHS}=1", block.text), f"{page}:{block.line}", "exec"), names)
