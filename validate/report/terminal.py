"""A validation's result for the person who typed the command."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ingot.export.summary import COLOURS
from ingot.plugins.command_line import console
from ingot.validate.report.asked import asked
from ingot.validate.report.costs import costs
from ingot.validate.report.grouping import grouped
from ingot.validate.report.words import LISTED, figures, headline, number, rounded_words
from ingot.validate.result import Report

# Columns of a terminal that has room for a tensor's name of so many in one line.
WIDTH, MOST_NAME = 80, 24


def print_report(report: Report) -> None:
    """The verdict, the worst tensor of each kind, the figures, and every problem, on stdout."""
    out = console(soft_wrap=True, highlight=False)
    verdict, _, rest = headline(report).partition(":")
    out.print(f"[bold {COLOURS[report.verdict]}]{verdict}[/]:{escape(rest)}")
    if report.place is not None:
        out.print(f"It begins at: {escape(report.place)}")
    if report.worst:
        console().print(_scores(report, out.width))
    if report.activations is not None:
        out.print(rounded_words(report.activations), markup=False)
    for name, text in (*figures(report), *costs(report), *asked(report)):
        out.print(f"{name}: {text}", markup=False)
    for part in report.short:
        out.print(f"NOT COVERED {part}", markup=False)
    for word, problems in (("FAILED", report.failures), ("WORSE", report.worse)):
        groups = grouped(report, problems)
        for group in groups[:LISTED]:
            out.print(f"{word} {group.text}", markup=False)
        more = sum(group.count for group in groups[LISTED:])
        if more:
            out.print(f"and {more} more problems; --report FOLDER writes all of them")


def _scores(report: Report, width: int) -> Table:
    compared = sum(tensor.error is not None for tensor in report.tensors)
    title = f"Worst of {compared} tensors; a floor is eager PyTorch's own error"
    table = Table(title=title, title_justify="left")
    table.add_column("kind", overflow="fold")
    for column in ("error", "in floors", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    # A name that is cut off names nothing, and one in two lines is hard to find again.
    longest = max(len(tensor.name) for tensor in report.worst.values())
    table.add_column("stage", overflow="fold")
    whole = longest <= MOST_NAME and width >= WIDTH
    table.add_column("tensor", overflow="fold", no_wrap=whole)
    for tensor in report.worst.values():
        cells = (number(tensor.error), number(tensor.score), number(tensor.limit))
        table.add_row(escape(tensor.kind), *cells, escape(tensor.stage), escape(tensor.name))
    return table
