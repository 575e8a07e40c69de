"""Blocks of whole numbers: their order, what ONNX Runtime makes of them, and how good they are."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from ingot.export.codecs.blocks import Bits, Blocks, Encoded, Floats, Size
from ingot.runtime.onnxruntime_session import open_session

FORMATS = [
    Blocks(bits, size, symmetric)
    for bits, size, symmetric in itertools.product(get_args(Bits), get_args(Size), (True, False))
]


def drawn(rows: int, columns: int, seed: int = 0, tails: float = 5.0) -> Floats:
    """Numbers with heavy tails, as trained weights have."""
    return np.random.default_rng(seed).standard_t(tails, (rows, columns)).astype(np.float32)


def plainly(format_: Blocks, encoded: Encoded, columns: int) -> list[list[float]]:
    """Every number by the words of the operator's documentation, one after the other."""
    result = []
    for row in range(len(encoded.data)):
        numbers = []
        for column in range(columns):
            block, place = divmod(column, format_.size)
            if format_.bits == 8:
                number = int(encoded.data[row, block, place])
                zero = None if encoded.zero_points is None else int(encoded.zero_points[row, block])
            else:
                byte = int(encoded.data[row, block, place // 2])
                number = byte >> 4 if place % 2 else byte & 0xF
                zero = None
                if encoded.zero_points is not None:
                    byte = int(encoded.zero_points[row, block // 2])
                    zero = byte >> 4 if block % 2 else byte & 0xF
            zero = 2 ** (format_.bits - 1) if zero is None else zero
            numbers.append(float(np.float32(number - zero) * encoded.scales[row, block]))
        result.append(numbers)
    return result


def of_onnx_runtime(format_: Blocks, encoded: Encoded, columns: int) -> Floats:
    """The matrix that its kernel multiplies by, exactly: products with every unit vector."""
    rows = len(encoded.data)
    given_: dict[str, np.ndarray] = {"b": encoded.data, "scales": encoded.scales.reshape(-1)}
    if encoded.zero_points is not None:
        given_["zero_points"] = encoded.zero_points.reshape(-1)
    node = helper.make_node(
        "MatMulNBits",
        ["a", *given_],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=format_.bits,
        block_size=format_.size,
        accuracy_level=0,
    )
    float_type = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("a", float_type, [None, columns])],
        [helper.make_tensor_value_info("y", float_type, [None, rows])],
        [numpy_helper.from_array(array, name) for name, array in given_.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = open_session(model.SerializeToString())
    (found,) = session.run(["y"], {"a": np.eye(columns, dtype=np.float32)})
    return np.asarray(found).T


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [32, 160, 130, 1])
def test_decodes_what_the_documentation_says(format_: Blocks, columns: int) -> None:
    weights = drawn(3, columns)
    encoded = format_.encode(weights)
    found = format_.decode(encoded, columns)
    np.testing.assert_array_equal(found, np.array(plainly(format_, encoded, columns), np.float32))
    assert found.dtype == np.float32 and found.shape == weights.shape
    count = -(-columns // format_.size)
    assert encoded.data.shape == (3, count, format_.size * format_.bits // 8)
    assert encoded.data.dtype == np.uint8 and encoded.scales.shape == (3, count)
    if not format_.symmetric:
        assert encoded.zero_points is not None
        assert encoded.zero_points.shape == (3, -(-count * format_.bits // 8))


@pytest.mark.parametrize("format_", [f for f in FORMATS if f.bits == 4], ids=str)
def test_is_what_onnx_runtime_multiplies_by(format_: Blocks) -> None:
    columns = 2 * format_.size + 32
    encoded = format_.encode(drawn(16, columns, seed=3))
    found = of_onnx_runtime(format_, encoded, columns)
    np.testing.assert_allclose(found, format_.decode(encoded, columns), rtol=0, atol=1e-6)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_is_better_than_rounding_to_the_range(format_: Blocks) -> None:
    """Against round to nearest between the ends of a block, in the squared error."""
    weights = drawn(64, 4 * format_.size, seed=5)
    blocks = weights.reshape(-1, format_.size)
    if format_.symmetric:
        scale = np.abs(blocks).max(1, keepdims=True) / (format_.middle - 1)
        plain = np.rint(blocks / scale) * scale
    else:
        low, high = np.minimum(blocks.min(1), 0)[:, None], np.maximum(blocks.max(1), 0)[:, None]
        scale = (high - low) / format_.most
        zero = np.rint(-low / scale)
        plain = (np.clip(np.rint(blocks / scale) + zero, 0, format_.most) - zero) * scale
    of_plain = ((plain - blocks) ** 2).sum()
    found = format_.decode(format_.encode(weights), weights.shape[1])
    share = ((found - weights) ** 2).sum() / of_plain
    # With a zero point of their own the ends of most blocks are right already.
    most = 0.9 if format_.symmetric else 0.95
    assert share < (most if format_.bits == 4 else 1.0)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_what_is_in_the_format_already_is_found_again(format_: Blocks) -> None:
    """Numbers that fill the range of a block, with scales of their own."""
    random = np.random.default_rng(7)
    numbers = random.integers(0, format_.most + 1, (20, 4, format_.size))
    numbers[..., 0], numbers[..., 1] = 0, format_.most
    zeros = np.full((20, 4, 1), format_.middle)
    if not format_.symmetric:
        zeros = random.integers(0, format_.most + 1, (20, 4, 1))
    scales = random.uniform(0.5, 2.0, (20, 4, 1)).astype(np.float32)
    weights = ((numbers - zeros).astype(np.float32) * scales).reshape(20, -1)
    found = format_.decode(format_.encode(weights), weights.shape[1])
    np.testing.assert_allclose(found, weights, rtol=2e-6, atol=1e-6)


def test_columns_that_matter_more_are_nearer() -> None:
    format_ = Blocks(4, 32)
    weights = drawn(256, 64, seed=9)
    importance = np.ones(64, np.float32)
    importance[:8] = 100.0
    plain = format_.decode(format_.encode(weights), 64)
    found = format_.decode(format_.encode(weights, importance), 64)
    errors = [((each - weights) ** 2) for each in (plain, found)]
    assert errors[1][:, :8].sum() < 0.6 * errors[0][:, :8].sum()
    weighted = [(importance * error).sum() for error in errors]
    assert weighted[1] < weighted[0]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 5),
    st.integers(1, 200),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
)
def test_only_ends_of_a_block_are_further_off_than_a_step(
    format_: Blocks, rows: int, columns: int, seed: int, size: float
) -> None:
    weights = (drawn(rows, columns, seed, tails=3.0) * np.float32(size)).astype(np.float32)
    encoded = format_.encode(weights)
    found = format_.decode(encoded, columns)
    assert np.isfinite(found).all()
    blocks = np.pad(weights, ((0, 0), (0, -columns % format_.size)))
    blocks = blocks.reshape(rows, -1, format_.size)

    def by_column(of_blocks: Floats) -> Floats:
        return np.repeat(of_blocks, format_.size, axis=1)[:, :columns]

    steps, errors = by_column(np.abs(encoded.scales)), np.abs(found - weights)
    least, most = by_column(blocks.min(axis=-1).clip(max=0)), by_column(blocks.max(axis=-1).clip(0))
    middle = (least / 2 <= weights) & (weights <= most / 2)
    assert (errors[middle] <= 0.75 * steps[middle] + 1e-35).all()
    # At the ends the range may be cut, where that is better for all others: to half of it at most.
    ends = np.maximum(steps, np.abs(weights) / 2)
    assert (errors <= 1.01 * ends + 1e-35).all()
    if size == 0.0:
        assert not found.any()


def test_says_how_many_bits_a_weight_takes() -> None:
    encoded = Blocks(4, 32, symmetric=False).encode(drawn(8, 256))
    assert encoded.nbytes * 8 / (8 * 256) == Blocks(4, 32, symmetric=False).bits_per_weight == 5.125
    assert Blocks(8, 128).bits_per_weight == 8.25


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_says_how_many_bytes_a_matrix_takes(format_: Blocks) -> None:
    for rows, columns in ((1, 1), (3, 130), (2, 256)):
        assert format_.encode(drawn(rows, columns)).nbytes == format_.nbytes(rows, columns)
