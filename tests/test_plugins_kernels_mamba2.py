"""The Mamba2 kernels and their host planning, interpreted on the CPU, against plain loops."""

# The paper's matrices keep their capital names.
# ruff: noqa: N806

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from ctypes import Structure
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from activations import ACTIVATIONS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ingot.plugins import torch_kernels
from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.library import Library, LibraryError
from ingot.plugins.mamba2_scan import mamba2_scan

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary

Tensors = dict[str, torch.Tensor]
Pair = tuple[np.ndarray, np.ndarray]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NO_LIMITS = (0.0, math.inf)
# Tokens of a tile, and of a chunk on the device that the fixture acts as.
TILE, CHUNK = 64, 128

# Rounding of y to its dtype, of the number itself; the interpreter cuts bfloat16 off instead.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7}
# Of the sum of absolute terms: float32 products in 16 bits are those of two halves.
OF_TERMS = {torch.float32: 2e-6, torch.float16: 6e-5, torch.bfloat16: 6e-5}

# Numbers past float32's range are part of these tests, and NumPy warns of each.
OVERFLOWS = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _guarded_workspace() -> Iterator[None]:
    """Every workspace begins as NaN, and no call writes behind its end."""

    def run(library: Library, parameters: Structure, x: torch.Tensor) -> None:
        size = library.workspace_bytes(parameters)
        workspace = torch.full((size + 4096,), 255, dtype=torch.uint8)
        library.run(parameters, workspace.data_ptr(), size, None)
        assert bool((workspace[size:] == 255).all()), "written behind the workspace"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_kernels, "_run", run)
        yield


def arguments(
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 4,
    head_size: int = 8,
    groups: int = 2,
    states: int = 16,
    padding: str = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensors:
    """Inputs scaled like a real model's: most steps lie in 1e-3..1, so that memory is long."""
    random = np.random.default_rng(seed)
    mask = np.ones((batch, tokens))
    if padding == "left":
        # Row by row another length, the first row full.
        for row in range(batch):
            mask[row, : row * tokens // (batch + 1)] = 0
    elif padding == "holes":
        mask = (random.uniform(size=(batch, tokens)) < 0.6).astype(np.float64)
    first_step = np.exp(random.uniform(math.log(1e-3), math.log(0.5), heads))
    narrow = {
        "x": random.normal(size=(batch, tokens, heads, head_size)),
        "dt": random.normal(size=(batch, tokens, heads)),
        "B": random.normal(size=(batch, tokens, groups, states)),
        "C": random.normal(size=(batch, tokens, groups, states)),
        "mask": mask,
    }
    wide = {
        "A": -random.uniform(1, 16, size=heads),
        "D": random.normal(size=heads),
        # The inverse of softplus, as the reference implementation starts dt_bias.
        "dt_bias": first_step + np.log(-np.expm1(-first_step)),
        "state": random.normal(size=(batch, heads, head_size, states)),
    }
    return {
        **{name: torch.from_numpy(array).to(dtype) for name, array in narrow.items()},
        **{name: torch.from_numpy(array).float() for name, array in wide.items()},
    }


def scan_loop(a: Tensors, limits: tuple[float, float] = NO_LIMITS) -> Pair:
    """The recurrence, token by token and head by head, in float64 and without torch."""
    v = {name: tensor.double().numpy() for name, tensor in a.items()}
    tokens, heads = v["dt"].shape[1:]
    heads_of_group = heads // v["B"].shape[2]
    S, y = v["state"].copy(), np.zeros(v["x"].shape)
    for t in range(tokens):
        for h in range(heads):
            B, C = v["B"][:, t, h // heads_of_group], v["C"][:, t, h // heads_of_group]
            step = np.clip(np.logaddexp(0, v["dt"][:, t, h] + v["dt_bias"][h]), *limits)
            step = step * v["mask"][:, t]
            read = (step[:, None] * v["x"][:, t, h])[:, :, None] * B[:, None, :]
            S[:, h] = np.exp(step * v["A"][h])[:, None, None] * S[:, h] + read
            y[:, t, h] = (S[:, h] * C[:, None, :]).sum(-1) + v["D"][h] * v["x"][:, t, h]
    return y, S


def scan(
    device: InterpretedLibrary,
    a: Tensors,
    limits: tuple[float, float] = NO_LIMITS,
    new_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    device.launches.clear()
    tensors = [a[each.name] for each in mamba2_scan.inputs]
    y, state = torch_kernels.call(mamba2_scan, device, *tensors, 1, *limits, new_state=new_state)
    return y, state


def launched(device: InterpretedLibrary) -> list[str]:
    return [launch.form for launch in device.launches]


def chunk_forms(dtype: torch.dtype, suffix: str, ending: str = "") -> list[str]:
    name = NAMES[dtype]
    return [
        f"mamba2_times_{name}",
        f"mamba2_states_{name}_{suffix}{ending}",
        f"mamba2_carry_{suffix}",
        f"mamba2_products_{name}_{suffix}",
        f"mamba2_outputs_{name}_{suffix}{ending}",
    ]


def assert_near(actual: torch.Tensor, expected: np.ndarray, bound: np.ndarray) -> None:
    found = actual.double().numpy()
    assert found.shape == expected.shape
    # The smallest float16 is what y may lose. Not any(>), which is false for NaN too.
    error = np.abs(found - expected)
    assert np.all(error <= bound + 2**-24), float((error / (bound + 2**-24)).max())


def assert_scan(
    y: torch.Tensor,
    new_state: torch.Tensor,
    a: Tensors,
    limits: tuple[float, float] = NO_LIMITS,
    kept: Any = slice(None),
) -> None:
    """y at the tokens ``kept`` and the state are those of ``a``."""
    dtype = a["x"].dtype
    assert y.dtype == dtype and new_state.dtype == torch.float32
    expected_y, expected_state = scan_loop(a, limits)
    positive = {name: a[name].abs() for name in ("x", "B", "C", "D", "state")}
    y_terms, state_terms = scan_loop({**a, **positive}, limits)
    y_bound = ROUNDING[dtype] * np.abs(expected_y) + OF_TERMS[dtype] * y_terms
    assert_near(y[:, kept], expected_y[:, kept], y_bound[:, kept])
    assert_near(new_state, expected_state, OF_TERMS[dtype] * state_terms)


def assert_right(
    device: InterpretedLibrary, a: Tensors, limits: tuple[float, float] = NO_LIMITS
) -> None:
    assert_scan(*scan(device, a, limits), a, limits)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    ("head_size", "states", "form"), [(16, 32, "n64"), (16, 80, "n128"), (24, 10, "any")]
)
def test_one_token(
    device: InterpretedLibrary, dtype: torch.dtype, head_size: int, states: int, form: str
) -> None:
    assert_right(device, arguments(1, head_size=head_size, states=states, dtype=dtype))
    assert launched(device) == [f"mamba2_step_{NAMES[dtype]}_{form}"]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("tokens", [2, TILE - 1, TILE, TILE + 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_chunks(device: InterpretedLibrary, dtype: torch.dtype, tokens: int) -> None:
    # The suffix and the groups change with the tokens, so that each meets each.
    aligned = tokens % 2 == 1
    a = arguments(
        tokens,
        batch=1 if tokens > CHUNK else 2,
        heads=2,
        head_size=16 if aligned else 5,
        groups=1 if tokens == CHUNK + 1 else 2,
        states=16 if aligned else 7,
        padding="holes" if tokens == TILE else "none",
        dtype=dtype,
        seed=tokens,
    )
    assert_right(device, a)
    # The device is a Hopper card.
    ending = "_b64w8s2" if aligned and dtype != torch.float32 else ""
    assert launched(device) == chunk_forms(dtype, "aligned" if aligned else "any", ending)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 3, 17, 63, 64, 65, 80, 130]),
    heads_of_group=st.integers(1, 3),
    groups=st.integers(1, 2),
    head_size=st.integers(1, 20),
    states=st.integers(1, 20),
    batch=st.integers(1, 2),
    padding=st.sampled_from(["none", "left", "holes"]),
    dtype=st.sampled_from(DTYPES),
    limits=st.sampled_from([NO_LIMITS, (0.01, 0.2), (0.0, 0.05)]),
    seed=st.integers(0, 2**20),
)
def test_any_sizes(
    device: InterpretedLibrary,
    tokens: int,
    heads_of_group: int,
    groups: int,
    head_size: int,
    states: int,
    batch: int,
    padding: str,
    dtype: torch.dtype,
    limits: tuple[float, float],
    seed: int,
) -> None:
    a = arguments(
        tokens,
        batch=batch,
        heads=heads_of_group * groups,
        head_size=head_size,
        groups=groups,
        states=states,
        padding=padding,
        dtype=dtype,
        seed=seed,
    )
    assert_right(device, a, limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("tokens", [1, 66])
@pytest.mark.parametrize(("head_size", "states"), [(256, 256), (65, 130), (1, 1)])
def test_sizes_of_several_tiles(
    device: InterpretedLibrary, dtype: torch.dtype, tokens: int, head_size: int, states: int
) -> None:
    a = arguments(
        tokens, batch=1, heads=2, head_size=head_size, groups=1, states=states, dtype=dtype
    )
    assert_right(device, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_chunk_length_of_each_device(
    device: InterpretedLibrary,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    capability: int,
) -> None:
    chunk = 64 if dtype == torch.float32 else 256 if capability == 89 else 128
    tokens = 260
    a = arguments(tokens, batch=1, heads=2, head_size=4, states=4, dtype=dtype)
    device.set_capability(capability)
    try:
        if chunk == 256:
            assert_right(device, a)
        else:
            # Chunks of these lengths are computed above; here the plan alone is looked at.
            monkeypatch.setattr(device, "launch", lambda *_: None)
            scan(device, a)
    finally:
        device.set_capability(90)
    times, states, _, products, outputs = (launch.grid for launch in device.launches)
    assert times == (1, math.ceil(tokens / chunk), 1)
    assert states == (2, 1, math.ceil(tokens / chunk))
    assert products == (2, 5, chunk // TILE)
    assert outputs == (2, 1, 5)


def test_a_short_prompt_is_one_short_chunk(device: InterpretedLibrary) -> None:
    scan(device, arguments(5, dtype=torch.bfloat16))
    assert device.launches[3].grid == (4, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("first", "second"), [(1, 1), (3, 1), (70, 67), (0, 4)])
def test_the_state_carries_a_sequence_on(
    device: InterpretedLibrary, dtype: torch.dtype, first: int, second: int
) -> None:
    a = arguments(first + second, dtype=dtype, padding="left")
    of_tokens = ("x", "dt", "B", "C", "mask")
    begin = {**a, **{name: a[name][:, :first] for name in of_tokens}}
    end = {**a, **{name: a[name][:, first:] for name in of_tokens}}
    y_begin, end["state"] = scan(device, begin)
    y_end, state = scan(device, end)
    assert_scan(torch.cat([y_begin, y_end], 1), state, a)


@pytest.fixture
def tunable(device: InterpretedLibrary) -> Iterator[InterpretedLibrary]:
    yield device
    device.tune()


def parts(device: InterpretedLibrary) -> list[tuple[int, int]]:
    """Chunks and rows of each part of the last call."""
    grids = [each.grid for each in device.launches if each.form.startswith("mamba2_times_")]
    return [(chunks, rows) for _, chunks, rows in grids]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_parts_of_a_call_are_the_whole_to_the_bit(
    tunable: InterpretedLibrary, dtype: torch.dtype
) -> None:
    a = arguments(
        131, batch=3, heads=1, groups=1, head_size=16, padding="left", dtype=dtype, seed=4
    )
    # Rows begin between two multiples of 16 bytes.
    assert a["mask"][1:].data_ptr() % 16
    tunable.tune(chunk=64)
    y, state = scan(tunable, a)
    assert parts(tunable) == [(3, 3)]
    # Of a row in a chunk: three times its steps, the state, the products.
    one = 3 * 64 * 4 + 16 * 16 * 4 + 64 * 64 * 4
    for room, expected in (
        (9 * one, [(3, 3)]),
        (9 * one - 256, [(3, 2), (3, 1)]),
        (5 * one, [(3, 1)] * 3),
        (2 * one, [(2, 1), (1, 1)] * 3),
        # A single chunk is the least, whatever it takes.
        (256, [(1, 1)] * 9),
    ):
        tunable.tune(chunk=64, scan_bytes=room)
        # In place for every other one.
        in_place = a["state"].clone() if len(expected) % 2 == 0 else None
        source = a if in_place is None else {**a, "state": in_place}
        found, new_state = scan(tunable, source, new_state=in_place)
        assert parts(tunable) == expected
        assert torch.equal(found, y) and torch.equal(new_state, state)


def test_parts_are_nearly_equal(tunable: InterpretedLibrary) -> None:
    a = arguments(2, batch=5, heads=1, groups=1, head_size=1, states=1)
    # Four rows' steps and products; the states of all are within one piece.
    tunable.tune(scan_bytes=4 * (3 * 64 * 4 + 64 * 64 * 4) + 256)
    assert_scan(*scan(tunable, a), a)
    assert parts(tunable) == [(1, 3), (1, 2)]


def test_parts_of_odd_sizes_are_the_whole_to_the_bit(tunable: InterpretedLibrary) -> None:
    a = arguments(67, heads=2, head_size=5, groups=2, states=7, dtype=torch.float16)
    tunable.tune(chunk=64)
    y, state = scan(tunable, a)
    assert_scan(y, state, a)
    tunable.tune(chunk=64, scan_bytes=256)
    found, new_state = scan(tunable, a)
    assert parts(tunable) == [(1, 1)] * 4
    assert torch.equal(found, y) and torch.equal(new_state, state)


@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_new_state_may_be_state(device: InterpretedLibrary, tokens: int) -> None:
    a = arguments(tokens)
    y, expected = scan(device, a)
    y_in_place, _ = scan(device, a, new_state=a["state"])
    assert torch.equal(a["state"], expected)
    assert torch.equal(y_in_place, y)


@pytest.mark.parametrize("groups", [1, 2])
def test_without_tokens_the_state_stays(device: InterpretedLibrary, groups: int) -> None:
    a = arguments(0, groups=groups)
    y, new_state = scan(device, a)
    assert y.shape == (2, 0, 4, 8)
    assert torch.equal(new_state, a["state"])


def test_without_rows_nothing_runs(device: InterpretedLibrary) -> None:
    for tokens in (0, 1, 3):
        scan(device, arguments(tokens, batch=0))
        assert device.launches == []


@OVERFLOWS
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("tokens", [1, 66])
def test_padding_holds_any_finite_numbers(
    device: InterpretedLibrary, dtype: torch.dtype, tokens: int
) -> None:
    a = arguments(tokens, dtype=dtype)
    padding = slice(0, 1) if tokens == 1 else slice(10, 20)
    a["mask"][:, padding] = 0
    dirty = {**a}
    for name in ("x", "B", "C", "dt"):
        dirty[name] = a[name].clone()
        dirty[name][:, padding] = torch.finfo(dtype).max
    y, new_state = scan(device, dirty)
    assert_scan(y, new_state, a, kept=a["mask"][0].bool().numpy())


def test_a_padded_row_is_what_it_is_alone(device: InterpretedLibrary) -> None:
    alone = arguments(40, batch=1)
    padded = {**alone}
    for name in ("x", "dt", "B", "C"):
        padded[name] = torch.cat([torch.ones_like(alone[name]), alone[name]], 1)
    padded["mask"] = torch.cat([torch.zeros(1, 40), torch.ones(1, 40)], 1)
    y, new_state = scan(device, padded)
    assert_scan(y[:, 40:], new_state, alone)


@OVERFLOWS
@pytest.mark.parametrize("tokens", [1, 140])
def test_steps_and_decays_of_any_size(device: InterpretedLibrary, tokens: int) -> None:
    a = arguments(tokens)
    # softplus is linear above; below, 1 + exp has no digit left of the step.
    a["dt"] = torch.linspace(-30, 300, a["dt"].numel()).reshape(a["dt"].shape)
    a["A"] = torch.tensor([-1e-3, -1.0, -1e4, -3e38])
    a["dt_bias"].zero_()
    assert_right(device, a)


@pytest.mark.parametrize("dt", [-20.0, -9.0, 0.0, 19.9, 20.1])
def test_the_step_keeps_its_digits(device: InterpretedLibrary, dt: float) -> None:
    a = arguments(1, batch=1, heads=1, groups=1, head_size=1, states=1)
    for name, value in {"dt": dt, "dt_bias": 0.0, "A": 0.0, "state": 0.0}.items():
        a[name].fill_(value)
    a["x"].fill_(1)
    a["B"].fill_(1)
    _, new_state = scan(device, a)
    assert new_state.item() == pytest.approx(math.log1p(math.exp(dt)), rel=2e-6)


def test_decays_after_large_ones_keep_their_digits(device: InterpretedLibrary) -> None:
    """Sums of dt' A reach thousands here; a decay is the exponential of a small difference."""
    a = arguments(128, batch=1, heads=1, groups=1)
    a["A"].fill_(-1)
    a["dt_bias"].zero_()
    a["dt"].fill_(-4)
    a["dt"][:, :40] = 150
    assert_right(device, a)


def test_a_growing_state_is_no_special_case(device: InterpretedLibrary) -> None:
    a = arguments(100)
    a["A"] = -a["A"] / 100
    assert_right(device, a)


@pytest.mark.parametrize("tokens", [1, 70])
def test_nan_is_not_hidden(device: InterpretedLibrary, tokens: int) -> None:
    a = arguments(tokens, batch=1, heads=2)
    a["dt"][0, 0, 1] = math.nan
    y, new_state = scan(device, a, (0.1, 0.5))
    assert not y[:, :, 0].isnan().any() and y[:, :, 1].isnan().all()
    assert not new_state[:, 0].isnan().any() and new_state[:, 1].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 7}, "Mamba2Scan has no dtype 7; use float32 (0), float16 (1) or bfloat16 (2)."),
        (
            {"batch": -1},
            "Mamba2Scan got batch -1 and tokens 3; it takes up to 65535 and 1073741824",
        ),
        ({"batch": 65536}, "Mamba2Scan got batch 65536 and tokens 3; it takes up to 65535 and"),
        ({"heads": 0}, "Mamba2Scan got 0 heads; it takes 1 to 16384."),
        ({"states": 257}, "got head size 8 and state size 257; it takes 1 to 256 of each."),
        ({"head_size": 0}, "got head size 0 and state size 16; it takes 1 to 256 of each."),
        ({"groups": 3}, "got 3 groups for 4 heads; the heads must be a multiple of the groups."),
        ({"dt_min": 2.0}, "got dt_min 2.000000 above dt_max 1.000000; exchange them."),
        ({"dt_min": math.nan}, "Mamba2Scan got dt_min nan"),
        (
            {"tokens": 2**31 - 1},
            "2147483647; it takes up to 65535 and 1073741824, so split what is",
        ),
        ({"new_state": None}, "Mamba2Scan got null for new_state; pass the address of a device"),
        ({"mask": 4}, "Mamba2Scan got mask at an address that is no multiple of 16 bytes"),
        ({}, "Mamba2Scan got null for workspace"),
    ],
)
def test_refusals(device: InterpretedLibrary, change: dict[str, Any], message: str) -> None:
    pointers = dict.fromkeys(
        ("x", "dt", "a", "b", "c", "d", "dt_bias", "state", "mask", "y", "new_state"), 16
    )
    sizes = {"batch": 2, "tokens": 3, "heads": 4, "head_size": 8, "groups": 2, "states": 16}
    parameters = mamba2_scan.structure(
        **{**pointers, **sizes, "dt_min": 0.0, "dt_max": 1.0, **change}
    )
    with pytest.raises(LibraryError) as caught:
        device.run(parameters, None, 0, None)
    assert message in str(caught.value)


def conv_arguments(
    batch: int, tokens: int, channels: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    x, state = normal(batch, tokens, channels), normal(batch, channels, width - 1)
    return x, state, normal(channels, 1, width), normal(channels)


def conv_loop(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> Pair:
    """Token by token, in float64 and without torch."""
    rows = np.concatenate([state.double().numpy().swapaxes(1, 2), x.double().numpy()], 1)
    taps = weight.double().numpy()[:, 0]
    width = taps.shape[1]
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        y[:, t] = np.einsum("bwc,cw->bc", rows[:, t : t + width], taps)
    y += 0 if bias is None else bias.double().numpy()
    y = np.vectorize(ACTIVATIONS[activation], otypes=[np.float64])(y)
    return y, rows[:, rows.shape[1] - (width - 1) :].swapaxes(1, 2)


def assert_conv_right(
    device: InterpretedLibrary,
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> None:
    device.launches.clear()
    y, new_state = torch_kernels.call(causal_conv, device, x, state, weight, bias, activation)
    expected_y, expected_state = conv_loop(x, state, weight, bias, activation)
    assert y.dtype == new_state.dtype == x.dtype
    positive_bias = None if bias is None else bias.abs()
    terms, _ = conv_loop(x.abs(), state.abs(), weight.abs(), positive_bias, "identity")
    assert_near(y, expected_y, ROUNDING[x.dtype] * np.abs(expected_y) + 2e-6 * terms)
    assert np.array_equal(new_state.double().numpy(), expected_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 19])
def test_conv_activations(
    device: InterpretedLibrary, dtype: torch.dtype, activation: str, tokens: int
) -> None:
    assert_conv_right(device, *conv_arguments(2, tokens, 16, 4, dtype), activation)
    name = "one" if tokens == 1 else "many"
    assert launched(device) == [f"mamba2_conv_{NAMES[dtype]}_{name}_w4"]


@pytest.mark.parametrize(
    "tokens", [0, 1, 2, 9, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 7))]
)
@pytest.mark.parametrize("width", range(1, 9))
def test_conv_widths(device: InterpretedLibrary, width: int, tokens: int) -> None:
    channels = 16 if width % 2 else 10
    x, state, weight, bias = conv_arguments(2, tokens, channels, width, torch.float32, width)
    assert_conv_right(device, x, state, weight, bias if tokens % 2 else None, "silu")
    suffix = "w4" if width in (1, 3) else "any"
    assert launched(device) == [f"mamba2_conv_fp32_{'many' if tokens > 1 else 'one'}_{suffix}"]


@OVERFLOWS
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(0, 40),
    channels=st.one_of(st.integers(1, 300), st.sampled_from([16, 128, 144])),
    width=st.integers(1, 8),
    biased=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
)
def test_conv_of_any_sizes(
    device: InterpretedLibrary,
    batch: int,
    tokens: int,
    channels: int,
    width: int,
    biased: bool,
    activation: str,
    dtype: torch.dtype,
) -> None:
    x, state, weight, bias = conv_arguments(batch, tokens, channels, width, dtype)
    assert_conv_right(device, x, state, weight, bias if biased else None, activation)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_conv_in_place_token_by_token_equals_one_call(
    device: InterpretedLibrary, width: int
) -> None:
    x, state, weight, bias = conv_arguments(2, 11, 32, width, torch.bfloat16)
    y, new_state = torch_kernels.call(causal_conv, device, x, state, weight, bias, "silu")
    steps = []
    for x_t in torch.split(x, 1, dim=1):
        rest = (x_t, state, weight, bias, "silu")
        steps.append(torch_kernels.call(causal_conv, device, *rest, new_state=state)[0])
    assert torch.equal(torch.cat(steps, 1), y)
    assert torch.equal(state, new_state)


@OVERFLOWS
def test_conv_of_large_numbers(device: InterpretedLibrary) -> None:
    for activation in ACTIVATIONS:
        x, state, weight, bias = conv_arguments(1, 3, 16, 1, torch.float32)
        x[0, 0], x[0, 1], x[0, 2] = 1e30, -1e30, math.nan
        y, _ = torch_kernels.call(
            causal_conv, device, x, state, weight.fill_(1), bias.zero_(), activation
        )
        low = -1e30 if activation == "identity" else 0.0
        assert torch.equal(y[0, 0], torch.full((16,), 1e30))
        assert torch.equal(y[0, 1], torch.full((16,), low)), activation
        assert y[0, 2].isnan().all(), activation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 3}, "CausalConv has no dtype 3; use float32 (0), float16 (1) or bfloat16 (2)."),
        ({"activation": 9}, "CausalConv has no activation 9; use one of ingot_activation, 0 to 4."),
        (
            {"tokens": -1},
            "CausalConv got batch 2 and tokens -1; it takes up to 65535 and 1073741824",
        ),
        ({"channels": 2**30}, "CausalConv got 1073741824 channels; it takes 1 to 67108864."),
        ({"width": 9}, "CausalConv got width 9; it takes 1 to 8."),
        ({"weight": None}, "CausalConv got null for weight; pass the address of a device tensor."),
        ({"state": 8}, "CausalConv got state at an address that is no multiple of 16 bytes"),
        ({"new_state": 16}, "got new_state at the address of state for 3 tokens; give it memory"),
    ],
)
def test_conv_refusals(device: InterpretedLibrary, change: dict[str, Any], message: str) -> None:
    pointers = {"x": 16, "state": 16, "weight": 16, "bias": None, "y": 16, "new_state": 32}
    sizes = {"batch": 2, "tokens": 3, "channels": 16, "width": 4}
    with pytest.raises(LibraryError) as caught:
        device.run(causal_conv.structure(**{**pointers, **sizes, **change}), None, 0, None)
    assert message in str(caught.value)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_forms_are_those_of_the_device(device: InterpretedLibrary, capability: int) -> None:
    a = arguments(70, batch=1, heads=2, head_size=16, states=16, dtype=torch.bfloat16)
    device.set_capability(capability)
    try:
        assert_right(device, a)
    finally:
        device.set_capability(90)
    expected = chunk_forms(torch.bfloat16, "aligned", "_b64w8s2" if capability == 90 else "")
    assert launched(device) == expected


def test_every_form_is_reached(device: InterpretedLibrary) -> None:
    reached = set()
    # Those of the cards with another pipeline for their aligned forms.
    for capability in (80, 90):
        device.set_capability(capability)
        for dtype in (torch.float16, torch.bfloat16):
            scan(device, arguments(2, batch=1, heads=2, head_size=16, states=16, dtype=dtype))
            reached |= set(launched(device))
    for dtype in DTYPES:
        for tokens in (1, 2):
            for head_size, states in ((16, 16), (16, 80), (3, 3)):
                a = arguments(
                    tokens, batch=1, heads=2, head_size=head_size, states=states, dtype=dtype
                )
                scan(device, a)
                reached |= set(launched(device))
            for width in (4, 5):
                device.launches.clear()
                torch_kernels.call(
                    causal_conv, device, *conv_arguments(1, tokens, 16, width, dtype), "silu"
                )
                reached |= set(launched(device))
    from ingot.plugins.kernels import mamba2

    assert reached == {form.name for form in mamba2.forms()}


def scan_parameters(**sizes: Any) -> Structure:
    """A call with addresses that are read by no kernel."""
    names = ("x", "dt", "a", "b", "c", "d", "dt_bias", "state", "mask", "y", "new_state")
    return mamba2_scan.structure(
        **{"dtype": 2, "dt_max": 1.0, **dict.fromkeys(names, 4096), **sizes}
    )


def needed(device: InterpretedLibrary, parameters: Structure) -> int:
    """What the refusal of an empty workspace says that a call needs."""
    with pytest.raises(LibraryError) as caught:
        device.run(parameters, 4096, 0, None)
    found = re.fullmatch(
        r"mamba2_scan needs (\d+) bytes of workspace for this call and was given 0; "
        r"pass as many as ingot_mamba2_scan_workspace says\.",
        str(caught.value),
    )
    assert found is not None, caught.value
    return int(found[1])


def test_a_refused_size_is_no_workspace_of_0(device: InterpretedLibrary) -> None:
    with pytest.raises(LibraryError, match="it takes 1 to 256 of each"):
        device.workspace_bytes(
            scan_parameters(batch=1, tokens=4, heads=1, head_size=1, groups=1, states=257)
        )


MAMBA2 = {"heads": 80, "head_size": 64, "groups": 1, "states": 128}
CODESTRAL = {"heads": 128, "head_size": 64, "groups": 8, "states": 128}


@pytest.mark.parametrize("model", [MAMBA2, CODESTRAL], ids=["mamba2-2.7b", "codestral"])
@pytest.mark.parametrize(("batch", "tokens"), [(4, 4096), (16, 8192), (1, 1 << 20)])
def test_the_workspace_of_real_models_is_bounded(
    device: InterpretedLibrary, model: dict[str, int], batch: int, tokens: int
) -> None:
    call = scan_parameters(batch=batch, tokens=tokens, **model)
    assert device.workspace_bytes(call) <= 512 * 2**20
    # What one row of chunks of 128 tokens takes, in float32.
    heads, groups = model["heads"], model["groups"]
    row = tokens * (3 * heads + heads * 64 + groups * 128) * 4
    if row <= 512 * 2**20:
        assert needed(device, call) % row == 0


@given(
    batch=st.integers(1, 70),
    rows_less=st.one_of(st.integers(0, 3), st.integers(0, 70)),
    tokens=st.one_of(st.integers(2, 600), st.integers(2, 2**21)),
    tokens_less=st.one_of(st.integers(0, 300), st.integers(0, 2**21)),
    heads_of_group=st.integers(1, 40),
    groups=st.integers(1, 8),
    head_size=st.integers(1, 128),
    states=st.integers(1, 256),
    dtype=st.sampled_from([0, 1, 2]),
    capability=st.sampled_from([80, 86, 89, 90, 100, 120]),
    chunk=st.sampled_from([0, 64, 192, 512]),
    scan_bytes=st.sampled_from([0, 256, 2**20, 2**26]),
)
@settings(max_examples=300, deadline=None)
# Long chunks, which only this device has, take more where heads are few and groups many.
@example(2, 0, 256, 0, 1, 8, 1, 1, 2, 89, 0, 0)
def test_a_workspace_is_enough_for_smaller_calls_on_another_device(
    device: InterpretedLibrary,
    batch: int,
    rows_less: int,
    tokens: int,
    tokens_less: int,
    heads_of_group: int,
    groups: int,
    head_size: int,
    states: int,
    dtype: int,
    capability: int,
    chunk: int,
    scan_bytes: int,
) -> None:
    same = {
        "heads": heads_of_group * groups,
        "head_size": head_size,
        "groups": groups,
        "states": states,
        "dtype": dtype,
    }
    rows, length = max(1, batch - rows_less), max(2, tokens - tokens_less)
    smaller = scan_parameters(batch=rows, tokens=length, **same)
    try:
        device.tune(chunk=chunk, scan_bytes=scan_bytes)
        device.set_capability(90)
        bound = device.workspace_bytes(scan_parameters(batch=batch, tokens=tokens, **same))
        assert bound >= device.workspace_bytes(smaller)
        device.set_capability(capability)
        assert bound >= needed(device, smaller)
    finally:
        device.tune()
        device.set_capability(90)


@pytest.mark.parametrize("sizes", [(24, 64, 1, 128), (4, 64, 4, 16), (8, 16, 2, 256)])
def test_a_workspace_is_enough_for_every_device_and_fewer_tokens(
    device: InterpretedLibrary, sizes: tuple[int, int, int, int]
) -> None:
    """TensorRT reserves it where an engine is built, for the most tokens of a profile."""
    heads, head_size, groups, states = sizes
    found: list[int] = []
    try:
        for tokens in (2, 63, 64, 65, 128, 129, 255, 300, 512, 1000, 4096):
            parameters = mamba2_scan.structure(
                dtype=2,
                batch=2,
                tokens=tokens,
                heads=heads,
                head_size=head_size,
                groups=groups,
                states=states,
                dt_max=1.0,
            )
            of_devices = set()
            for capability in (80, 86, 89, 90, 120):
                device.set_capability(capability)
                of_devices.add(device.workspace_bytes(parameters))
            assert len(of_devices) == 1
            found += of_devices
    finally:
        device.set_capability(90)
    assert found == sorted(found) and found[0] > 0
