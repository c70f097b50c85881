"""The findings of `ship check` in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loramox.extras.check.servers import Finding

STYLES = {"ok": "green", "stop": "bold red", "note": "dim"}


def show_findings(findings: Sequence[Finding], servers: Sequence[str]) -> None:
    """Print a row a finding, equal ones of several servers together, and below it, unbroken, what to do about each."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        together.setdefault(finding[1:], []).append(finding.server)
    table, remedies = Table("", "server", "", "what"), []
    for number, ((verdict, what, remedy), found) in enumerate(together.items(), start=1):
        names = "all" if "all" in found or set(found) == set(servers) else ", ".join(found)
        table.add_row(str(number), names, f"[{STYLES[verdict]}]{verdict}[/]", escape(what))
        remedies.append(f"{number}  {remedy}")
    Console().print(table)
    Console(soft_wrap=True).print(*remedies, sep="\n", markup=False, highlight=False)
