"""Numbers chosen for their inputs: the error of outputs, in float64, on inputs of the same kind."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch

from ingot.export.codecs import gptq, importance
from ingot.export.codecs.blocks import Bits, Blocks, Floats, Size

FORMATS = [
    Blocks(bits, size, symmetric)
    for bits, size, symmetric in itertools.product(get_args(Bits), get_args(Size), (True, False))
    if size != 64
]


def drawn(rows: int, columns: int, seed: int = 0) -> tuple[Floats, np.ndarray]:
    """Weights with heavy tails ``[rows, columns]``, and 4 inputs a column that depend on another.

    Their sizes differ as those of trained models do, one by far.
    """
    random = np.random.default_rng(seed)
    weights = random.standard_t(5, (rows, columns)).astype(np.float32)
    mix = random.standard_normal((columns // 4, columns))
    inputs = random.standard_normal((4 * columns, columns // 4)) @ mix / np.sqrt(columns // 4)
    inputs += 0.5 * random.standard_normal(inputs.shape)
    inputs *= random.lognormal(0, 0.7, columns)
    inputs[:, columns // 3] *= 15
    return weights, inputs


def moments(inputs: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((inputs.T @ inputs).astype(np.float32))


def error(weights: Floats, found: Floats, inputs: np.ndarray) -> float:
    """Of the outputs, relative."""
    wide = weights.astype(np.float64)
    return float(((inputs @ (found - wide).T) ** 2).sum() / ((inputs @ wide.T) ** 2).sum())


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_is_better_than_importance_and_that_than_nearest(format_: Blocks) -> None:
    weights, inputs = drawn(48, 256)
    seen, unseen = inputs[::2], inputs[1::2]
    given = moments(seen)
    errors = [
        error(weights, format_.decode(encoded, 256), unseen)
        for encoded in (
            format_.encode(weights),
            importance.encode(format_, weights, given),
            gptq.encode(format_, weights, given),
        )
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_what_is_set_to_its_best_makes_the_error_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = drawn(32, 128)
    errors = []
    for sweeps in (0, 1, 2, 8):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        encoded = gptq.encode(Blocks(4, 32), weights, moments(inputs))
        errors.append(error(weights, Blocks(4, 32).decode(encoded, 128), inputs))
    assert errors[0] > 1.05 * errors[1] > errors[2] > errors[3]


def test_no_single_number_could_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """After many sweeps each number is the best given all others, by trying its neighbours."""
    monkeypatch.setattr(gptq, "SWEEPS", 30)
    format_ = Blocks(4, 32)
    weights, inputs = drawn(6, 64)
    given = moments(inputs).double().numpy()
    damped = given / given.diagonal().mean() + gptq.DAMPING * np.eye(64)
    encoded = gptq.encode(format_, weights, moments(inputs))
    found = format_.decode(encoded, 64).astype(np.float64)
    scales = np.repeat(encoded.scales, 32, axis=1).astype(np.float64)
    steps = np.rint(found / scales)

    def of(values: np.ndarray) -> np.ndarray:
        off = values - weights
        return np.asarray(((off @ damped) * off).sum(axis=1))

    least = of(found)
    for column, by in itertools.product(range(64), (-1, 1)):
        moved = found.copy()
        moved[:, column] += by * scales[:, column]
        inside = (steps[:, column] + by >= -8) & (steps[:, column] + by <= 7)
        assert (of(moved)[inside] >= least[inside] * (1 - 1e-4)).all(), column


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = drawn(20, 96)
    whole = gptq.encode(Blocks(4, 32), weights, moments(inputs))
    order = np.random.default_rng(1).permutation(20)
    turned = gptq.encode(Blocks(4, 32), weights[order], moments(inputs))
    agree = (whole.data[order] == turned.data).mean()
    # But for a tie that rounds elsewhere, where a product of other sizes sums in another order.
    assert agree > 0.999
    monkeypatch.setattr(gptq, "AT_ONCE", 7)
    assert (gptq.encode(Blocks(4, 32), weights, moments(inputs)).data == whole.data).mean() > 0.999


@pytest.mark.parametrize("columns", [1, 33, 130])
def test_a_row_that_no_whole_number_of_blocks_fills(columns: int) -> None:
    random = np.random.default_rng(3)
    weights = random.standard_normal((8, columns)).astype(np.float32)
    inputs = random.standard_normal((500, columns))
    format_ = Blocks(4, 32, symmetric=False)
    encoded = gptq.encode(format_, weights, moments(inputs))
    assert encoded.data.shape == format_.encode(weights).data.shape
    plain = format_.decode(format_.encode(weights), columns)
    found = format_.decode(encoded, columns)
    assert error(weights, found, inputs) <= error(weights, plain, inputs) + 1e-9


@pytest.mark.parametrize("kind", ["nothing", "one token", "a dead input"])
def test_inputs_that_say_little_are_no_error(kind: str) -> None:
    weights, inputs = drawn(16, 64)
    if kind == "nothing":
        inputs[:] = 0
    elif kind == "one token":
        inputs[1:] = 0
    else:
        inputs[:, 5] = 0
    for method in (gptq, importance):
        encoded = method.encode(Blocks(4, 32), weights, moments(inputs))
        found = Blocks(4, 32).decode(encoded, 64)
        # No input leaves a weight free to be anything.
        assert ((found - weights) ** 2).sum() < 0.4 * (weights**2).sum(), method


def test_is_the_same_whatever_the_size_of_the_inputs() -> None:
    weights, inputs = drawn(16, 64)
    for method in (gptq, importance):
        once = method.encode(Blocks(4, 32), weights, moments(inputs))
        other = method.encode(Blocks(4, 32), weights, moments(inputs) * 2.0**40)
        np.testing.assert_array_equal(once.data, other.data)
