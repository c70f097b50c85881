"""MkDocs hook: pages made from the code and from other files, so that nothing is written twice.

`index.md` is the README, `reference/` is made from the parsers, dataclasses and docstrings, and the records that pages link to
(`../recipes/…`) become pages of the site.
"""

import dataclasses
import os
import re
import textwrap
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from transformers import TrainingArguments

import loramox
from loramox.cli import main
from loramox.cli.arguments import STEPS, VERBS

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
TRAINING_ARGUMENTS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
# Files that have another place on the site than in the checkout.
PLACES = {"README.md": "index.md", "CHANGELOG.md": "reference/changelog.md"}
# What `loramox` exports, by what a reader looks for.
PYTHON = {
    "Load, scale and switch": ("ForgetSwitch",),
    "Train": ("unlearn", "UnlearnTrainer", "UnlearnConfig", "RunConfig", "ShippingConfig"),
    "Rows": ("Data", "Columns", "read_rows", "Tokenisation", "encode"),
    "The reference": ("ReferenceConfig", "load_reference", "add_lora"),
}
JOBS = {
    "Evaluate, attack, sweep": (
        "loramox.evaluate.evaluate.evaluate",
        "loramox.evaluate.attacks.attack.attack",
        "loramox.sweep.sweep.sweep",
    ),
    "Ship": (
        "loramox.adapter.export.extrapolate",
        "loramox.extras.merge.job.merge",
        "loramox.extras.serve.serve_folder",
    ),
    "Extend": (
        "loramox.train.registry.method",
        "loramox.train.registry.Method",
        "loramox.train.terms.Term",
        "loramox.train.terms.Answers",
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and every file outside of docs/ that a page links to."""
    for uri, content in reference().items():
        files.append(File.generated(config, uri, content=content))
    for source, uri in PLACES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text()))
    sources = {uri: source for source, uri in PLACES.items()}
    pages = files.documentation_pages()
    while pages:
        page = pages.pop()
        source = ROOT / sources.get(page.src_uri, f"docs/{page.src_uri}")
        if page.src_uri.startswith("recipes/"):
            source = ROOT / page.src_uri
        page.content_string, targets = moved(page.content_string, source, page.src_uri)
        for target in targets:
            if files.get_file_from_path(target) is None and (ROOT / target).is_file():
                files.append(File.generated(config, target, content=(ROOT / target).read_bytes()))
                if target.endswith(".md"):
                    pages.append(files.get_file_from_path(target))
    return files


def moved(text: str, source: Path, uri: str) -> tuple[str, list[str]]:
    """A page with its links as the site has them, and where they lead. A link to a folder, which is no page, is no link."""
    targets = []

    def link(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        if target.is_dir():
            return "]"
        path = str(target.relative_to(ROOT))
        targets.append(PLACES.get(path, path.removeprefix("docs/")))
        return f"]({os.path.relpath(targets[-1], os.path.dirname(uri) or '.')}{match[2] or ''})"

    return LINK.sub(link, text), targets


class Captured(Exception):
    """Carries the parser of a verb out of the command line."""


def parser_of(verb: str) -> ArgumentParser:
    """The parser of a verb, or of a step like "ship merge", as the command line makes it."""
    parse = ArgumentParser.parse_known_args

    def capture(parser: ArgumentParser, *args: Any, **more: Any) -> Any:
        if parser.prog.removesuffix(" LEDGER") == f"loramox {verb}":
            raise Captured(parser)
        return parse(parser, *args, **more)

    with patch.object(ArgumentParser, "parse_known_args", capture):
        try:
            main(verb.split())
        except Captured as captured:
            return captured.args[0]
    raise AssertionError(f"loramox {verb} has no parser")


def reference() -> dict[str, str]:
    """The generated pages of the reference, by where they lie."""
    parsers = {verb: parser_of(verb) for verb in [*VERBS, *STEPS] if verb not in ("ship", "requests")}
    return {
        "reference/cli.md": command_line(parsers),
        "reference/settings.md": settings(parsers),
        "reference/api.md": python(),
    }


def command_line(parsers: dict[str, ArgumentParser]) -> str:
    """A section for each verb: usage, its own flags, and links to the groups of settings that it takes."""
    page = [
        "# Command line",
        "Made from the code. Every setting can stand in a YAML recipe, which comes first: `loramox VERB recipe.yaml --flag …`. "
        "A flag wins over the recipe.",
    ]
    for verb, parser in parsers.items():
        kinds = getattr(parser, "dataclass_types", ())
        inherited = {field.name for kind in kinds for field in dataclasses.fields(kind)}
        own = [a for a in parser._actions if a.dest not in inherited and a.help != SUPPRESS and "help" not in a.dest]
        page += [f"## {verb}", (VERBS | STEPS)[verb][0].upper() + (VERBS | STEPS)[verb][1:] + ".", usage(parser)]
        if own:
            page.append(
                table(
                    ("flag", "default", "meaning"),
                    [
                        (code(", ".join(a.option_strings) or a.metavar or a.dest), shown(a.default), str(a.help or ""))
                        for a in own
                    ],
                )
            )
        if kinds:
            links = ", ".join(f"[{kind.__name__}](settings.md#{kind.__name__.lower()})" for kind in kinds)
            page.append(f"Settings: {links}.")
    return "\n\n".join(page) + "\n"


def usage(parser: ArgumentParser) -> str:
    text = " ".join(parser.format_usage().removeprefix("usage: ").replace("[-h] ", "").split())
    lines = textwrap.wrap(text, 90, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(["```", *lines, "```"])


def settings(parsers: dict[str, ArgumentParser]) -> str:
    """A section for each dataclass of settings, with the verbs that take it."""
    verbs: dict[type, list[str]] = {}
    for verb, parser in parsers.items():
        for kind in getattr(parser, "dataclass_types", ()):
            verbs.setdefault(kind, []).append(verb)
    page = [
        "# Settings",
        "Made from the dataclasses. Each field is a flag of the command line, a key of a YAML recipe, and an argument in Python.",
    ]
    for kind, users in verbs.items():
        links = ", ".join(f"[{verb}](cli.md#{verb.replace(' ', '-')})" for verb in users)
        fields = [field for field in dataclasses.fields(kind) if field.init]
        trainers = (
            {field.name for field in dataclasses.fields(TrainingArguments)}
            if issubclass(kind, TrainingArguments)
            else set()
        )
        own = [field for field in fields if field.name not in trainers or field.name in kind.__annotations__]
        page += [
            f"## {kind.__name__}",
            f"{summary(kind)} Taken by {links}.",
            table(("setting", "default", "meaning"), map(row, own)),
        ]
        if trainers:
            rest = ", ".join(code(field.name) for field in fields if field not in own)
            page.append(
                f"It also has these settings of transformers' [TrainingArguments]({TRAINING_ARGUMENTS}): {rest}."
            )
    return "\n\n".join(page) + "\n"


def row(field: dataclasses.Field[Any]) -> tuple[str, str, str]:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    choices = field.metadata.get("choices")
    meaning = field.metadata.get("help", "") + (f" One of {', '.join(map(code, choices))}." if choices else "")
    return code(field.name), shown(default, required=default is dataclasses.MISSING), meaning


def python() -> str:
    """The API, from docstrings."""
    page = ["# Python", "Made from the docstrings. Names of the first groups are imported from `loramox`."]
    for title, names in PYTHON.items():
        page += [f"## {title}", *(f"::: {loramox._HOME_OF[name]}.{name}" + options(name) for name in names)]
    for title, names in JOBS.items():
        page += [f"## {title}", *(f"::: {name}" for name in names)]
    page += [
        "## Errors",
        "::: loramox.errors\n    options: {show_root_heading: false, show_root_toc_entry: false, filters: ['^[A-Z]']}",
    ]
    return "\n\n".join(page) + "\n"


def options(name: str) -> str:
    """Of settings and the trainer, the class alone: the settings have a page, and what the trainer overrides is no API."""
    return "\n    options: {members: false}" if name.endswith(("Config", "Trainer")) else ""


def summary(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def code(text: str) -> str:
    return f"`{text}`"


def shown(default: Any, required: bool = False) -> str:
    if required:
        return "required"
    if default is None or default == SUPPRESS:
        return ""
    if isinstance(default, bool):
        return code(str(default).lower())
    if isinstance(default, (list, tuple)):
        return code(" ".join(map(str, default))) if default else ""
    return code(str(getattr(default, "value", default)))
