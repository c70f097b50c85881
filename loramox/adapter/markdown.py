"""Untrusted text on one line of a card, and the fields at the top of the card."""

import re

import yaml

from loramox.errors import escaped


def front_matter(base: str, library: str, tags: list[str]) -> str:
    """What the hub reads at the top of a card, as YAML."""
    # In double quotes everything stays on one line: a line of --- would end the fields for those who do not parse YAML.
    style = None if base.isprintable() else '"'
    named = yaml.safe_dump(
        {"base_model": base}, default_style=style, default_flow_style=False, allow_unicode=True, width=10_000
    )
    return f"---\n{named}library_name: {library}\ntags: [{', '.join(tags)}]\n---\n"


def code(text: object) -> str:
    """`text` as code in Markdown, whatever is in it: on one line, in more backticks than it has in a row."""
    text = line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{text}{space}{fence}"


def line(text: object) -> str:
    """`text` on one line, without control characters."""
    return escaped(re.sub(r"\s", " ", str(text)))
