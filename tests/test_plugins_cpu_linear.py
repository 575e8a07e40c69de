"""Products with weights in panels, on every instruction set, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cpu_weights import FORMATS, drawn, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.plugins.cpu.library import CpuLibrary, LibraryError
from ingot.plugins.cpu.panels import Floats, Format

# Tokens, inputs, outputs: about tiles of rows, panels, groups and blocks, and past them.
SHAPES = ((1, 32, 16), (1, 7, 5), (2, 100, 33), (3, 64, 40), (4, 300, 100), (5, 129, 17))
LARGE = ((13, 257, 70), (25, 513, 150), (60, 640, 48))


def bound(x: npt.NDArray[Any], matrix: Floats) -> npt.NDArray[np.float64]:
    """What rounding in float32 may amount to: some units of what the sum is made of."""
    sizes: npt.NDArray[np.float64] = np.abs(x).astype(np.float64) @ np.abs(matrix).T
    return sizes * 2.0**-21 + 1e-30


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_gives_the_product_of_float64(cpu_kernels: CpuLibrary, form: Format) -> None:
    for seed, (tokens, columns, rows) in enumerate((*SHAPES, *LARGE)):
        weight, matrix = drawn(form, rows, columns, seed)
        rng = np.random.default_rng(100 + seed)
        x = rng.standard_normal((tokens, columns)).astype(np.float32)
        bias = rng.standard_normal(rows).astype(np.float32)
        found = cpu_kernels.linear(form, x, weight, rows, bias)
        error = np.abs(found - (x.astype(np.float64) @ matrix.T.astype(np.float64) + bias))
        assert (error <= bound(x, matrix) + np.abs(bias) * 2.0**-20).all(), (tokens, columns, rows)


@pytest.mark.parametrize("round_activations", [False, True])
@pytest.mark.parametrize("form", FORMATS[::2], ids=str)
def test_adds_a_part_of_it_to_what_was_there(
    cpu_kernels: CpuLibrary, form: Format, round_activations: bool
) -> None:
    """Once, also where columns are taken in parts: 640 are more than a part has."""
    for seed, (tokens, columns, rows) in enumerate((*SHAPES, *LARGE)):
        weight, matrix = drawn(form, rows, columns, seed)
        rng = np.random.default_rng(300 + seed)
        x = rng.standard_normal((tokens, columns)).astype(np.float32)
        residual = rng.standard_normal((tokens, rows)).astype(np.float32)
        bias = rng.standard_normal(rows).astype(np.float32)
        found = cpu_kernels.linear(
            form, x, weight, rows, bias, residual, scale=-0.25, round_activations=round_activations
        )
        near = rounded(x, form) if round_activations else x.astype(float)
        expected = residual - 0.25 * (near @ matrix.T.astype(np.float64) + bias)
        error, most = np.abs(found - expected), bound(near, matrix)
        assert (error <= most + (np.abs(bias) + np.abs(residual)) * 2.0**-20).all()


@pytest.mark.parametrize("round_activations", [False, True])
@pytest.mark.parametrize("form", FORMATS[::3], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_several_weights_give_what_each_gives_alone(
    cpu_library: CpuLibrary, form: Format, round_activations: bool, tokens: int
) -> None:
    sizes, columns = (40, 7, 129), 300
    weights = [(drawn(form, rows, columns, rows)[0], rows) for rows in sizes]
    x = np.random.default_rng(8).standard_normal((tokens, columns)).astype(np.float32)
    many = CpuLibrary(cpu_library.path, threads=3)
    for library in (cpu_library, many):
        found = library.linears(form, x, weights, round_activations=round_activations)
        for (weight, rows), y in zip(weights, found, strict=True):
            alone = cpu_library.linear(form, x, weight, rows, round_activations=round_activations)
            np.testing.assert_array_equal(y, alone)


def test_refuses_a_call_for_no_weights(cpu_library: CpuLibrary) -> None:
    with pytest.raises(LibraryError, match="1 to 64 weights"):
        cpu_library.linears(FORMATS[0], np.zeros((1, 4), np.float32), [])


@pytest.mark.parametrize("form", FORMATS[1:], ids=str)
def test_rounds_activations_where_it_may(cpu_kernels: CpuLibrary, form: Format) -> None:
    for seed, (tokens, columns, rows) in enumerate((*SHAPES, *LARGE)):
        weight, matrix = drawn(form, rows, columns, seed)
        x = np.random.default_rng(100 + seed).standard_normal((tokens, columns)).astype(np.float32)
        x[0, :32] = 0
        found = cpu_kernels.linear(form, x, weight, rows, round_activations=True)
        near = rounded(x, form)
        error = np.abs(found - near @ matrix.T.astype(np.float64))
        assert (error <= bound(near, matrix)).all(), (tokens, columns, rows)


def test_of_float32_nothing_is_rounded(cpu_library: CpuLibrary) -> None:
    form = Format("float32")
    weight, _ = drawn(form, 20, 40, 0)
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    exact = cpu_library.linear(form, x, weight, 20)
    np.testing.assert_array_equal(
        cpu_library.linear(form, x, weight, 20, round_activations=True), exact
    )


def test_rounds_to_bfloat16_at_every_edge_of_it(cpu_kernels: CpuLibrary) -> None:
    """Ties, what overflows, what is no number, zeros with a sign; of a few rows, and of many."""
    form = Format("bfloat16")
    bits = [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7F8000, 0x7F7F7FFF, 0xFF7FFFFF, 0x80000000]
    edges = np.array([*bits, 0x7F800000, 0x7FC00000, 0x7F80FFFF, 0x00800000], np.uint32)
    values = edges.view(np.float32)
    weight = drawn(form, 16, 1, 0)[0]
    for tokens in (1, 9):
        for value in values:
            x = np.full((tokens, 1), value, np.float32)
            # Of one column, a product is what x became times what the weight is.
            found = cpu_kernels.linear(form, x, weight, 16, round_activations=True)
            matrix = drawn(form, 16, 1, 0)[1].astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                expected = (rounded(x, form) @ matrix.T).astype(np.float32)
            # What is below the normal numbers may count as zero.
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-38)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(FORMATS),
    st.integers(0, 30),
    st.integers(1, 400),
    st.integers(1, 90),
    st.booleans(),
    st.booleans(),
)
def test_any_sizes_agree_with_plain_loops(
    cpu_library: CpuLibrary,
    form: Format,
    tokens: int,
    columns: int,
    rows: int,
    biased: bool,
    round_activations: bool,
) -> None:
    weight, matrix = drawn(form, rows, columns, columns)
    rng = np.random.default_rng(1000 + rows)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32) if biased else None

    def product() -> Floats:
        return cpu_library.linear(form, x, weight, rows, bias, round_activations=round_activations)

    found, target = product(), cpu_library.target
    cpu_library.use("reference")
    try:
        expected = product()
    finally:
        cpu_library.use(target)
    assert found.shape == (tokens, rows)
    assert (np.abs(found - expected) <= 2 * bound(x, matrix) + 1e-5).all()


@pytest.mark.parametrize("round_activations", [False, True])
@pytest.mark.parametrize("form", FORMATS[::3], ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    cpu_library: CpuLibrary, form: Format, round_activations: bool
) -> None:
    rows, columns = 700, 513
    weight, _ = drawn(form, rows, columns, 3)
    many = CpuLibrary(cpu_library.path, threads=3)
    for tokens in (1, 3, 40):
        x = np.random.default_rng(4).standard_normal((tokens, columns)).astype(np.float32)
        one = cpu_library.linear(form, x, weight, rows, round_activations=round_activations)
        other = many.linear(form, x, weight, rows, round_activations=round_activations)
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("form", FORMATS[::2], ids=str)
def test_a_row_is_the_same_in_any_batch_of_its_kind(
    cpu_library: CpuLibrary, form: Format, tokens: int
) -> None:
    """Rows of one batch are computed alike, whatever stands beside them."""
    weight, _ = drawn(form, 50, 200, 5)
    x = np.random.default_rng(6).standard_normal((tokens, 200)).astype(np.float32)
    found = cpu_library.linear(form, x, weight, 50)
    turned = cpu_library.linear(form, np.ascontiguousarray(x[::-1]), weight, 50)
    np.testing.assert_array_equal(turned[::-1], found)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_looks_rows_up(cpu_library: CpuLibrary, form: Format) -> None:
    weight, matrix = drawn(form, 37, 75, 7)
    ids = np.array([0, 36, 15, 16, -1, -37, 3], np.int64)
    found = cpu_library.embedding(form, ids, weight, *matrix.shape)
    np.testing.assert_array_equal(found, matrix[ids])


@pytest.mark.parametrize("identity", [37, -38])
def test_refuses_a_row_that_there_is_not(cpu_library: CpuLibrary, identity: int) -> None:
    weight, matrix = drawn(FORMATS[0], 37, 75, 7)
    with pytest.raises(LibraryError, match="no row of the table"):
        cpu_library.embedding(FORMATS[0], np.array([identity], np.int64), weight, *matrix.shape)


def test_counts_the_bytes_that_packing_makes(cpu_library: CpuLibrary) -> None:
    for form in FORMATS:
        for rows, columns in ((1, 1), (16, 32), (33, 257)):
            expected = form.nbytes(rows, columns)
            assert cpu_library.weight_bytes(form, rows, columns) == expected


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (Format("int8", 48), "32, 64 or 128"),
        (Format("int4", 0), "32, 64 or 128"),
        (Format("float32", 32), "neither blocks"),
    ],
)
def test_refuses_a_format_that_there_is_not(
    cpu_library: CpuLibrary, form: Format, why: str
) -> None:
    x, weight = np.zeros((1, 32), np.float32), np.zeros(1 << 16, np.uint8)
    with pytest.raises(LibraryError, match=why):
        cpu_library.linear(form, x, weight, 16)


def test_refuses_an_instruction_set_that_there_is_not(cpu_library: CpuLibrary) -> None:
    with pytest.raises(LibraryError, match=r'"mmx" .* choose one of .*reference'):
        cpu_library.use("mmx")
