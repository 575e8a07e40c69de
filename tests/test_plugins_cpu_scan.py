"""The scan's kernel for CPUs, on every instruction set, against the recurrence in float64."""

# The paper's matrices keep their capital names.
# ruff: noqa: N806

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.plugins.cpu.library import CpuLibrary, LibraryError
from ingot.plugins.cpu.panels import Floats
from ingot.plugins.mamba2_scan import mamba2_scan

Doubles = npt.NDArray[np.float64]
Results = tuple[Floats, Floats]
# Hm, Pm, G and Ns: of a model, and odd ones about vectors, tiles of rows and pieces.
SIZES = (
    (4, 64, 1, 128),
    (2, 80, 2, 48),
    (6, 5, 3, 7),
    (1, 1, 1, 1),
    (3, 37, 1, 50),
    (70, 33, 7, 17),
)
# About the kernel's chunks of 16.
TOKENS = (1, 2, 15, 16, 17, 33, 64)
NO_LIMITS = (0.0, math.inf)
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "state", "mask")


def drawn(
    sizes: tuple[int, int, int, int],
    tokens: int,
    *,
    batch: int = 2,
    padding: str = "none",
    spread: float = 1.0,
    seed: int = 0,
) -> dict[str, Floats]:
    """Inputs of a scan; with ``spread`` 1 the most steps lie from 0.01 to 1."""
    heads, head_size, groups, states = sizes
    random = np.random.default_rng(seed)
    mask = np.ones((batch, tokens))
    if padding == "left":
        for row in range(batch):
            mask[row, : (row + 1) * tokens // (batch + 1)] = 0
    elif padding == "holes":
        mask = (random.uniform(size=mask.shape) < 0.6).astype(np.float64)
    arrays = (
        random.normal(size=(batch, tokens, heads, head_size)),
        random.normal(size=(batch, tokens, heads)) * spread,
        -random.uniform(0.1, 16, size=heads),
        random.normal(size=(batch, tokens, groups, states)),
        random.normal(size=(batch, tokens, groups, states)) / math.sqrt(states),
        random.normal(size=heads),
        random.uniform(-4, 0, size=heads),
        random.normal(size=(batch, heads, head_size, states)),
        mask,
    )
    return dict(zip(NAMES, (array.astype(np.float32) for array in arrays), strict=True))


def recurrence(
    arrays: dict[str, Floats], limits: tuple[float, float] = NO_LIMITS
) -> tuple[tuple[Doubles, Doubles], tuple[Doubles, Doubles]]:
    """The scan, step by step, and what its results lose if every operation loses one unit.

    An exponent that is off by a unit of its own size is a decay off by as many as the exponent is.
    """
    x, dt, A, B, C, D, dt_bias, S, mask = (array.astype(np.float64) for array in arrays.values())
    step = mask[..., None] * np.clip(np.logaddexp(0, dt + dt_bias), *limits)
    B, C = (np.repeat(array, x.shape[2] // B.shape[2], axis=2) for array in (B, C))
    y, y_lost, size, lost = np.empty_like(x), np.empty_like(x), np.abs(S), np.zeros_like(S)
    for t in range(x.shape[1]):
        exponent = (step[:, t] * A)[..., None, None]
        decay = np.exp(exponent)
        added = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        lost = decay * (lost + size * (1 - exponent)) + np.abs(added)
        S, size = decay * S + added, decay * size + np.abs(added)
        skip = D[:, None] * x[:, t]
        y[:, t] = (S * C[:, t, :, None]).sum(-1) + skip
        y_lost[:, t] = ((lost + size) * np.abs(C[:, t, :, None])).sum(-1) + np.abs(skip)
    return (y, S), (y_lost, lost)


def assert_near(found: Results, arrays: dict[str, Floats], limits: Any = NO_LIMITS) -> None:
    """Within six units of float32 an operation; eager needs two."""
    expected, lost = recurrence(arrays, limits)
    for ours, theirs, most in zip(found, expected, lost, strict=True):
        assert ours.shape == theirs.shape
        assert (np.abs(ours - theirs) <= 6 * most * 2.0**-23 + 1e-30).all()


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gives_the_recurrence_of_float64(
    cpu_kernels: CpuLibrary, sizes: tuple[int, int, int, int], padding: str
) -> None:
    for seed, tokens in enumerate(TOKENS):
        arrays = drawn(sizes, tokens, padding=padding, seed=seed)
        assert_near(cpu_kernels.mamba2_scan(*arrays.values()), arrays)


@pytest.mark.parametrize("limits", [NO_LIMITS, (0.001, 0.1), (0.5, 100.0)])
def test_gives_it_of_large_and_of_tiny_steps_and_of_clamped_ones(
    cpu_kernels: CpuLibrary, limits: tuple[float, float]
) -> None:
    """Decays from 1 to numbers that float32 does not have."""
    for tokens in (1, 7, 35):
        arrays = drawn((8, 12, 2, 20), tokens, padding="holes", spread=30.0, seed=tokens)
        assert_near(cpu_kernels.mamba2_scan(*arrays.values(), limits=limits), arrays, limits)
        arrays["dt"] -= 60
        assert_near(cpu_kernels.mamba2_scan(*arrays.values(), limits=limits), arrays, limits)


def test_softplus_is_right_to_some_units_wherever_it_is_asked(cpu_kernels: CpuLibrary) -> None:
    """One token, one number of the state, and all else 1: y is dt'."""
    values = np.concatenate([np.linspace(-87, 100, 4001), [-1e4, 0, 19.999, 20, 20.001, 3e38]])
    heads = len(values)
    arrays = drawn((heads, 1, 1, 1), 1, batch=1)
    for name, value in (("x", 1), ("B", 1), ("C", 1), ("D", 0), ("dt_bias", 0), ("state", 0)):
        arrays[name][:] = value
    arrays["dt"][:] = values
    found = cpu_kernels.mamba2_scan(*arrays.values())[0].ravel()
    expected = np.logaddexp(0, arrays["dt"].astype(np.float64).ravel())
    assert (np.abs(found - expected) <= expected * 2.0**-21 + 1e-44).all()


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 3),
    heads_of_group=st.integers(1, 4),
    head_size=st.integers(1, 70),
    states=st.integers(1, 70),
    batch=st.integers(0, 3),
    tokens=st.integers(0, 50),
    padding=st.sampled_from(["none", "left", "holes"]),
    limits=st.sampled_from([NO_LIMITS, (0.05, 0.3)]),
)
def test_any_sizes_on_any_instruction_set(
    cpu_library: CpuLibrary,
    groups: int,
    heads_of_group: int,
    head_size: int,
    states: int,
    batch: int,
    tokens: int,
    padding: str,
    limits: tuple[float, float],
) -> None:
    sizes = (groups * heads_of_group, head_size, groups, states)
    arrays = drawn(sizes, tokens, batch=batch, padding=padding, seed=tokens)
    before = cpu_library.target
    try:
        for target in cpu_library.targets:
            cpu_library.use(target)
            assert_near(cpu_library.mamba2_scan(*arrays.values(), limits=limits), arrays, limits)
    finally:
        cpu_library.use(before)


@pytest.mark.parametrize("tokens", [1, 16, 70, 200])
def test_is_as_exact_as_eager(cpu_kernels: CpuLibrary, tokens: int) -> None:
    arrays = drawn((4, 64, 1, 128), tokens, batch=1, padding="left", seed=tokens)
    expected, _ = recurrence(arrays)
    theirs = mamba2_scan(*map(torch.from_numpy, arrays.values()), 256, *NO_LIMITS)
    for ours, eager, right in zip(
        cpu_kernels.mamba2_scan(*arrays.values()), theirs, expected, strict=True
    ):
        error = np.sqrt(np.square(eager.numpy() - right).mean())
        assert np.sqrt(np.square(ours - right).mean()) <= 1.5 * error


@pytest.mark.parametrize("tokens", [0, 1, 7, 16, 33])
def test_padding_alone_changes_no_bit_of_the_state(cpu_kernels: CpuLibrary, tokens: int) -> None:
    arrays = drawn((3, 10, 1, 19), tokens)
    arrays["mask"][:] = 0
    arrays["state"].flat[::3] = -0.0
    found = cpu_kernels.mamba2_scan(*arrays.values())[1]
    assert found.tobytes() == arrays["state"].tobytes()


@pytest.mark.parametrize("padding", ["left", "holes"])
def test_what_padding_holds_reaches_no_token(cpu_kernels: CpuLibrary, padding: str) -> None:
    for tokens in (5, 37):
        arrays = drawn((4, 9, 2, 21), tokens, batch=3, padding=padding, seed=4)
        is_token = arrays["mask"] == 1
        y, new_state = cpu_kernels.mamba2_scan(*arrays.values())
        for name in ("x", "dt", "B", "C"):
            # Finite, though nearly every product with it is infinite in float32.
            arrays[name][~is_token] = 3e38
        found_y, found_state = cpu_kernels.mamba2_scan(*arrays.values())
        np.testing.assert_array_equal(found_y[is_token], y[is_token])
        np.testing.assert_array_equal(found_state, new_state)


@pytest.mark.parametrize("name", ["dt", "x", "B"])
def test_what_is_no_number_stays_none(cpu_kernels: CpuLibrary, name: str) -> None:
    for tokens in (3, 20):
        arrays = drawn((1, 2, 1, 3), tokens, batch=1)
        arrays[name][0, 1] = np.nan
        y, new_state = cpu_kernels.mamba2_scan(*arrays.values(), limits=(0.001, 0.1))
        assert np.isnan(y[0, 1:]).all() and np.isnan(new_state).all()


@pytest.mark.parametrize("sizes", [(24, 64, 1, 128), (5, 70, 5, 40)], ids=str)
def test_threads_and_where_the_state_goes_change_no_bit(
    cpu_library: CpuLibrary, sizes: tuple[int, int, int, int]
) -> None:
    many = CpuLibrary(cpu_library.path, threads=3)
    for tokens in (1, 5, 40):
        arrays = drawn(sizes, tokens, batch=3, padding="left")
        one = cpu_library.mamba2_scan(*arrays.values())
        other = many.mamba2_scan(*arrays.values())
        in_place = many.mamba2_scan(*arrays.values(), in_place=True)
        assert in_place[1] is arrays["state"]
        for ours, theirs, last in zip(one, other, in_place, strict=True):
            np.testing.assert_array_equal(theirs, ours)
            np.testing.assert_array_equal(last, ours)


@pytest.mark.parametrize(
    ("sizes", "limits", "why"),
    [
        ((3, 4, 2, 5), NO_LIMITS, "3 heads are no multiple of 2 groups"),
        ((2, 0, 1, 5), NO_LIMITS, "head_size is 0"),
        ((2, 4, 1, 0), NO_LIMITS, "states is 0"),
        ((2, 4, 1, 5), (0.2, 0.1), "dt_min"),
        ((2, 4, 1, 5), (math.nan, 0.1), "dt_min"),
    ],
)
def test_refuses_sizes_that_are_none(
    cpu_kernels: CpuLibrary,
    sizes: tuple[int, int, int, int],
    limits: tuple[float, float],
    why: str,
) -> None:
    heads, head_size, groups, states = sizes
    arrays = drawn((heads, max(head_size, 1), 1, max(states, 1)), 3)
    shapes = {"x": (2, 3, heads, head_size), "B": (2, 3, groups, states)}
    for name, shape in shapes.items():
        arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(LibraryError, match=why):
        cpu_kernels.mamba2_scan(*arrays.values(), limits=limits)
