"""The four files of one validation: JSON, JUnit XML, Markdown and one HTML page."""

from __future__ import annotations

from pathlib import Path

from ingot.plugins.errors import IngotError, install_hint
from ingot.plugins.whole import write_whole
from ingot.validate.report.texts import json_text, junit_text, markdown_text
from ingot.validate.result import Report


class ReportError(IngotError):
    """A report that cannot be made."""


def write(report: Report, folder: Path) -> None:
    """Write ``report.json``, ``junit.xml``, ``summary.md`` and ``report.html`` into a folder.

    Equal reports give equal bytes. Everything is made before the first file is written, and each
    file appears whole or not at all.
    """
    # Here: only a process that writes a page pays for importing matplotlib.
    try:
        from ingot.validate.report.html import page
    except ImportError as error:
        raise ReportError(
            f"{error.name} is missing; install what draws the page with: {install_hint('report')}"
        ) from error

    files = {
        "report.json": json_text(report),
        "junit.xml": junit_text(report),
        "summary.md": markdown_text(report),
        "report.html": page(report),
    }
    for name, text in files.items():
        write_whole(folder / name, text)


def write_json(report: Report, folder: Path) -> None:
    """Write ``report.json`` alone, as an export does into its ingot."""
    write_whole(folder / "report.json", json_text(report))
