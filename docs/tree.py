"""Writes the tree of the package into CONTRIBUTING.md: each file with the first sentence of its docstring. Run by `make tree`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
TREE = re.compile(r"(?<=<!-- tree: make tree -->\n\n)```\n.*?```", re.DOTALL)


def line(path: Path, depth: int) -> str:
    """A file or a package, indented, and what its docstring says first."""
    name = f"{path.name}/" if path.is_dir() else path.name
    docstring = ast.get_docstring(ast.parse((path / "__init__.py" if path.is_dir() else path).read_text())) or ""
    first = " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
    return f"{'  ' * depth}{name:{26 - 2 * depth}}{first}"


def tree(folder: Path = ROOT / "loramox", depth: int = 0) -> str:
    lines = [line(folder, depth)]
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and (path / "__init__.py").exists():
            lines.append(tree(path, depth + 1))
        elif path.suffix == ".py" and path.name != "__init__.py":
            lines.append(line(path, depth + 1))
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(TREE.sub(lambda _: f"```\n{tree()}\n```", PAGE.read_text()))
