"""The same calls again: equal to the bit in a session, within the floor with other threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ingot.validate.counting import Recorder
from ingot.validate.judge.judge import Judge, is_no_tap
from ingot.validate.judge.limits import ROUNDOFF
from ingot.validate.judge.metrics import Array, relative_error
from ingot.validate.result import TensorResult
from ingot.validate.truth.recording import Call, main_run, observe
from ingot.validate.truth.taps import TappedSession

# Two threads that race for one result seldom do it at the first try.
TIMES = 5
OVERWRITTEN = "what a call handed out is other numbers after later calls, which write over it"
# Calls of the main run that are made again: the prefill and a decode step.
CALLS = 2


def repeated_calls(judge: Judge) -> int:
    """How many calls ``judge_repeats`` makes."""
    # Once more of other tokens.
    return (TIMES + 1) * len(main_run(judge.material.runs[0].inputs)[:CALLS])


def judge_repeats(judge: Judge, session: Recorder) -> None:
    """Make the main run's first calls several times; all must give the same bits.

    A difference is a race between threads, or memory that was never written. What the first of them
    handed out must still be the same in the end, also after calls of other tokens.

    Args:
        judge: takes the results.
        session: of the target, whose number of threads stays as it is.
    """
    run = judge.material.runs[0]
    calls = main_run(run.inputs)[:CALLS]
    first: list[Mapping[str, Array]] = []
    differ: list[dict[str, float]] = [{} for _ in calls]
    handed: list[tuple[Array, bytes]] = []
    session.purpose = "repeat"
    for turn in range(TIMES):
        for number, call in enumerate(calls):
            found = observe(session, judge.layout, run.inputs, call)
            found = {name: array for name, array in found.items() if is_no_tap(name)}
            session.calls[-1].free = int(run.inputs.wanted[:, call.columns].sum())
            if turn == 0:
                first.append(found)
                handed.append((session.handed, session.handed.tobytes()))
            for name, array in found.items():
                error = _difference(first[number].get(name), array)
                differ[number][name] = max(differ[number].get(name, 0.0), error)
    # Equal calls write equal numbers, wherever they do.
    others = replace(run.inputs, input_ids=np.roll(run.inputs.input_ids, 1, axis=1))
    for call in calls:
        observe(session, judge.layout, others, call)
    session.purpose = "compare"
    precision, main = judge.references[0].precision, judge.layout.main_output
    for call, errors, (array, before) in zip(calls, differ, handed, strict=True):
        overwritten = array.tobytes() != before
        judge.add(
            TensorResult(
                f"{call.stage}, {TIMES} times",
                name,
                judge.layout.kind(name),
                None,
                error,
                ROUNDOFF[precision],
                None,
                0.0,
                _race(error) if error else OVERWRITTEN * (overwritten and name == main),
            )
            for name, error in errors.items()
        )


def _race(error: float) -> str:
    return (
        f"{TIMES} equal calls gave different numbers, up to {error:.1e} apart; threads race for a "
        "result, or memory is read that was never written"
    )


def _difference(first: Array | None, found: Array) -> float:
    """0 for equal bits, else how far apart the two are."""
    if first is not None and first.dtype == found.dtype and first.shape == found.shape:
        if first.tobytes() == found.tobytes():
            return 0.0
        return relative_error(first, found, first) or float(np.finfo(np.float64).tiny)
    return float("inf")


def other_threads() -> int:
    """Another number of threads than a session takes by itself."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return 1 if cores > 1 else 2


def threads_calls(judge: Judge) -> list[Call]:
    """The calls that ``judge_threads`` makes."""
    return main_run(judge.material.runs[0].inputs)[: CALLS + 1]


def judge_threads(judge: Judge, session: Recorder, threads: int) -> None:
    """Make the main run's first calls in a session with another number of threads.

    Args:
        judge: takes the results.
        session: with that many threads. Where the model has routers it is of the graph with taps,
            and is given the truth's experts: rounding may turn other choices than it did before.
        threads: how many, named in the results.
    """
    run = judge.material.runs[0]
    tapped = session.session if isinstance(session.session, TappedSession) else None
    word = "1 thread" if threads == 1 else f"{threads} threads"
    session.purpose = "threads"
    for number, call in enumerate(threads_calls(judge)):
        if tapped is not None:
            judge.force(tapped, run, number)
        found = observe(session, judge.layout, run.inputs, call)
        found = {name: array for name, array in found.items() if is_no_tap(name)}
        results, tokens = judge.compare_call(run, f"{call.stage}, {word}", number, found)
        judge.add(results)
        session.calls[-1].free += tokens if tapped is None else 0
        session.calls[-1].replayed += 0 if tapped is None else tokens
    session.purpose = "compare"
