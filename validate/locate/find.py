"""From a failed report to one place: which run to look at, and in what order.

A failure may show in one run only: in a piece of a prefill, a row alone, another seed. The cheapest
run that failed is run again, first the graph and then the session; where neither is wrong by
itself, what the checks say of the weights, the graph and the contract is the place; and where they
say nothing, what computes the graph is wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ingot.plugins.errors import IngotError
from ingot.runtime.onnxruntime_session import said
from ingot.runtime.session import Session
from ingot.validate.identity.checks import Subject
from ingot.validate.judge.again import AGAIN, BESIDE_FORK, TIMES
from ingot.validate.judge.judge import CACHES, REPLAYED
from ingot.validate.judge.kept import ALONE
from ingot.validate.locate.calls import Fed, one_by_one
from ingot.validate.locate.computed import first_computed_wrong
from ingot.validate.locate.locate import locate
from ingot.validate.locate.part import LocateError
from ingot.validate.locate.session import locate_session
from ingot.validate.result import KERNELS, ROUNDED, SESSION, Location, Report, TensorResult
from ingot.validate.truth.inputs import EXPERTS_FORCED
from ingot.validate.truth.recording import fed, main_run
from ingot.validate.truth.runs import Run as FedRun

# Elements of one tensor of attention scores, of one head; every value of a layer is computed twice.
MOST_SCORES = 1 << 24
NO_PLACE = (
    "the graph passes by itself on ONNX Runtime, with the values between its layers as outputs; "
    "what runs without them computes something else"
)


@dataclass(frozen=True)
class Run:
    """Calls from an empty state, as a validation makes them.

    Attributes:
        calls: each named as in the report.
        main: whether it is the prefill and decode of the first seed.
        name: what it is called in a location; empty of the main one.
        end: the stage of its caches after its last call.
        seed: of its token ids.
        number: of it among the runs of that seed.
        capacity: tokens that a session has room for in it; 0 for those of its calls.
    """

    calls: Sequence[Fed]
    main: bool = False
    name: str = ""
    end: str = CACHES
    seed: int = 0
    number: int = 0
    capacity: int = 0


class Again(Protocol):
    """What a validation fed and to what, to be run once more."""

    @property
    def is_eager(self) -> bool:
        """Whether it was held against eager PyTorch; another ingot may be the wrong one of two."""

    @property
    def layers(self) -> Mapping[str, int]:
        """See ``validate.truth.reference.Reference.layers``."""

    @property
    def count(self) -> int:
        """How many layers there are."""

    def runs(self) -> Sequence[Run]:
        """All that were fed; what is computed again is one of them."""

    def session(self) -> Session | None:
        """The ingot's, as it is delivered; None where it cannot run on this machine."""

    def inside(self, run: Run) -> Sequence[TensorResult]:
        """All calls of a run, with the values between the layers, under the truth's experts."""


def runs_of(
    fed_runs: Sequence[FedRun], name: str = "", *, seed: int = 0, first: bool = True
) -> list[Run]:
    """The runs that one set of token ids is fed in.

    Args:
        fed_runs: the main run first.
        name: with which the stages begin in the report.
        seed: of the ids.
        first: whether no other set came before.
    """
    return [
        Run(
            [Fed(f"{name}{call.stage}", *fed(run.inputs, call)) for call in main_run(run.inputs)],
            main=first and run is fed_runs[0],
            name="" if first and run is fed_runs[0] else f"{name}{run.name}",
            end=f"{name}{CACHES}" if run is fed_runs[0] else f"{name}{run.name}, {CACHES}",
            seed=seed,
            number=number,
            capacity=run.inputs.capacity,
        )
        for number, run in enumerate(fed_runs)
    ]


def located(report: Report, subject: Subject, again: Again) -> Report:
    """A failed report with its place; where that cannot be found, with the reason.

    Args:
        report: of the ingot.
        subject: the ingot, and a fresh capture of its graph.
        again: what was fed, and to what.
    """
    by_checks = next((c.location for c in report.checks if c.location is not None), None)
    try:
        found = _by_numbers(report, subject, again) or by_checks
        if found is None and again.is_eager and not any(check.problems for check in report.checks):
            found = _by_kernels(report, again)
            if found is None:
                return replace(report, unlocated=NO_PLACE)
    # A damaged graph may make ONNX Runtime, onnx or numpy raise anything, and that it cannot be
    # taken apart is no reason to lose what was found.
    except Exception as error:
        if by_checks is not None:
            return replace(report, location=by_checks)
        reason = " ".join(str(error).split()) if isinstance(error, IngotError) else said(error)
        return replace(report, unlocated=reason)
    return replace(report, location=found)


def _by_numbers(report: Report, subject: Subject, again: Again) -> Location | None:
    """Where the graph goes wrong, or else the session; None where neither does by itself."""
    if not any(tensor.problem for tensor in report.tensors) and not _others(report):
        return None
    run = failed_run(report, again.runs())
    found = locate(subject, one_by_one(run.calls, subject.manifest.by_token))
    if found is None:
        session = again.session()
        # Its words name the call.
        if session is None:
            return None
        return locate_session(session, subject.folder, run.calls, run.capacity)
    if found.overflow is not None:
        found = replace(found, detail=eager_overflows(report))
    return replace(found, run=run.name)


def _by_kernels(report: Report, again: Again) -> Location | None:
    """Which layer is computed wrongly: in the run that failed, or else wherever it was seen."""
    # First what is sharper than half precision, where a fault shows a layer or more behind it.
    wide = [result for result in report.tensors if result.in_float32]
    found = first_computed_wrong(wide, (), again.layers, again.count)
    if found is not None:
        return found
    run = failed_run(report, again.runs())
    found = first_computed_wrong(again.inside(run), (), again.layers, again.count)
    if found is not None:
        return replace(found, run=run.name)
    wrong = [each for each in report.tensors if each.problem]
    alone = [each for each in wrong if each.stage.removesuffix(ROUNDED).endswith(ALONE)]
    if alone and len(alone) == len(wrong):
        value, ratio = f"{alone[0].name} at {alone[0].stage}", alone[0].score
        return Location(None, KERNELS, value, math.inf if ratio is None else ratio)
    beside = [each for each in wrong if each.stage.endswith(BESIDE_FORK)]
    if beside and not any(each.stage.endswith(f" {TIMES} times") for each in wrong):
        value = f"{beside[0].name} at {beside[0].stage}"
        return Location(None, SESSION, value, math.inf, detail="which a fork of it changes")
    forced = [
        result
        for result in report.tensors
        if EXPERTS_FORCED in result.stage
        or result.stage.removesuffix(ROUNDED).endswith((f", {REPLAYED}", *AGAIN))
    ]
    return first_computed_wrong(forced, report.routing.values(), again.layers, again.count)


def _others(report: Report) -> bool:
    """Whether something failed that is no tensor of one call: a choice of experts, or growth."""
    flips = (flip for routing in report.routing.values() for flip in routing.flips)
    return any(flip.fails for flip in flips) or any(growth.problem for growth in report.growth)


def failed_run(report: Report, runs: Sequence[Run]) -> Run:
    """The cheapest run that failed, up to the first call that did.

    That of the main run's prefill stands for all. Where the failure is of no run, it may be of any
    call of the first one.

    Raises:
        LocateError: its calls are too long.
    """
    failed = _failed_stages(report, runs)
    found = []
    for run in runs:
        number = next((n for n, call in enumerate(run.calls) if call.stage in failed), None)
        if number is not None:
            found.append(replace(run, calls=run.calls[: number + 1]))
        elif run.end in failed:
            found.append(run)
    found = found or list(runs[:1])
    if any(run.main for run in found):
        found = [replace(run, name="") for run in found]
    first = found[0]
    best = first if first.main and len(first.calls) == 1 else min(found, key=_scores)
    if _scores(best) > MOST_SCORES:
        raise LocateError("what failed is too long to be run again with all that is inside of it")
    return best


def _failed_stages(report: Report, runs: Sequence[Run]) -> set[str]:
    """The calls and ends of runs that failed.

    What was done with one beside, such as a replay, is a word behind it.
    """
    stages = {stage for run in runs for stage in (run.end, *(call.stage for call in run.calls))}
    result: set[str] = set()
    for failed in {tensor.stage for tensor in report.tensors if tensor.problem}:
        words = failed.split(", ")
        begins = (", ".join(words[:count]) for count in range(len(words), 0, -1))
        result.update(itertools.islice((begin for begin in begins if begin in stages), 1))
    return result


def _scores(run: Run) -> int:
    """Products of queries and keys in all of its calls, as a measure of what it costs."""
    total, seen = 0, 0
    for _, ids, _ in run.calls:
        seen += ids.shape[1]
        total += ids.size * seen
    return total


def eager_overflows(report: Report) -> str:
    """What eager PyTorch does in the precision of an ingot that overflows, and what helps."""
    if any("eager" in tensor.not_finite for tensor in report.tensors):
        return f"eager PyTorch in {report.precision} overflows too: use --precision bf16"
    return f"eager PyTorch in {report.precision} does not overflow"
