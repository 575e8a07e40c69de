"""The one comparator, fed everything it must fail on and the little it may let pass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ingot.validate.judge.compare import compare, layer_of
from ingot.validate.judge.limits import LIMITS, NORM_LIMIT, TIE_LIMIT
from ingot.validate.judge.metrics import rms
from ingot.validate.result import TensorResult

Floats = npt.NDArray[np.floating]
KINDS = {"logits": "logits", "hidden": "hidden", "key": "key", "value": "value"}
# What eager PyTorch's own error is made to be here.
FLOOR = 1e-6


def _random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _one(expected: Floats, actual: Floats, name: str = "key") -> TensorResult:
    """The comparison of one tensor, which must be the only one unless nothing was compared."""
    noise = FLOOR * _random(*expected.shape, seed=9)
    truth = expected.astype(np.float64) + (noise if np.isfinite(expected).all() else 0)
    if expected.size and expected.min() == expected.max():
        truth = expected.astype(np.float64)
    results = compare("prefill", {name: truth}, {name: expected}, {name: actual}, KINDS)
    first, rest = results[0], results[1:]
    assert (first.stage, first.name) == ("prefill", name)
    assert [other.name for other in rest] == ([] if first.error is not None else ["all outputs"])
    assert all(other.problem for other in rest)
    return first


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_passes_on_equal_tensors(kind: str) -> None:
    found = _one(_random(5, 64), _random(5, 64), kind)
    assert found.problem == ""
    assert found.score == pytest.approx(1, rel=1e-6)
    assert found.floor == pytest.approx(FLOOR, rel=0.2)
    assert found.top1 == (1.0 if kind == "logits" else None)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_passes_on_rounding_noise(kind: str) -> None:
    expected = _random(5, 64)
    found = _one(expected, expected + np.float32(3e-6) * _random(5, 64, seed=1), kind)
    assert found.problem == ""
    assert found.score is not None and 2 < found.score < 4
    noisy = _one(expected, expected + np.float32(2e-5) * _random(5, 64, seed=1), kind)
    assert "times what eager PyTorch makes in float32; up to 8 times" in noisy.problem


def test_fails_on_a_missing_output() -> None:
    both = {"key": _random(4), "value": _random(4)}
    results = compare("decode 3", both, both, {"value": both["value"]}, KINDS)
    assert [(r.name, bool(r.problem)) for r in results] == [("key", True), ("value", False)]
    assert "target has no such output" in results[0].problem
    assert results[0].stage == "decode 3"


def test_fails_on_an_extra_output() -> None:
    both = {"key": _random(4), "value": _random(4)}
    results = compare("prefill", {"value": both["value"]}, both, both, KINDS)
    assert [(r.name, bool(r.problem)) for r in results] == [("value", False), ("key", True)]
    assert "reference has no such output" in results[1].problem


def test_fails_on_another_shape_of_the_same_size() -> None:
    expected = _random(4, 6)
    assert "[6, 4], expected [4, 6]" in _one(expected, expected.reshape(6, 4)).problem
    # A shape that would broadcast is another shape all the same.
    assert "[1, 6], expected [4, 6]" in _one(expected, expected[:1]).problem


def test_fails_on_another_dtype() -> None:
    expected = _random(4, 6)
    assert "float64, expected float32" in _one(expected, expected.astype(np.float64)).problem
    assert "float16, expected float32" in _one(expected, expected.astype(np.float16)).problem


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fails_on_nan_and_infinity_on_either_side(bad: float) -> None:
    good = _random(4, 6)
    damaged = good.copy()
    damaged[2, 3] = bad
    assert "target holds NaN or infinity" in _one(good, damaged).problem
    assert "reference holds NaN or infinity" in _one(damaged, good).problem
    # The same NaN on both sides proves nothing either.
    assert "NaN or infinity" in _one(damaged, damaged).problem


@pytest.mark.parametrize(
    ("precision", "sides", "said"),
    [
        ("float16", ("eager", "target"), "and so does the target: this model does not fit float16"),
        # Without a floor nothing is proven, also where the target is finite.
        ("float16", ("eager",), "this model does not fit float16; use --precision bf16"),
        ("float16", ("target",), "the target overflows float16, and eager PyTorch does not"),
        ("float32", ("eager", "target"), "there is nothing to compare with"),
        ("float32", ("target",), "the target holds NaN or infinity, and eager PyTorch does not"),
        ("float16", ("reference", "target"), "the reference holds NaN or infinity"),
    ],
)
def test_tells_an_overflow_and_whose_it_is(
    precision: str, sides: tuple[str, ...], said: str
) -> None:
    def side(name: str) -> Floats:
        array = _random(4, 6)
        if name in sides:
            array[1, 2] = np.inf
        return array

    truth, eager, target = map(side, ("reference", "eager", "target"))
    # A usual floor that an overflow of another call made infinite lets nothing pass.
    floors = {"key": np.inf}
    found, *_ = compare(
        "prefill", {"key": truth}, {"key": eager}, {"key": target}, KINDS, precision, floors
    )
    assert said in found.problem
    assert (found.not_finite, found.error) == (sides, None)
    wrong = compare(
        "prefill",
        {"key": _random(4, 6)},
        {"key": _random(4, 6)},
        {"key": _random(4, 6, seed=1)},
        KINDS,
        precision,
        floors,
    )
    assert "times what eager PyTorch makes" in wrong[0].problem


def test_fails_where_nothing_was_compared() -> None:
    (found,) = compare("prefill", {}, {}, {}, KINDS)
    assert (found.name, found.problem) == ("all outputs", "nothing was compared")


def test_fails_on_an_empty_tensor() -> None:
    assert "empty" in _one(_random(0, 6), _random(0, 6)).problem


@pytest.mark.parametrize("kind", ["router", *sorted(KINDS)])
def test_what_is_constant_has_to_agree(kind: str) -> None:
    """As of a router that has learned nothing, a projection of zeros, an embedding of zeros."""

    def problem(truth: Floats, target: Floats) -> str:
        kinds = {"x": kind}
        (found,) = compare("prefill", {"x": truth}, {"x": truth}, {"x": target}, kinds)
        return found.problem

    zeros, ones = np.zeros((2, 4), np.float32), np.ones((2, 4), np.float32)
    assert problem(zeros, zeros) == problem(zeros, -zeros) == problem(ones, ones) == ""
    assert problem(zeros, ones) and problem(ones, zeros) and problem(ones, ones * 1.001)
    assert problem(zeros, ones * np.float32(1e-30))
    assert problem(zeros, _random(2, 4)) and problem(_random(2, 4), zeros)
    assert problem(_random(2, 4), ones)


def test_compares_a_single_element() -> None:
    one = _random(1, 1)
    assert _one(one, one).problem == ""
    assert _one(one, 2 * one).problem


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("scale", [1.001, 0.999, 1.00005, -1.0])
def test_fails_on_a_wrong_scale(kind: str, scale: float) -> None:
    expected = _random(5, 64)
    assert _one(expected, expected * np.float32(scale), kind).problem


def test_names_the_norm_where_only_the_scale_is_off() -> None:
    # Below the limit on the error, so that the norm's own, narrower limit has to catch it.
    expected = _random(5, 64)
    found = _one(expected, expected * np.float32(1 + 6 * FLOOR))
    assert found.score is not None and NORM_LIMIT / 2 < found.score < LIMITS["key"].score
    assert "the norm is 1.000006 times the reference's" in found.problem


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_fails_on_one_element_far_off(kind: str) -> None:
    expected = _random(5, 64)
    actual = expected.copy()
    actual[3, 17] += 0.1
    assert "times what eager PyTorch makes" in _one(expected, actual, kind).problem


def test_fails_on_two_rows_swapped() -> None:
    # Every sum over the tensor stays the same; only the places differ.
    expected = _random(5, 64)
    assert _one(expected, expected[[1, 0, 2, 3, 4]]).problem


def test_accepts_another_top_token_within_a_tie_only() -> None:
    expected = _random(40000, 50)
    expected[0, 7] = expected[0].max() + 1
    tie = TIE_LIMIT * FLOOR * rms(expected)

    def swapped(by: float) -> tuple[Floats, Floats]:
        """A reference where token 7 leads token 8 by ``by``, and a target that turns the two."""
        before = expected.copy()
        before[0, 8] = before[0, 7] - np.float32(by)
        after = before.copy()
        after[0, 7], after[0, 8] = before[0, 8], before[0, 7]
        return before, after

    near = _one(*swapped(0.2 * tie), "logits")
    assert near.problem == "" and near.top1 == pytest.approx(39999 / 40000)
    far = _one(*swapped(5 * tie), "logits")
    # The RMS over all the logits does not see so few of them; the likeliest token does.
    assert far.score is not None and far.score < 2
    assert far.problem == "1 of 40000 likeliest tokens differ, and not by a tie"
    # A hidden state has no likeliest token.
    assert _one(*swapped(5 * tie), "hidden").problem == ""


def test_compares_every_name_even_after_a_failure() -> None:
    good = {name: _random(3, 8, seed=seed) for seed, name in enumerate(KINDS)}
    bad = {name: -array if name == "logits" else array for name, array in good.items()}
    results = compare("prefill", good, good, bad, KINDS)
    assert [(r.name, bool(r.problem)) for r in results] == [
        ("logits", True),
        ("hidden", False),
        ("key", False),
        ("value", False),
    ]


def test_has_a_reason_for_every_limit() -> None:
    for limit in LIMITS.values():
        assert 1 < limit.score <= 10
        assert len(limit.reason) > 20


@pytest.mark.parametrize(
    ("name", "layer"),
    [("present.12.key", 12), ("present_states.0.ssm", 0), ("logits", None), ("v.2", None)],
)
def test_knows_the_layer_of_a_state(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer
