"""A Mamba2 block between its projections, on every instruction set, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.plugins.cpu.library import CpuLibrary, LibraryError
from ingot.plugins.cpu.panels import Floats

Doubles = npt.NDArray[np.float64]
EPSILON = 1e-5


@dataclass
class Case:
    projected: Floats
    mask: Floats
    states: tuple[Floats, Floats]
    conv: tuple[Floats, Floats | None]
    a: Floats
    d: Floats
    dt_bias: Floats
    groups: int
    norm: tuple[Floats, int, float] | None
    limits: tuple[float, float]

    def run(self, library: CpuLibrary, *, in_place: bool = False) -> tuple[Floats, Floats, Floats]:
        return library.mamba2_mixer(
            self.projected,
            self.mask,
            (self.states[0].copy(), self.states[1].copy()),
            self.conv,
            self.a,
            self.d,
            self.dt_bias,
            groups=self.groups,
            norm=self.norm,
            limits=self.limits,
            in_place=in_place,
        )


def drawn(
    batch: int,
    tokens: int,
    heads: int,
    size: int,
    groups: int = 1,
    states: int = 16,
    *,
    width: int = 4,
    norm_groups: int = 1,
    seed: int = 0,
) -> Case:
    random = np.random.default_rng(seed)
    inner = heads * size
    channels = inner + 2 * groups * states

    def normal(*shape: int, scale: float = 1.0) -> Floats:
        return (scale * random.normal(size=shape)).astype(np.float32)

    mask = (random.random((batch, tokens)) < 0.8).astype(np.float32)
    norm = (normal(inner), norm_groups, EPSILON) if norm_groups else None
    return Case(
        normal(batch, tokens, inner + channels + heads),
        mask,
        (
            normal(batch, channels, width - 1),
            normal(batch, heads, size, states, scale=states**-0.5),
        ),
        (normal(channels, 1, width, scale=0.5), normal(channels)),
        -np.abs(normal(heads)),
        normal(heads),
        normal(heads),
        groups,
        norm,
        (0.001, float(random.choice([0.5, np.inf]))),
    )


def plainly(case: Case) -> tuple[tuple[Doubles, Doubles, Doubles], Doubles]:
    """Row by row, token by token; and how far y may be off for what rounds before the norm.

    A norm divides by the root mean square of its group, and so multiplies what is wrong of small
    numbers, the more the smaller the group.
    """
    window, memory = (each.astype(np.float64) for each in case.states)
    batch, tokens, _ = case.projected.shape
    heads, size, states = memory.shape[1:]
    inner, groups = heads * size, case.groups
    channels, width = window.shape[1], window.shape[2] + 1
    y, off = np.empty((2, batch, tokens, inner))
    taps, bias = (np.asarray(each, np.float64) for each in case.conv)
    for row in range(batch):
        for t in range(tokens):
            gate, xbc, dt = np.split(
                case.projected[row, t].astype(np.float64), [inner, inner + channels]
            )
            real = float(case.mask[row, t])
            seen = np.concatenate([window[row], real * xbc[:, None]], axis=1)
            window[row] = seen[:, seen.shape[1] - width + 1 :]
            mixed = (seen * taps[:, 0]).sum(axis=1) + bias
            mixed = mixed / (1 + np.exp(-mixed))
            x, b, c = np.split(mixed, [inner, inner + groups * states])
            step = real * np.clip(np.logaddexp(0, dt + case.dt_bias), *case.limits)
            for head in range(heads):
                of_group = slice((head * groups // heads) * states, None)
                into, out = b[of_group][:states], c[of_group][:states]
                here = x[head * size : (head + 1) * size]
                decay = np.exp(step[head] * case.a[head])
                memory[row, head] = decay * memory[row, head] + step[head] * np.outer(here, into)
                result = memory[row, head] @ out + case.d[head] * here
                mine = slice(head * size, (head + 1) * size)
                y[row, t, mine] = result
                # Of a sum what it is made of counts, where its parts take each other away.
                parts = np.abs(memory[row, head]) @ np.abs(out) + np.abs(case.d[head] * here)
                off[row, t, mine] = 4e-6 * parts
            silu = gate / (1 + np.exp(-gate))
            gated, off[row, t] = y[row, t] * silu, off[row, t] * np.abs(silu)
            if case.norm is not None:
                weight, norm_groups, epsilon = case.norm
                apart = gated.reshape(norm_groups, -1)
                root = np.sqrt((apart**2).mean(axis=1, keepdims=True) + epsilon)
                own = off[row, t].reshape(norm_groups, -1)
                # What is wrong of a number itself, and of the root by all of them.
                own = own + np.abs(apart) / root * own.max(axis=1, keepdims=True)
                off[row, t] = (own / root).reshape(-1) * np.abs(weight)
                gated = (apart / root).reshape(-1) * weight
            y[row, t] = gated
    return (y, window, memory), off


def assert_right(found: tuple[Floats, Floats, Floats], case: Case) -> None:
    (y, *states), off = plainly(case)
    assert (np.abs(found[0] - y) <= off + 2e-6 * np.abs(y).max(initial=0) + 1e-30).all()
    for mine, expected in zip(found[1:], states, strict=True):
        most = np.abs(expected).max(initial=0) * 1e-5 + 1e-30
        np.testing.assert_allclose(mine, expected, rtol=0, atol=most)


@pytest.mark.parametrize("norm_groups", [0, 1, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 24, 64, 1, 128),
        (2, 1, 6, 5, 3, 7),
        (2, 37, 4, 16, 2, 20),
        (1, 50, 2, 9, 1, 33),
        (0, 3, 2, 4),
        (2, 0, 2, 4),
    ],
    ids=str,
)
def test_gives_the_block_of_float64(
    cpu_kernels: CpuLibrary, sizes: tuple[int, ...], norm_groups: int
) -> None:
    case = drawn(*sizes, norm_groups=norm_groups, seed=sum(sizes))
    assert_right(case.run(cpu_kernels), case)
    assert_right(case.run(cpu_kernels, in_place=True), case)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 40),
    shared=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.integers(1, 20),
    states=st.integers(1, 40),
    width=st.integers(1, 5),
    norm=st.sampled_from(["none", "one", "groups", "heads"]),
)
def test_any_sizes_on_any_instruction_set(
    cpu_library: CpuLibrary,
    batch: int,
    tokens: int,
    shared: int,
    groups: int,
    size: int,
    states: int,
    width: int,
    norm: str,
) -> None:
    heads = shared * groups
    norm_groups = {"none": 0, "one": 1, "groups": groups, "heads": heads}[norm]
    sizes = (batch, tokens, heads, size, groups, states)
    case = drawn(*sizes, width=width, norm_groups=norm_groups, seed=size)
    before = cpu_library.target
    try:
        for target in cpu_library.targets:
            cpu_library.use(target)
            assert_right(case.run(cpu_library), case)
    finally:
        cpu_library.use(before)


def test_threads_and_where_states_are_change_no_bit(cpu_library: CpuLibrary) -> None:
    many = CpuLibrary(cpu_library.path, threads=3)
    for tokens in (1, 70):
        case = drawn(2, tokens, 24, 64, 2, 32)
        one = case.run(cpu_library)
        for other in (case.run(many), case.run(many, in_place=True)):
            for ours, theirs in zip(one, other, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_refuses_a_norm_that_does_not_fit(cpu_library: CpuLibrary) -> None:
    with pytest.raises(LibraryError, match="norm_groups"):
        drawn(1, 1, 2, 4, norm_groups=3).run(cpu_library)
