"""Weights in panels: what is written is read again, and lies where ``panels.h`` says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.plugins.cpu.panels import (
    Format,
    Whole,
    pack_floats,
    pack_whole,
    scales_stored,
    unpack_floats,
    unpack_whole,
)

FLOATS = (Format("float32"), Format("bfloat16"))
WHOLE = tuple(
    Format(numbers, block, zero_points)
    for numbers in ("int8", "int4")
    for block in (32, 64, 128)
    for zero_points in (False, True)
)
SIZES = st.tuples(st.integers(1, 50), st.integers(1, 300))


@pytest.mark.parametrize("form", FLOATS, ids=str)
@settings(deadline=None, max_examples=15)
@given(SIZES)
def test_floats_come_back(form: Format, sizes: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    if form.numbers == "bfloat16":
        matrix = (matrix.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    data = pack_floats(form, matrix)
    assert data.nbytes == form.nbytes(*sizes)
    np.testing.assert_array_equal(unpack_floats(form, data, *sizes), matrix)


@pytest.mark.parametrize("form", WHOLE, ids=str)
@settings(deadline=None, max_examples=8)
@given(SIZES)
def test_whole_numbers_come_back(form: Format, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    rows, columns = sizes
    blocks = -(-columns // form.block)
    shape = rows, blocks
    numbers = rng.integers(0, 1 << form.bits, (*shape, form.block), np.uint8)
    zeros = rng.integers(0, 1 << form.bits, shape, np.uint8) if form.zero_points else None
    scales = scales_stored(rng.uniform(1e-4, 1, shape).astype(np.float32))
    data = pack_whole(form, Whole(numbers, scales, zeros))
    assert data.nbytes == form.nbytes(*sizes)
    found = unpack_whole(form, data, *sizes)
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_array_equal(found.scales, scales)
    if form.zero_points:
        np.testing.assert_array_equal(found.zeros, zeros)
    else:
        assert found.zeros is None


def test_numbers_lie_where_the_kernels_look() -> None:
    """Row 17, column 45 of int4 in blocks of 32: the second panel and block, its row 1, group 1."""
    numbers = np.full((20, 2, 32), 8, np.uint8)
    numbers[17, 1, 13] = 3
    numbers[17, 1, 9] = 5
    data = pack_whole(Format("int4", 32), Whole(numbers, np.ones((20, 2), np.float32)))
    factors, scales = 64, 64
    panel = data[1, factors + scales :].reshape(2, 4, 16, 4)
    # Columns 8 to 15 of the block are group 1; 9 is byte 1's low half, 13 its high half.
    assert panel[1, 1, 1, 1] == 5 | 3 << 4
    panel[1, 1, 1, 1] = 8 | 8 << 4
    assert (panel == 8 | 8 << 4).all()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e-3, 1.0, 3e4, 1e20])
def test_scales_of_any_size_keep_the_precision_of_float16(size: float) -> None:
    scales = np.random.default_rng(2).uniform(size / 1000, size, (40, 7)).astype(np.float32)
    error = np.abs(scales_stored(scales) / scales - 1)
    assert error.max() < 2.0**-11 * 1.001


def test_scales_of_half_precision_are_kept_to_the_bit() -> None:
    every = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    for scales in (every.reshape(-1, 1), every[None]):
        np.testing.assert_array_equal(scales_stored(scales), scales)


def test_a_row_of_nothing_has_scales_of_nothing() -> None:
    assert not scales_stored(np.zeros((3, 2), np.float32)).any()
