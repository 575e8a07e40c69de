"""Runs the faults and the right exports of one base after another, in two processes."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from traces import Traces

from ingot.export.ingot import Manifest
from ingot.export.progress import Stages
from ingot.plugins.errors import IngotError
from ingot.validate.early import cannot_compare
from ingot.validate.result import Report
from ingot.validate.run import examine, examine_unrun
from ingot.validate.truth.inputs import QUICK, STANDARD, THOROUGH
from proof.bases import BASES, Base, Kept, known
from proof.fault import Fault, Outcome, planted, seen_by, worst

PLANS = {"quick": QUICK, "standard": STANDARD, "thorough": THOROUGH}
RIGHT = "right export"


def examined(ingot: Path, kept: Kept, plan: str = "standard") -> Report:
    """The path of ``ingot validate``; whatever traces the eager graph gets the kept trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ingot.export.graph.trace", kept.traces)
        reason = cannot_compare(Manifest.read(ingot))
        if reason is not None:
            return examine_unrun(ingot, kept.reference, Stages(), reason, capture=kept.traces)
        reference = kept.reference_of(ingot)
        return examine(
            ingot,
            reference,
            Stages(),
            plan=PLANS[plan],
            capture=kept.traces,
            max_kl=kept.base.max_kl,
        )


def run_fault(fault: Fault, kept: Kept, place: Path) -> Outcome:
    """Plant one fault, validate it and hold what comes of it against what is expected."""
    # Exporting the right ingot is no time of the fault's.
    _ = kept.ingot
    began = time.perf_counter()
    outcome = Outcome(fault.title, fault.kind, "raw", (), None, "", 0.0)
    try:
        with planted(fault, kept, place) as ingot:
            report = examined(ingot, kept, fault.plan)
    except IngotError as error:
        outcome = replace(outcome, verdict="refused", by=("refused",), said=str(error))
        if "refused" not in fault.by:
            outcome = replace(outcome, missed="it was refused, not judged")
    except Exception:
        said = " ".join(traceback.format_exc().split())[-300:]
        outcome = replace(outcome, missed="no sentence but an exception", said=said)
    else:
        outcome = reported(outcome, report, judged(fault, report))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return replace(outcome, seconds=time.perf_counter() - began)


def reported(outcome: Outcome, report: Report, missed: str) -> Outcome:
    """An outcome with what a report says."""
    return replace(
        outcome,
        verdict=report.verdict,
        by=seen_by(report),
        floors=worst(report),
        location=report.place or "",
        said=next(iter([*report.failures, *report.short]), ""),
        missed=missed,
    )


def judged(fault: Fault, report: Report) -> str:
    """What of a report is not as the fault expects it, in words; empty where all is."""
    if not fault.by:
        return "" if report.verdict == "passed" else "rounding explains it, and it did not pass"
    missed = []
    if report.verdict != "failed":
        missed.append(f"the verdict is {report.verdict}")
    found = seen_by(report)
    if not set(found) & set(fault.by):
        missed.append(f"not seen by {' or '.join(fault.by)}")
    if not missed and fault.where is not None:
        missed += filter(None, [fault.where.missed(report)])
    return "; ".join(missed)


def run_right(base: Base, kept: Kept) -> Outcome:
    """Export what is unusual and right, and validate it."""
    began = time.perf_counter()
    outcome = Outcome(base.name, RIGHT, "raw", (), None, "", 0.0)
    try:
        report = examined(kept.ingot, kept)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        outcome = replace(outcome, missed="it raised", said=said)
    else:
        missed = "" if report.verdict == "passed" else "it did not pass"
        outcome = reported(outcome, report, missed)
    return replace(outcome, seconds=time.perf_counter() - began)


def run_group(base: Base, faults: Sequence[Fault], right: bool) -> list[Outcome]:
    """All that begins with one base; prints each as it is done."""
    outcomes = []
    with known(base), tempfile.TemporaryDirectory(prefix="proof-") as place:
        kept = Kept(base, Path(place), _traces(base))
        if right:
            outcomes.append(run_right(base, kept))
            print(outcomes[-1], flush=True)
        for fault in faults:
            outcomes.append(run_fault(fault, kept, Path(place) / "wrong"))
            print(outcomes[-1], flush=True)
    # Models and sessions are in cycles.
    del kept
    gc.collect()
    return outcomes


_LAST: list[tuple[str, Traces]] = []


def _traces(base: Base) -> Traces:
    """Of the family that this process is at: bases differ in weights more often than in graphs."""
    if not _LAST or _LAST[0][0] != base.family:
        _LAST[:] = [(base.family, Traces())]
    return _LAST[0][1]


Group = tuple[Base, Sequence[Fault], bool]
# The same by names: what a fault is made by does not go from one process to another.
Named = tuple[str, list[str], bool]


def run_all(groups: Sequence[Group], processes: int) -> list[Outcome]:
    """Every group; those of one family in one process, since they have traces in common."""
    if processes == 1:
        return [outcome for group in groups for outcome in run_group(*group)]
    # A thread for each process, and no more processes than cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    by_family: dict[str, list[Named]] = {}
    for base, faults, right in groups:
        named = base.name, [fault.title for fault in faults], right
        by_family.setdefault(base.family, []).append(named)
    largest_first = sorted(by_family.values(), key=_size, reverse=True)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = [pool.submit(_run_named, family) for family in largest_first]
        return [outcome for future in futures for outcome in future.result()]


def _size(groups: Sequence[Named]) -> int:
    return sum(len(titles) + right for _, titles, right in groups)


def _run_named(groups: Sequence[Named]) -> list[Outcome]:
    from proof.faults import FAULTS
    from proof.rights import RIGHTS

    known_bases, faults = {**BASES, **RIGHTS}, {fault.title: fault for fault in FAULTS}
    return [
        outcome
        for name, titles, right in groups
        for outcome in run_group(known_bases[name], [faults[title] for title in titles], right)
    ]
