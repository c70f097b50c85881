"""A figure as SVG inside a page: text stays text, colours are the page's, and nothing refers to the outside."""

import io
import re
from collections.abc import Callable
from typing import NamedTuple
from xml.etree import ElementTree

from matplotlib import rc_context, rcParamsDefault
from matplotlib.figure import Figure

from loramox import colours

# By the names that the page has for them: it turns them into its own, which change in the dark.
COLOURS = {
    "forget": colours.FORGET,
    "retain": colours.RETAIN,
    "retrained": colours.RETRAINED,
    "ink": colours.CHOSEN,
    "muted": colours.MUTED,
    "grid": "#c8c8c8",
    "paper": "#fffffe",
}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.8,
}


class Picture(NamedTuple):
    """A drawing, and the same in words for those who do not see it."""

    svg: str
    caption: str


def picture(name: str, size: tuple[float, float], draw: Callable[[Figure], None], words: str, caption: str) -> Picture:
    """Draw on a figure of `size` inches; `words` are its text alternative. `name` is unlike any other's on the page."""
    # The reader's own matplotlibrc has no say, so that the same input gives the same bytes.
    defaults = {key: value for key, value in rcParamsDefault.items() if not key.startswith("backend")}
    with rc_context(defaults | STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return Picture(_inline(file.getvalue(), name, words), caption)


def _inline(svg: str, name: str, words: str) -> str:
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style", "clipPath"):
                parent.remove(child)
    used = {v.removeprefix("#") for e in root.iter() for k, v in e.attrib.items() if _local(k) == "href"}
    for element in root.iter():
        element.tag = _local(element.tag)
        held = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({k: _own(k, v, name) for k, v in held.items() if k not in ("id", "clip-path")})
        if held.get("id") in used:  # of two with the same name, which are the same, one is enough
            used.remove(held["id"])
            element.set("id", f"{name}-{held['id']}")
        element.tail = None
        if element.tag not in ("text", "tspan"):
            element.text = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": words, "id": name}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """Without its namespace, which a page does not need."""
    return name.rpartition("}")[2]


def _own(key: str, value: str, name: str) -> str:
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    if key == "style":
        value = re.sub(r"font: ([\w ]*?)([\d.]+)px [^;]*", r"font-size: \2px", value)
        for colour, code in (*COLOURS.items(), ("ink", "#000000")):
            value = value.replace(code, f"var(--{colour})")
    return value
