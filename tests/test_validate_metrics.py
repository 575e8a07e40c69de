"""The error figures, against numbers worked out by hand and by plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ingot.validate.judge.metrics import errors, relative_error, rms, top1_disagreements


def test_gives_the_figures_worked_out_by_hand() -> None:
    expected = np.array([3.0, 4.0, 0.0, 0.0], dtype=np.float32)
    actual = np.array([3.0, 4.5, 0.0, -1.0], dtype=np.float32)
    found = errors(expected, actual)
    # RMS of the reference: sqrt(25 / 4); of the difference: sqrt((0.25 + 1) / 4).
    assert found.relative_rms == pytest.approx(math.sqrt(1.25 / 4) / 2.5, rel=1e-12)
    assert found.norm_ratio == pytest.approx(math.sqrt((9 + 20.25 + 1) / 4) / 2.5, rel=1e-12)


def test_gives_the_figures_of_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    expected = random.normal(size=(3, 5, 7)).astype(np.float32)
    actual = (expected + 0.01 * random.normal(size=expected.shape)).astype(np.float32)
    pairs = [(float(a), float(b)) for a, b in zip(expected.flat, actual.flat, strict=True)]
    square = sum(a * a for a, _ in pairs)
    found = errors(expected, actual)
    wrong = math.sqrt(sum((b - a) ** 2 for a, b in pairs) / square)
    assert found.relative_rms == pytest.approx(wrong, rel=1e-12)
    ratio = math.sqrt(sum(b * b for _, b in pairs) / square)
    assert found.norm_ratio == pytest.approx(ratio, rel=1e-12)


def test_computes_in_float64() -> None:
    # In float32 the squares of these would be infinite, and the difference would round away.
    large = np.array([1e30, -2e30], dtype=np.float32)
    assert rms(large) == pytest.approx(math.sqrt(2.5) * 1e30, rel=1e-6)
    assert math.isfinite(errors(large, large * np.float32(1.5)).relative_rms)
    half = np.full(100_000, 0.1, dtype=np.float16)
    assert rms(half) == pytest.approx(float(half[0]), rel=1e-12)


def test_sees_a_wrong_scale_and_a_wrong_sign() -> None:
    expected = np.array([1.0, -2.0, 3.0], dtype=np.float32)
    scaled = errors(expected, expected * 2)
    assert (scaled.relative_rms, scaled.norm_ratio) == (1.0, 2.0)
    negated = errors(expected, -expected)
    assert (negated.relative_rms, negated.norm_ratio) == (2.0, 1.0)


def test_tells_ties_from_disagreements() -> None:
    expected = np.array(
        [
            [1.0, 5.0, 2.0],  # the same choice
            [4.0, 1.0, 3.999],  # another choice, closer than a tie
            [4.0, 1.0, 3.0],  # another choice, far from a tie
        ],
        dtype=np.float32,
    )
    actual = np.array([[0.0, 9.0, 1.0], [3.0, 1.0, 3.1], [3.0, 1.0, 3.1]], dtype=np.float32)
    assert top1_disagreements(expected, actual, tie=0.01) == (1 / 3, 1)
    assert top1_disagreements(expected, actual, tie=2.0) == (1 / 3, 0)
    assert top1_disagreements(expected, actual, tie=0.0) == (1 / 3, 2)
    assert top1_disagreements(expected, expected, tie=0.0) == (1.0, 0)


def test_leaves_elements_out_that_other_padding_moves() -> None:
    expected = np.array([3.0, 4.0, 7.0], dtype=np.float32)
    found = np.array([3.0, 4.5, -7.0], dtype=np.float32)
    other = np.array([3.0, 4.0, 9.0], dtype=np.float32)
    # Over the first two: RMS of the difference sqrt(0.25 / 2), of the reference sqrt(25 / 2).
    assert relative_error(expected, found, other) == pytest.approx(0.1, rel=1e-12)
    whole = math.sqrt((0.25 + 14**2) / (9 + 16 + 49))
    assert relative_error(expected, found, expected) == pytest.approx(whole, rel=1e-12)
    assert relative_error(expected, found, other[:2]) == 0.0


def test_takes_equal_infinities_and_nan_for_right() -> None:
    expected = np.array([1.0, np.inf, -np.inf, np.nan], dtype=np.float32)
    assert relative_error(expected, expected.copy(), expected) == 0.0
    for place, wrong in [(0, np.nan), (1, -np.inf), (2, 5.0), (3, 0.0)]:
        found = expected.copy()
        found[place] = wrong
        assert relative_error(expected, found, expected) == math.inf
        # One that belongs to padding is no error.
        other = expected.copy()
        other[place] = 9.0
        assert relative_error(expected, found, other) == 0.0


def test_compares_only_what_has_one_shape_and_dtype() -> None:
    ones = np.ones((2, 2), dtype=np.float32)
    assert relative_error(ones, ones.reshape(4), ones) == math.inf
    assert relative_error(ones, ones.astype(np.float16), ones) == math.inf
    zeros = np.zeros(3, dtype=np.int64)
    assert relative_error(zeros, zeros + 1, zeros) == math.inf
    assert relative_error(zeros[:0], zeros[:0], zeros[:0]) == 0.0
