"""Progress of the long steps, and what each one cost."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Advance = Callable[[int], None]


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
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A step; ``total`` is its size in bytes where it is known.

        Yields:
            a function to call with the bytes done.
        """
        _reset_peak()
        start = time.perf_counter()
        with self.show(name, total) as advance:
            yield advance
        self.finished.append(Stage(name, time.perf_counter() - start, peak_bytes()))

    @contextlib.contextmanager
    def show(self, name: str, total: int | None) -> Iterator[Advance]:
        """Nothing to see; see ``RichStages``."""
        yield lambda _bytes: None


class RichStages(Stages):
    """Steps as progress bars on a terminal, one line each in a log."""

    @contextlib.contextmanager
    def show(self, name: str, total: int | None) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        console = Console(stderr=True)
        if not console.is_terminal:
            console.print(f"{name} ...")
            yield lambda _bytes: None
            return
        columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
        if total is not None:
            columns[2:2] = [BarColumn(), DownloadColumn(), TransferSpeedColumn()]
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.advance(task, done)


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
