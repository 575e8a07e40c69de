"""The same calls again: equal to the bit in a session, within the floor with other threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from ingot.plugins.errors import IngotError
from ingot.runtime.session import Session
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
FORKED = "a fork of the session that is at work between two calls changes what the second gives"
# How the stages of such calls end, and those of the others.
BESIDE_FORK = ", beside a fork"
AGAIN = (" times", " thread", " threads")
# Calls of the main run that are made again: the prefill and a decode step.
CALLS = 2


@runtime_checkable
class Forking(Protocol):
    """What has ``runtime.session.Session.fork``."""

    def fork(self) -> Session: ...


def repeated_calls(judge: Judge) -> int:
    """How many calls ``judge_repeats`` makes of the session that it is given."""
    # Once more of other tokens, and once beside a fork.
    return (TIMES + 2) * len(_calls(judge))


def judge_repeats(judge: Judge, session: Recorder) -> None:
    """Make the main run's first calls several times; all must give the same bits.

    A difference is a race between threads, or memory that was never written. What the first of them
    handed out must still be the same in the end, also after calls of other tokens. And where
    sessions fork, a fork that is at work between the calls must change nothing.

    Args:
        judge: takes the results.
        session: of the target, whose number of threads stays as it is.
    """
    run, calls = judge.material.runs[0], _calls(judge)
    first: list[Mapping[str, Array]] = []
    differ: list[dict[str, float]] = [{} for _ in calls]
    handed: list[tuple[Array, bytes]] = []
    session.purpose = "repeat"
    for turn in range(TIMES):
        for number, call in enumerate(calls):
            found = _observed(judge, session, call)
            session.calls[-1].free = int(run.inputs.wanted[:, call.columns].sum())
            if turn == 0:
                first.append(found)
                handed.append((session.handed, session.handed.tobytes()))
            _note(differ[number], first[number], found)
    others = replace(run.inputs, input_ids=np.roll(run.inputs.input_ids, 1, axis=1))
    # Equal calls write equal numbers, wherever they do.
    for call in calls:
        observe(session, judge.layout, others, call)
    overwritten = [array.tobytes() != before for array, before in handed]
    beside: list[dict[str, float]] = [{} for _ in calls]
    if isinstance(session.session, Forking):
        fork = session.session.fork()
        for number, call in enumerate(calls):
            try:
                found = _observed(judge, session, call)
            except IngotError:
                # Of the fork's tokens it takes no more than a fork would.
                beside[number][judge.layout.main_output] = float("inf")
                break
            _note(beside[number], first[number], found)
            # Of another batch and length, so that nothing of it is alike.
            fork.reset(1, run.inputs.capacity)
            fork.step(others.input_ids[:1, :2], np.ones((1, 2), np.int64))
    session.purpose = "compare"
    main = judge.layout.main_output
    for number, call in enumerate(calls):
        for name, error in differ[number].items():
            problem = (
                _race(error) if error else OVERWRITTEN * (overwritten[number] * (name == main))
            )
            judge.add([_result(judge, f"{call.stage}, {TIMES} times", name, error, problem)])
        for name, error in beside[number].items():
            problem = FORKED * bool(error)
            judge.add([_result(judge, f"{call.stage}{BESIDE_FORK}", name, error, problem)])


def _calls(judge: Judge) -> list[Call]:
    return main_run(judge.material.runs[0].inputs)[:CALLS]


def _observed(judge: Judge, session: Recorder, call: Call) -> Mapping[str, Array]:
    """What a session gives in one call of the main run, without what is inside of a graph."""
    found = observe(session, judge.layout, judge.material.runs[0].inputs, call)
    return {name: array for name, array in found.items() if is_no_tap(name)}


def _note(errors: dict[str, float], first: Mapping[str, Array], found: Mapping[str, Array]) -> None:
    """Keep the largest difference of each tensor."""
    for name, array in found.items():
        errors[name] = max(errors.get(name, 0.0), _difference(first.get(name), array))


def _result(judge: Judge, stage: str, name: str, error: float, problem: str) -> TensorResult:
    """Of calls that have to give equal bits."""
    floor = ROUNDOFF[judge.references[0].precision]
    kind = judge.layout.kind(name)
    return TensorResult(stage, name, kind, None, error, floor, None, 0.0, problem)


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
