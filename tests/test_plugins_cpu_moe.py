"""The experts' kernels for CPUs against plain NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cpu_weights import FORMATS, drawn, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.plugins.activations import ACTIVATIONS, activate
from ingot.plugins.cpu.library import CpuLibrary, LibraryError
from ingot.plugins.cpu.panels import Bytes, Floats, Format, pack_floats

Doubles = npt.NDArray[np.float64]


def stack(
    form: Format, experts: int, rows: int, columns: int, seed: int
) -> tuple[Bytes, list[Floats]]:
    """Experts in panels, and what they stand for, divided so that products stay near 1."""
    made = [drawn(form, rows, columns, seed * 1000 + expert) for expert in range(experts)]
    return np.stack([data for data, _ in made]), [matrix for _, matrix in made]


def product(x: Doubles, matrix: Floats, form: Format, round_activations: bool) -> Doubles:
    near = rounded(x[None], form)[0] if round_activations else x
    result: Doubles = matrix.astype(np.float64) @ near
    return result


def dispatched(
    forms: tuple[Format, Format],
    x: Floats,
    logits: Floats,
    gate_up: list[Floats],
    down: list[Floats],
    top_k: int,
    normalize: bool,
    activation: str,
    round_activations: bool,
) -> Doubles:
    y = np.zeros(x.shape)
    for n, row in enumerate(logits.astype(np.float64)):
        order = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:top_k]
        likely = np.exp(row - row.max())
        weights = likely[order] / (likely[order].sum() if normalize else likely.sum())
        for expert, weight in zip(order, weights, strict=True):
            both = product(x[n].astype(np.float64), gate_up[expert], forms[0], round_activations)
            gate, up = np.split(both, 2)
            hidden = activate(activation, torch.from_numpy(gate)).numpy() * up
            y[n] += weight * product(hidden, down[expert], forms[1], round_activations)
    return y


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("form", FORMATS[::3], ids=str)
def test_a_gated_mlp_is_what_plain_products_make(
    cpu_kernels: CpuLibrary, form: Format, activation: str
) -> None:
    forms = (form, FORMATS[0])
    for tokens, hidden, inner, rounds in (
        (1, 40, 33, False),
        (5, 64, 16, True),
        (30, 70, 90, True),
    ):
        rng = np.random.default_rng(tokens)
        x = (rng.standard_normal((tokens, hidden)) / hidden).astype(np.float32)
        residual = rng.standard_normal((tokens, hidden)).astype(np.float32)
        gate, up, down = (
            drawn(of, rows, columns, seed)
            for seed, (of, rows, columns) in enumerate(
                ((form, inner, hidden), (form, inner, hidden), (forms[1], hidden, inner))
            )
        )
        expected = np.zeros(x.shape)
        for n, row in enumerate(x.astype(np.float64)):
            both = [product(row, matrix, form, rounds) for _, matrix in (gate, up)]
            middle = activate(activation, torch.from_numpy(both[0])).numpy() * both[1]
            expected[n] = product(middle, down[1], forms[1], rounds)
        options: Any = {"activation": activation, "round_activations": rounds}
        weights = (gate[0], up[0], down[0], inner)
        found = cpu_kernels.mlp(forms, x, *weights, **options)
        size = np.abs(expected).max() + 1e-30
        assert np.abs(found - expected).max() < 1e-5 * size, (tokens, hidden, inner)
        added = cpu_kernels.mlp(forms, x, *weights, residual, scale=-0.5, **options)
        assert np.abs(added - (residual - 0.5 * expected)).max() < 1e-5 * size + 1e-6


def check(
    cpu_kernels: CpuLibrary,
    forms: tuple[Format, Format],
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    *,
    seed: int = 0,
    close: float = 3e-6,
    **options: Any,
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, hidden)) / hidden).astype(np.float32)
    # Whole numbers, so that some are equal.
    logits = rng.integers(-3, 3, (tokens, experts)).astype(np.float32)
    gate_up, gate_ups = stack(forms[0], experts, 2 * inner, hidden, seed + 1)
    down, downs = stack(forms[1], experts, hidden, inner, seed + 2)
    found = cpu_kernels.moe_dispatch(forms, x, logits, gate_up, down, inner, **options)
    options = {"round_activations": False, **options}
    expected = dispatched(forms, x, logits, gate_ups, downs, **options)
    assert np.abs(found - expected).max(initial=0) <= close * np.abs(expected).max(initial=1e-9)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dispatches_as_in_float64(cpu_kernels: CpuLibrary, form: Format) -> None:
    options: dict[str, Any] = {"top_k": 2, "normalize": True, "activation": "silu"}
    for tokens, hidden, inner, experts in ((1, 64, 40, 5), (9, 70, 33, 3)):
        check(cpu_kernels, (form, form), tokens, hidden, inner, experts, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_knows_every_activation(cpu_kernels: CpuLibrary, activation: str) -> None:
    form = FORMATS[0]
    check(cpu_kernels, (form, form), 3, 48, 32, 4, top_k=3, normalize=False, activation=activation)


def test_experts_may_have_two_formats(cpu_library: CpuLibrary) -> None:
    forms = Format("int8", 32), Format("int4", 64, True)
    check(cpu_library, forms, 20, 100, 60, 4, top_k=2, normalize=True, activation="silu")


@pytest.mark.parametrize("form", [form for form in FORMATS if form.block][::2], ids=str)
def test_rounds_what_is_multiplied_where_it_may(cpu_kernels: CpuLibrary, form: Format) -> None:
    # A number between two whole ones may go either way where the product before was rounded.
    options: dict[str, Any] = {"top_k": 2, "normalize": True, "activation": "silu"}
    for tokens in (1, 12):
        check(
            cpu_kernels,
            (form, form),
            tokens,
            64,
            128,
            3,
            close=1e-2,
            round_activations=True,
            **options,
        )


@settings(deadline=None, max_examples=25)
@given(
    form=st.sampled_from(FORMATS),
    tokens=st.integers(0, 40),
    hidden=st.integers(1, 80),
    inner=st.integers(1, 50),
    experts=st.integers(1, 9),
    data=st.data(),
)
def test_any_sizes(
    cpu_library: CpuLibrary,
    form: Format,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    data: st.DataObject,
) -> None:
    options: dict[str, Any] = {
        "top_k": data.draw(st.integers(1, experts)),
        "normalize": data.draw(st.booleans()),
        "activation": data.draw(st.sampled_from(list(ACTIVATIONS))),
    }
    check(cpu_library, (form, form), tokens, hidden, inner, experts, seed=hidden, **options)


def test_many_tokens_go_in_slices(cpu_library: CpuLibrary) -> None:
    """What 5000 tokens of 4 experts take is more than a slice holds."""
    form = FORMATS[2]
    check(
        cpu_library,
        (form, form),
        5000,
        32,
        288,
        4,
        top_k=4,
        normalize=True,
        activation="relu",
        close=1e-5,
    )


def test_tells_extreme_numbers_of_an_activation(cpu_library: CpuLibrary) -> None:
    """silu of what exp has no room for: 0 below, the number itself above."""
    form = Format("float32")
    rows = np.zeros((2, 1), np.float32)
    rows[0], rows[1] = 1, 1
    gate_up = pack_floats(form, rows)[None]
    down = pack_floats(form, np.ones((1, 1), np.float32))[None]
    for value, expected in ((-200.0, 0.0), (1e4, 1e8), (-1e30, 0.0), (89.0, 89.0**2)):
        x = np.array([[value]], np.float32)
        found = cpu_library.moe_dispatch(
            (form, form),
            x,
            np.zeros((1, 1), np.float32),
            gate_up,
            down,
            1,
            top_k=1,
            normalize=True,
            activation="silu",
        )
        assert found[0, 0] == pytest.approx(expected, rel=1e-6), value


@pytest.mark.parametrize("per_choice", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_each_choice_has_its_experts_product(
    cpu_kernels: CpuLibrary, form: Format, per_choice: bool
) -> None:
    for tokens, columns, rows, experts, top_k in ((1, 40, 30, 4, 2), (17, 65, 50, 3, 3)):
        rng = np.random.default_rng(tokens)
        shape = (tokens, top_k, columns) if per_choice else (tokens, columns)
        x = rng.standard_normal(shape).astype(np.float32)
        # An id may stand twice in a row.
        ids = rng.integers(0, experts, (tokens, top_k))
        weight, matrices = stack(form, experts, rows, columns, 5)
        found = cpu_kernels.moe_linear(form, x, ids, weight, rows, experts)
        for n in range(tokens):
            for k in range(top_k):
                given = (x[n, k] if per_choice else x[n]).astype(np.float64)
                expected = matrices[ids[n, k]].astype(np.float64) @ given
                assert np.abs(found[n, k] - expected).max() < 1e-5 * np.abs(expected).max()


def test_any_number_of_threads_gives_the_same_bits(cpu_library: CpuLibrary) -> None:
    many = CpuLibrary(cpu_library.path, threads=3)
    form, hidden, inner, experts = Format("int4", 32), 256, 300, 6
    gate_up, _ = stack(form, experts, 2 * inner, hidden, 1)
    down, _ = stack(form, experts, hidden, inner, 2)
    for tokens in (1, 200):
        rng = np.random.default_rng(tokens)
        x = rng.standard_normal((tokens, hidden)).astype(np.float32)
        logits = rng.standard_normal((tokens, experts)).astype(np.float32)
        one, other = (
            each.moe_dispatch(
                (form, form),
                x,
                logits,
                gate_up,
                down,
                inner,
                top_k=2,
                normalize=False,
                activation="gelu_tanh",
            )
            for each in (cpu_library, many)
        )
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("identity", [-1, 3])
def test_refuses_an_expert_that_there_is_not(cpu_library: CpuLibrary, identity: int) -> None:
    form = FORMATS[0]
    weight, _ = stack(form, 3, 16, 32, 0)
    ids = np.array([[0, identity]], np.int64)
    with pytest.raises(LibraryError, match="expert's id"):
        cpu_library.moe_linear(form, np.zeros((1, 32), np.float32), ids, weight, 16, 3)


def test_refuses_to_choose_more_experts_than_there_are(cpu_library: CpuLibrary) -> None:
    form = FORMATS[0]
    gate_up, _ = stack(form, 2, 32, 16, 0)
    down, _ = stack(form, 2, 16, 16, 0)
    x = np.zeros((1, 16), np.float32)
    with pytest.raises(LibraryError, match="top_k"):
        cpu_library.moe_dispatch(
            (form, form),
            x,
            np.zeros((1, 2), np.float32),
            gate_up,
            down,
            16,
            top_k=3,
            normalize=True,
            activation="silu",
        )
