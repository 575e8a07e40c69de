"""The logits of the last tokens alone: the last of all, and the states that they leave."""

from __future__ import annotations

from collections.abc import Mapping

from ingot.plugins.errors import IngotError
from ingot.validate.counting import Recorder
from ingot.validate.judge.compare import layer_of
from ingot.validate.judge.judge import Judge
from ingot.validate.judge.limits import LIMITS
from ingot.validate.judge.metrics import Array, relative_error
from ingot.validate.result import TensorResult
from ingot.validate.truth.recording import fed, main_run
from ingot.validate.truth.runs import Run

# Of how many of the last tokens the logits are asked for.
COUNTS = (1, 3)
# How the stages of such calls end.
ALONE = " alone"


def kept_calls(judge: Judge) -> int:
    """How many calls ``judge_kept`` makes."""
    return sum(number + 1 for _, number in _asked(judge)) * (1 + len(COUNTS))


def judge_kept(judge: Judge, session: Recorder) -> None:
    """Ask for the last logits of a prompt of several rows, and of a piece after others.

    They are held against the last of all, which the same session gives. The head multiplies fewer
    rows, for which there may be another kernel; so they need not have the same bits, and may differ
    as far as other logits may from the truth. What is asked for changes nothing else of a call, so
    the states are equal to the bit.

    Args:
        judge: takes the results.
        session: of the target.
    """
    session.purpose = "kept"
    for run, number in _asked(judge):
        whole = _called(judge, session, run, number, 0)
        for count in COUNTS:
            call = main_run(run.inputs)[number]
            stage = f"{call.stage}, the last {count}{ALONE}"
            real = fed(run.inputs, call)[1][:, -count:] != 0
            try:
                found = _called(judge, session, run, number, count)
            except IngotError as error:
                problem = f"the session refuses: {' '.join(str(error).split())}".rstrip(".")
                judge.add([_result(judge, run, stage, judge.layout.main_output, None, problem)])
                continue
            session.calls[-1].free = int(real.sum())
            judge.add(_compared(judge, run, stage, whole, found, real))
    session.purpose = "compare"


def _asked(judge: Judge) -> list[tuple[Run, int]]:
    """The runs, and the number of the call in each: a prompt's, and one after a past."""
    main, *others = judge.material.runs
    later = [
        # Several rows may be fed token by token, of which each has its logits.
        (len(run.rows) > 1, call.columns.stop, (run, number))
        for run in others
        for number, call in enumerate(main_run(run.inputs))
        if number and call.columns.stop - call.columns.start > max(COUNTS)
    ]
    cheapest = min(later, key=lambda each: each[:2], default=None)
    return [(main, 0)] if cheapest is None else [(main, 0), cheapest[2]]


def _called(
    judge: Judge, session: Recorder, run: Run, last: int, count: int
) -> Mapping[str, Array]:
    """The main output and the states of one call, after those before it."""
    for number, call in enumerate(main_run(run.inputs)[: last + 1]):
        ids, mask = fed(run.inputs, call)
        if not number:
            session.reset(len(ids), run.inputs.capacity)
        main = session.step(ids, mask, count)
    return {judge.layout.main_output: main, **session.state()}


def _compared(
    judge: Judge,
    run: Run,
    stage: str,
    whole: Mapping[str, Array],
    found: Mapping[str, Array],
    real: Array,
) -> list[TensorResult]:
    main, count = judge.layout.main_output, real.shape[1]
    expected, logits = whole[main][:, -count:], found[main]
    if logits.shape != expected.shape:
        problem = f"shape {list(logits.shape)}, expected {list(expected.shape)}"
        return [_result(judge, run, stage, main, None, problem)]
    error = relative_error(expected[real], logits[real], expected[real])
    score, limit = (
        error / judge.floor(run, main),
        LIMITS["logits"].of(judge.references[0].precision),
    )
    problem = ""
    if score > limit:
        problem = (
            f"the last logits alone are others than the last of all, by {error:.1e}, {score:.3g} "
            f"times what eager PyTorch errs by; up to {limit:g} times are accepted"
        )
    results = [_result(judge, run, stage, main, error, problem)]
    for name in whole.keys() - {main}:
        if whole[name].tobytes() != found[name].tobytes():
            other = relative_error(whole[name], found[name], whole[name])
            problem = "it is another state where the last logits alone are asked for"
            results.append(_result(judge, run, stage, name, other, problem))
    return results


def _result(
    judge: Judge, run: Run, stage: str, name: str, error: float | None, problem: str
) -> TensorResult:
    kind = judge.layout.kind(name)
    limit = LIMITS[kind].of(judge.references[0].precision)
    floor = judge.floor(run, name)
    return TensorResult(stage, name, kind, layer_of(name), error, floor, None, limit, problem)
