"""The HTML page of one validation: self-contained, without scripts, readable without colour."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ingot.validate.report.asked import asked
from ingot.validate.report.costs import cost_tables, costs
from ingot.validate.report.grouping import grouped
from ingot.validate.report.plots import plots
from ingot.validate.report.words import clean, figures, headline, number, scores
from ingot.validate.result import Report

LISTED = 15
# The page's style is by the first word of a verdict, but for what it lacks.
STYLES = {"passed, in part": "part"}


def page(report: Report) -> str:
    """The whole page."""
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = number
    failures, worse = grouped(report, report.failures), grouped(report, report.worse)
    return clean(
        environment.from_string(source).render(
            report=report,
            style=STYLES.get(report.verdict, report.verdict),
            headline=headline(report),
            location=report.place,
            scores=scores(report),
            figures=figures(report),
            costs=costs(report),
            cost_tables=cost_tables(report),
            asked=asked(report),
            parts=() if report.coverage is None else report.coverage.parts,
            failures=failures[:LISTED],
            unlisted=sum(group.count for group in failures[LISTED:]),
            worse=worse[:LISTED],
            worse_unlisted=sum(group.count for group in worse[LISTED:]),
            plots=plots(report),
        )
    )
