"""The convolution's kernel for CPUs, on every instruction set, against float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from activations import ACTIVATIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.plugins.cpu.library import CpuLibrary, LibraryError
from ingot.plugins.cpu.panels import Floats

Doubles = npt.NDArray[np.float64]
# x, state, weight and, or None, bias.
Arrays = tuple[Floats, Floats, Floats, Floats | None]


def drawn(
    batch: int, tokens: int, channels: int, width: int, *, biased: bool = True, seed: int = 0
) -> Arrays:
    random = np.random.default_rng(seed)
    shapes = (
        (batch, tokens, channels),
        (batch, channels, width - 1),
        (channels, 1, width),
        channels,
    )
    x, state, weight, bias = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, state, weight, bias if biased else None


def assert_right(found: tuple[Floats, Floats], arrays: Arrays, activation: str) -> None:
    """y within some units of float32 in the sum's own parts, and the new state to the bit."""
    x, state, weight, bias = arrays
    tokens, width = x.shape[1], weight.shape[2]
    window = np.concatenate([state.swapaxes(1, 2), x], axis=1)
    y, size = (
        sum(
            (window[:, w : w + tokens] * weight[:, 0, w].astype(np.float64) for w in range(width)),
            np.zeros(x.shape) if bias is None else np.broadcast_to(bias, x.shape).astype(float),
        )
        for window, weight, bias in (
            (window, weight, bias),
            (np.abs(window), np.abs(weight), None if bias is None else np.abs(bias)),
        )
    )
    activated = np.reshape([ACTIVATIONS[activation](v) for v in y.flat], x.shape)
    assert found[0].shape == x.shape
    assert (np.abs(found[0] - activated) <= size * 2.0**-20 + 1e-30).all()
    np.testing.assert_array_equal(found[1], window[:, tokens:].swapaxes(1, 2))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9])
def test_gives_the_convolution_of_float64(
    cpu_kernels: CpuLibrary, width: int, activation: str
) -> None:
    # About the channels of a vector and of a piece, and the tokens that are computed together.
    for seed, (batch, tokens, channels) in enumerate(
        (
            (1, 1, 150),
            (2, 1, 16),
            (1, 2, 7),
            (2, 3, 128),
            (3, 4, 33),
            (1, 16, 5),
            (2, 35, 20),
            (0, 3, 4),
        )
    ):
        arrays = drawn(batch, tokens, channels, width, biased=seed % 2 == 0, seed=seed)
        assert_right(cpu_kernels.causal_conv(*arrays, activation), arrays, activation)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(0, 40),
    channels=st.integers(1, 300),
    width=st.integers(1, 6),
    biased=st.booleans(),
)
def test_any_sizes_on_any_instruction_set(
    cpu_library: CpuLibrary, batch: int, tokens: int, channels: int, width: int, biased: bool
) -> None:
    arrays = drawn(batch, tokens, channels, width, biased=biased, seed=channels)
    before = cpu_library.target
    try:
        for target in cpu_library.targets:
            cpu_library.use(target)
            assert_right(cpu_library.causal_conv(*arrays, "silu"), arrays, "silu")
    finally:
        cpu_library.use(before)


def test_silu_is_right_far_from_zero(cpu_kernels: CpuLibrary) -> None:
    values = np.concatenate([np.linspace(-130, 130, 2601), [-3e38, -1e5, 1e5, 3e38]])
    x = values.astype(np.float32).reshape(1, -1, 1)
    one, state = np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 0), np.float32)
    found = cpu_kernels.causal_conv(x, state, one, None, "silu")[0].ravel()
    wide = x.astype(np.float64).ravel()
    expected = wide * np.exp(-np.logaddexp(0, -wide))
    # Below the normal numbers what is left is of no weight.
    assert (np.abs(found - expected) <= np.abs(expected) * 2.0**-20 + 1e-35).all()


@pytest.mark.parametrize("width", [3, 4])
def test_threads_and_where_the_state_goes_change_no_bit(
    cpu_library: CpuLibrary, width: int
) -> None:
    many = CpuLibrary(cpu_library.path, threads=3)
    for tokens in (1, 2, 40):
        arrays = drawn(2, tokens, 3000, width)
        one = cpu_library.causal_conv(*arrays, "silu")
        other = many.causal_conv(*arrays, "silu")
        in_place = many.causal_conv(*arrays, "silu", in_place=True)
        assert in_place[1] is arrays[1]
        for ours, theirs, last in zip(one, other, in_place, strict=True):
            np.testing.assert_array_equal(theirs, ours)
            np.testing.assert_array_equal(last, ours)


@pytest.mark.parametrize(
    ("channels", "width", "why"), [(0, 4, "channels is 0"), (3, 0, "width is 0")]
)
def test_refuses_sizes_that_are_none(
    cpu_kernels: CpuLibrary, channels: int, width: int, why: str
) -> None:
    x, weight = np.zeros((1, 2, channels), np.float32), np.zeros((channels, 1, width), np.float32)
    with pytest.raises(LibraryError, match=why):
        cpu_kernels.causal_conv(x, np.zeros((1, 3, 3), np.float32), weight, None, "silu")
