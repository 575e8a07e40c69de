"""The four files of one validation: JSON, JUnit XML, Markdown and one HTML page."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ingot.plugins.errors import install_hint
from ingot.plugins.whole import check_file, keep_out, write_whole
from ingot.validate.report.texts import json_text, junit_text, markdown_text
from ingot.validate.result import Report

FILES = ("report.json", "junit.xml", "summary.md", "report.html")


def check_folder(folder: Path, *read: Path) -> None:
    """Refuse a folder that could not take a report, before any work is done.

    Args:
        folder: of the report.
        read: an ingot or a checkpoint, none of which it may lie in.

    Raises:
        WriteError: naming the folder or a file of it.
    """
    keep_out(folder, *read)
    for name in FILES:
        check_file(folder / name)


def missing() -> str | None:
    """What a report lacks here, in one sentence; None where it lacks nothing."""
    try:
        import ingot.validate.report.html  # noqa: F401
    except ImportError as error:
        return (
            f"There is no report.html, for {error.name or error} cannot be imported; install it "
            f"with: {install_hint('report')}"
        )
    from ingot.validate.report.plots import cannot_draw

    return cannot_draw()


def write(report: Report, folder: Path) -> None:
    """Write ``report.json``, ``junit.xml``, ``summary.md`` and ``report.html`` into a folder.

    Equal reports give equal bytes. Everything is made before the first file is written, and each
    file appears whole or not at all. Where ``missing`` says that something is, the rest is written.
    """
    files = {
        "report.json": json_text(report),
        "junit.xml": junit_text(report),
        "summary.md": markdown_text(report),
    }
    # Here: only a process that writes a page pays for importing what draws it.
    with contextlib.suppress(ImportError):
        from ingot.validate.report.html import page

        files["report.html"] = page(report)
    for name, text in files.items():
        write_whole(folder / name, text)


def write_json(report: Report, folder: Path) -> None:
    """Write ``report.json`` alone, as an export does into its ingot."""
    write_whole(folder / "report.json", json_text(report))
