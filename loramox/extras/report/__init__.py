"""The report: a run, its sweep and the attacks on it on one page. Everything is read from disk; no model is loaded."""

from loramox.errors import needs

with needs("report"):
    from loramox.extras.report.page import FACTS, PAGE, SUMMARY, report

__all__ = ["FACTS", "PAGE", "SUMMARY", "report"]
