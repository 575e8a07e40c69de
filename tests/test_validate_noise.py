"""The squared errors of several runs: the floor of any tokens follows from them."""

from __future__ import annotations

import numpy as np

from ingot.validate.judge.compare import compare
from ingot.validate.judge.metrics import errors
from ingot.validate.truth.noise import Array, noise_of, relative_errors, squared_errors, together

RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.standard_normal((12, 3, 8))
RUNS = [TRUTH + scale * RANDOM.standard_normal(TRUTH.shape) for scale in (1e-7, 3e-7, 2e-7)]


def test_gives_the_error_of_any_tokens_of_each_run() -> None:
    noise = together([{"x": squared_errors(TRUTH, run)} for run in RUNS])["x"]
    assert noise.shape == (12, 3)
    for tokens in (slice(None), slice(2, 5), [7]):
        expected = [errors(TRUTH[tokens], run[tokens]).relative_rms for run in RUNS]
        found = relative_errors(noise[tokens], TRUTH[tokens])
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_of_one_run_it_is_the_error_of_that_run() -> None:
    ((call,),) = [noise_of([{"x": TRUTH}], [{"x": RUNS[0]}])]
    np.testing.assert_array_equal(call["x"][:, 0], squared_errors(TRUTH, RUNS[0]))


def test_no_tokens_and_another_shape_have_no_error() -> None:
    assert squared_errors(TRUTH[:0], TRUTH[:0]).shape == (0,)
    assert not squared_errors(TRUTH, TRUTH[:, :2]).any()


def test_the_floor_is_the_error_of_the_unluckiest_run() -> None:
    lucky = (TRUTH * (1 + 2.0**-25)).astype(np.float32)
    target = (TRUTH + 1e-6 * RANDOM.standard_normal(TRUTH.shape)).astype(np.float32)
    runs: list[Array] = [lucky, *RUNS]
    noise = together([{"x": squared_errors(TRUTH, run)} for run in runs])
    sides = {"x": TRUTH}, {"x": lucky}, {"x": target}, {"x": "hidden"}
    (alone,) = compare("s", *sides)
    (several,) = compare("s", *sides, noise=noise)
    assert alone.score is not None and alone.score > 8 and alone.problem
    assert several.score is not None and 2 < several.score < 6 and not several.problem
