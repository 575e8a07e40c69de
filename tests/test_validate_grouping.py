"""Problems alike become one line that says at how many calls, and which is the worst."""

from __future__ import annotations

import math
from dataclasses import replace

from test_validate_report import make_report, with_tensor

from ingot.validate.report.grouping import grouped
from ingot.validate.result import Check, Flip, Report, Routing


def failing(name: str, text: str) -> Report:
    """A report in which one tensor fails at every decode step, worst at the fifth."""
    tensors = []
    for tensor in make_report().tensors:
        if tensor.name == name and tensor.stage.startswith("decode"):
            step = int(tensor.stage.split()[1])
            error = (tensor.floor or 0) * (1000 if step == 5 else 10 + step)
            tensor = replace(tensor, error=error, problem=text.format(error / (tensor.floor or 1)))
        tensors.append(tensor)
    return make_report(tensors=tuple(tensors))


def lines(report: Report) -> list[str]:
    return [group.text for group in grouped(report, report.failures)]


def test_one_tensor_at_many_calls_is_one_line() -> None:
    found = failing("logits", "the error is {:.3g} times eager's")
    assert len(found.failures) == 8
    assert lines(found) == [
        "logits at 8 of 9 calls, worst at decode 5: the error is 1e+03 times eager's"
    ]
    assert [group.count for group in grouped(found, found.failures)] == [8]


def test_several_tensors_of_one_kind_are_one_line_that_names_some() -> None:
    found = make_report()
    bad = (
        replace(t, problem="score 9", error=9 * (t.floor or 0)) if t.kind == "key" else t
        for t in found.tensors
    )
    assert lines(replace(found, tensors=tuple(bad))) == [
        "key (present.0.key, present.1.key, and 1 more) at 9 of 9 calls, "
        "worst present.0.key at prefill: score 9"
    ]


def test_other_causes_and_kinds_are_other_lines() -> None:
    found = failing("logits", "the error is {:.3g} times eager's")
    found = with_tensor(found, 0, problem="2 of 24 likeliest tokens differ")
    found = with_tensor(found, 1, problem="the error is 3 times eager's")
    assert lines(found) == [
        "prefill, logits: 2 of 24 likeliest tokens differ",
        "prefill, present.0.key: the error is 3 times eager's",
        "logits at 8 of 9 calls, worst at decode 5: the error is 1e+03 times eager's",
    ]


def test_nan_is_the_worst_and_what_was_not_compared_the_least() -> None:
    found = failing("logits", "the target holds NaN or infinity")
    found = with_tensor(found, 14, error=math.nan)
    assert (found.tensors[14].stage, found.tensors[14].name) == ("decode 2", "logits")
    assert lines(found) == [
        "logits at 8 of 9 calls, worst at decode 2: the target holds NaN or infinity"
    ]
    found = with_tensor(found, 14, error=None, floor=None)
    assert "worst at decode 5" in lines(found)[0]


def test_flips_are_one_line_a_mode() -> None:
    flips = tuple(Flip(n % 2, 0, n, (1, 3), (1, 6), 0.3, 1e-6) for n in range(5))
    found = make_report(routing={"free": Routing((0.5, 0.5), flips, ("layer 0", "layer 4"))})
    assert lines(found) == [
        "routing (free): 5 tokens at 2 routers, the first at layer 0: token 0 of row 0 chose "
        "[1, 6] over [1, 3] at a margin of 0.3, and rounding explains 1e-06"
    ]


def test_problems_of_a_check_that_differ_in_numbers_are_one_line() -> None:
    problems = tuple(f"layers.{n}.weight differs in {7 * n + 1} elements" for n in range(3))
    found = make_report(checks=(Check("weights", 29, (*problems, "no lm_head")),))
    assert lines(found) == [
        "weights: layers.0.weight differs in 1 elements (and 2 more like it)",
        "weights: no lm_head",
    ]


def test_what_got_worse_is_grouped_as_well() -> None:
    found = make_report()
    worse = [f"decode {n}, logits: score {n + 0.5}, was {n} (it explains 0.1%)" for n in (1, 2, 3)]
    (group,) = grouped(found, [*worse])
    best = max(found.tensors[7 * n].score or 0 for n in (1, 2, 3))
    (worst,) = [t for t in found.tensors if t.score == best and t.name == "logits"]
    assert group.text.startswith(f"logits at 3 of 9 calls, worst at {worst.stage}: score ")
    (alone,) = grouped(found, ["coverage: 44 calls, was 45"])
    assert (alone.text, alone.count) == ("coverage: 44 calls, was 45", 1)


def test_no_problem_is_no_line() -> None:
    assert grouped(make_report(), []) == []
