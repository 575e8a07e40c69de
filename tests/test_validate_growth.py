"""Error growth over decode, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from ingot.validate.judge.growth import GROWTH_LIMIT, growth
from ingot.validate.result import Growth, TensorResult


def tensor(
    stage: str,
    score: float | None,
    kind: str = "logits",
    name: str = "logits",
    floor: float = 1e-7,
) -> TensorResult:
    error = None if score is None else score * floor
    return TensorResult(stage, name, kind, None, error, floor, 1.0, 8.0)


def decode(scores: Sequence[float | None], kind: str = "logits") -> list[TensorResult]:
    return [tensor(f"decode {at + 1}", score, kind) for at, score in enumerate(scores)]


def only(tensors: Sequence[TensorResult]) -> Growth:
    (found,) = growth(tensors)
    return found


@pytest.mark.parametrize("score", [1e-9, 0.0, 0.5, 3.0, 1e200])
@pytest.mark.parametrize("steps", [8, 9, 32, 128])
def test_constant_scores_do_not_grow(score: float, steps: int) -> None:
    found = only(decode([score] * steps))
    assert found.ratio == pytest.approx(1)
    assert found.problem == ""


def test_scores_that_double_fail() -> None:
    found = only(decode([2.0**step for step in range(8)]))
    # sqrt(1 * 2) and sqrt(64 * 128).
    assert found.first == pytest.approx(math.sqrt(2))
    assert found.last == pytest.approx(math.sqrt(8192))
    assert found.ratio == pytest.approx(64)
    assert found.problem == (
        "the error of logits grows over decode from 1.41 to 90.5 times eager PyTorch's, 64-fold; "
        "up to 4-fold is accepted"
    )


def test_growth_that_eager_has_is_none() -> None:
    steps = [tensor(f"decode {n}", 2.0, floor=1e-7 * 2.0**n) for n in range(1, 33)]
    assert steps[-1].error == pytest.approx(2e-7 * 2.0**32)
    found = only(steps)
    assert (found.first, found.last) == pytest.approx((2, 2))
    assert found.problem == ""


def test_quarters_and_their_means() -> None:
    """11 steps: quarters of 2; what lies between has no part."""
    found = only(decode([1.0, 4.0, 500, 500, 500, 500, 500, 500, 500, 2.0, 8.0]))
    assert (found.first, found.last) == pytest.approx((2, 4))
    assert (found.kind, found.limit) == ("logits", GROWTH_LIMIT)


def test_one_step_is_the_rms_over_its_tensors() -> None:
    tensors = []
    for step in range(1, 9):
        # sqrt((1 + 49) / 2) = 5, and 10 in the last quarter.
        factor = 2.0 if step > 6 else 1.0
        tensors.append(tensor(f"decode {step}", 1.0 * factor, "key", "present.0.key"))
        tensors.append(tensor(f"decode {step}", 7.0 * factor, "key", "present.1.key"))
    found = only(tensors)
    assert (found.first, found.last) == pytest.approx((5, 10))


def test_steps_are_in_the_order_of_their_numbers() -> None:
    tensors = decode([1.0] * 6 + [2.0] * 6)
    assert only(tensors[::-1]).ratio == pytest.approx(2)
    assert only(sorted(tensors, key=lambda t: t.stage)).ratio == pytest.approx(2)


def test_kinds_are_apart_and_in_the_order_they_came() -> None:
    tensors = [*decode([3.0] * 8, "value"), *decode([2.0**n for n in range(8)], "key")]
    tensors += decode([1.0] * 7, "ssm")
    found = growth(tensors)
    assert [(one.kind, bool(one.problem)) for one in found] == [("value", False), ("key", True)]
    assert "of key" in found[1].problem


@pytest.mark.parametrize(
    "stage",
    [
        "prefill",
        "split 16+3",
        "row 0 alone",
        "decode",
        "decode x",
        "decode 9 alone",
        "re decode 9",
        "decode  9",
        "decode -9",
        "decode 9\n",
        "Decode 9",
        "decode 9.5",
        "decode ٩",
    ],
)
def test_other_stages_have_no_part(stage: str) -> None:
    tensors = decode([1.0] * 8)
    assert growth([*tensors, tensor(stage, 1e9)]) == growth(tensors)
    assert growth([*tensors[:7], tensor(stage, 1.0)]) == []


def test_fewer_than_eight_steps_say_nothing() -> None:
    assert growth([]) == []
    assert growth(decode([2.0**n for n in range(7)])) == []
    # Two tensors of one step are one step.
    assert growth(decode([1.0] * 7) + decode([1.0] * 7)) == []
    assert len(growth(decode([1.0] * 8))) == 1


def test_a_tensor_without_a_score_has_no_part() -> None:
    assert growth(decode([None] * 8)) == []
    assert growth(decode([1.0] * 7 + [None])) == []
    found = only(decode([1.0] * 4 + [None] + [2.0] * 4))
    assert found.ratio == pytest.approx(2)


@pytest.mark.parametrize("at", [0, 4, 7])
@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_a_problem_wherever_it_is(score: float, at: int) -> None:
    scores = [1.0] * 8
    scores[at] = score
    found = only(decode(scores))
    assert not math.isfinite(found.ratio)
    assert math.isfinite(found.first) == (at > 0)
    assert math.isnan(found.last) if math.isnan(score) else math.isinf(found.last)
    assert found.problem == "the error of logits over decode is not a number at every step"


def test_a_nan_beside_an_infinity_is_a_nan() -> None:
    tensors = decode([1.0] * 8)
    for score in (math.inf, math.nan):
        tensors.append(tensor("decode 5", score, name="other"))
    assert math.isnan(only(tensors).last)


def test_an_error_without_a_floor_is_a_problem() -> None:
    tensors = decode([1.0] * 7)
    tensors.append(TensorResult("decode 8", "logits", "logits", None, 1e-9, 0.0, 1.0, 8.0))
    assert only(tensors).problem != ""


@pytest.mark.parametrize(
    ("first", "last", "ratio", "fails"),
    [
        (0.0, 0.0, 1.0, False),
        (0.0, 0.05, 1.0, False),
        # Twenty-fold, and still as good as eager.
        (0.0, 1.0, 20.0, False),
        (0.1, 0.9, 9.0, False),
        (0.0, 1.1, 22.0, True),
        (0.2, 1.1, 5.5, True),
        (1.0, 4.0, 4.0, False),
        (1.0, 4.1, 4.1, True),
        (1.0, 0.0, 0.05, False),
        (8.0, 1.0, 0.125, False),
    ],
)
def test_small_scores(first: float, last: float, ratio: float, fails: bool) -> None:
    found = only(decode([first] * 4 + [last] * 4))
    assert found.ratio == pytest.approx(ratio)
    assert bool(found.problem) == fails


def test_one_exact_step_does_not_rule_a_quarter() -> None:
    """Of 8 steps at 2 floors one that is exact by luck: its mean falls by 1.6, and not to zero."""
    found = only(decode([0.0] + [2.0] * 31))
    assert found.ratio == pytest.approx((2 / 0.05) ** (1 / 8))
    assert found.problem == ""


def test_an_error_that_leans_to_one_side_is_within_the_limit() -> None:
    """n against sqrt(n), which the limit's reason promises to accept; n squared it does not."""
    assert only(decode([math.sqrt(n) for n in range(1, 33)])).problem == ""
    assert only(decode([n**1.5 for n in range(1, 33)])).problem != ""
