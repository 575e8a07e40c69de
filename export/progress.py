"""Progress of the long steps, and what each one cost."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ingot.plugins.command_line import console
from ingot.plugins.errors import IngotError

Advance = Callable[[int], None]
Unit = Literal["bytes", "steps"]
# Seconds after which a log has a line more of a step.
SILENT = 20.0


@dataclass(frozen=True)
class Stage:
    """One finished step: seconds it took and the process's peak memory during it, in bytes."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass
class Stages:
    """Measures named steps; subclasses show them.

    Attributes:
        finished: the steps so far.
    """

    finished: list[Stage] = field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None, unit: Unit = "bytes") -> Iterator[Advance]:
        """A step; ``total`` is its size in ``unit`` where it is known.

        Yields:
            a function to call with the amount done.
        """
        _reset_peak()
        start = time.perf_counter()
        try:
            with self.show(name, total, unit) as advance:
                yield advance
        # For what has no sentence of its own, such as memory that is not there: what it was for.
        except Exception as error:
            if not isinstance(error, IngotError):
                error.add_note(name)
            raise
        self.finished.append(Stage(name, time.perf_counter() - start, peak_bytes()))

    @contextlib.contextmanager
    def show(self, name: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        """Nothing to see; see ``RichStages``."""
        yield lambda _amount: None

    def table(self, title: str, rows: Sequence[Any]) -> None:
        """Shows dataclasses of one kind as a table; nothing to see here."""


class RichStages(Stages):
    """Steps as progress bars on a terminal; in a log a line each, and more of those that last."""

    def table(self, title: str, rows: Sequence[Any]) -> None:
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for column in fields(rows[0]):
            table.add_column(column.name.replace("_", " "), overflow="fold")
        for row in rows:
            table.add_row(*(_cell(getattr(row, column.name)) for column in fields(row)))
        console(stderr=True).print(table)

    @contextlib.contextmanager
    def show(self, name: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        from rich import progress as bars

        errors = console(stderr=True)
        if not errors.is_terminal:
            errors.print(f"{name} ...")
            yield _in_log(name, total, errors.print)
            return
        columns: list[bars.ProgressColumn] = [
            bars.SpinnerColumn(),
            bars.TextColumn("{task.description}"),
        ]
        if total is not None and unit == "bytes":
            columns += [bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn()]
        elif total is not None:
            columns += [bars.BarColumn(), bars.MofNCompleteColumn()]
        columns.append(bars.TimeElapsedColumn())
        with bars.Progress(*columns, console=errors) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.advance(task, done)


def _in_log(name: str, total: int | None, say: Callable[[str], object]) -> Advance:
    """Says how far a step is, where nothing was said of it for a while."""
    done, last = 0, time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if total and now - last >= SILENT:
            last = now
            # The total may be an estimate.
            say(f"{name}, {min(done / total, 1.0):.0%} ...")

    return advance


def _cell(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _reset_peak() -> None:
    # Linux only: "5" resets the high-water mark of resident memory (proc(5), clear_refs).
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The process's peak resident memory, since the last step began where the system can say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
