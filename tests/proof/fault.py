"""One planted fault: how it is made, what has to see it, and where it has to be found."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import pytest
from traces import Traces

from ingot.validate.result import Report
from proof.bases import Kept

# What may see a fault: the numbers of a run, a comparison that needs none, or a refusal to run.
By = Literal["numbers", "weights", "graph", "contract", "refused"]
Place = Literal["graph", "weights", "manifest", "session", "kernel", "export"]
Change = Callable[[Path], None]
Patch = Callable[[pytest.MonkeyPatch], None]


class Plant(Protocol):
    """How a fault is made of a right ingot."""

    def planted(self, kept: Kept, place: Path) -> Iterator[Path]:
        """Gives the wrong ingot, in a folder that is not there yet, as long as it is wrong."""


@dataclass(frozen=True)
class InFolder:
    """A copy of the ingot is changed, and its hashes are put right."""

    change: Change

    def planted(self, kept: Kept, place: Path) -> Iterator[Path]:
        shutil.copytree(kept.ingot, place)
        self.change(place)
        yield place


@dataclass(frozen=True)
class InProcess:
    """The ingot is right, and what runs it is wrong."""

    patch: Patch

    def planted(self, kept: Kept, place: Path) -> Iterator[Path]:
        shutil.copytree(kept.ingot, place)
        with pytest.MonkeyPatch.context() as patch:
            self.patch(patch)
            yield place


@dataclass(frozen=True)
class InExport:
    """What exports is wrong.

    Attributes:
        patch: makes it so.
        retraced: what is traced is another graph; otherwise the right one's trace is taken.
        lasting: it is wrong during the validation too, as a fault of the code itself is.
    """

    patch: Patch
    retraced: bool = False
    lasting: bool = False

    def planted(self, kept: Kept, place: Path) -> Iterator[Path]:
        # The truth is of the right code.
        _ = kept.reference
        traces = Traces() if self.retraced else kept.traces
        with pytest.MonkeyPatch.context() as patch:
            self.patch(patch)
            kept.exported(place, traces)
            if self.lasting:
                patch.setattr(kept, "traces", traces)
                yield place
        if not self.lasting:
            yield place


@dataclass(frozen=True)
class Where:
    """Where a fault has to be found.

    Attributes:
        layer: of the location; None outside of the layers.
        operators: one of these; any where empty.
        also: layers that are right too, where the fault lies between two of them.
        or_none: a location that could not be found is right too, since no single node is wrong.
        words: something that the location, or one of the failures, says.
    """

    layer: int | None = None
    operators: tuple[str, ...] = ()
    also: tuple[int | None, ...] = ()
    or_none: bool = False
    words: str = ""

    def missed(self, report: Report) -> str:
        """What is not as it should be, in words; empty where all is."""
        found = report.location
        if self.words:
            said = " ".join([*report.failures, report.place or ""])
            return "" if self.words in said else f"nobody says {self.words!r}"
        if found is None:
            return "" if self.or_none else f"no location: {report.unlocated}"
        layers = (self.layer, *self.also)
        if found.layer not in layers or (self.operators and found.operator not in self.operators):
            return f"found at {found}"
        return ""


def in_layer(number: int | None) -> Where:
    """Where a wrong kernel has to be found: it differs in no graph, and no node is told."""
    return Where(number, ("kernels",))


# For what is a matter of some words, such as a field of the contract.
def saying(words: str) -> Where:
    """Where the report names something."""
    return Where(words=words)


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: of the fault; with the base and the place it is the only one.
        base: of ``proof.bases``.
        kind: what it is an instance of.
        place: what is wrong.
        plant: how it is made.
        by: one of these has to see it; where empty, it is below what rounding explains, and passes.
        where: it has to be found.
        plan: of the validation.
    """

    name: str
    base: str
    kind: str
    place: Place
    plant: Plant
    by: tuple[By, ...] = ("numbers",)
    where: Where | None = None
    plan: Literal["quick", "standard", "thorough"] = "standard"

    @property
    def title(self) -> str:
        """The base, what is wrong of it, and the fault."""
        return f"{self.base}, {self.place}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What came of one fault or one right export.

    Attributes:
        title: of it.
        kind: of it.
        verdict: of the report, or ``refused``, or ``raw`` for an exception that is no sentence.
        by: what saw it.
        floors: the worst score of the run.
        location: in words.
        seconds: the validation and what came before it took.
        missed: what was expected and is not so; empty where all is.
        said: the first failure, or the refusal.
    """

    title: str
    kind: str
    verdict: str
    by: tuple[By, ...]
    floors: float | None
    location: str
    seconds: float
    missed: str = ""
    said: str = ""

    def __str__(self) -> str:
        floors = "" if self.floors is None else f"{self.floors:.3g} floors"
        seen = ", ".join(self.by) or "nothing"
        parts = [self.title, self.verdict, f"seen by {seen}", floors, self.location]
        line = "; ".join(part for part in parts if part) + f"; {self.seconds:.1f} s"
        return f"{line}\n    MISSED: {self.missed} ({self.said})" if self.missed else line


def seen_by(report: Report) -> tuple[By, ...]:
    """What of a report sees a fault."""
    found: list[By] = []
    flips = any(flip.fails for routing in report.routing.values() for flip in routing.flips)
    growth = any(growth.problem for growth in report.growth)
    if flips or growth or any(tensor.problem for tensor in report.tensors):
        found.append("numbers")
    names: tuple[By, ...] = ("weights", "graph", "contract")
    failed = {check.name for check in report.checks if check.problems}
    return (*found, *(name for name in names if name in failed))


def worst(report: Report) -> float | None:
    """The highest score of a run, in floors."""
    scores = [tensor.score for tensor in report.worst.values() if tensor.score is not None]
    return max(scores, default=None)


@contextmanager
def planted(fault: Fault, kept: Kept, place: Path) -> Iterator[Path]:
    """The wrong ingot, as long as it is entered."""
    yield from fault.plant.planted(kept, place)
