"""The MoE kernels and their host planning, interpreted on the CPU, against plain loops."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from ctypes import Structure
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from activations import ACTIVATIONS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ingot.plugins import torch_kernels
from ingot.plugins.library import LibraryError
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear

if TYPE_CHECKING:
    from ingot.plugins.kernels.interpret import InterpretedLibrary

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def route_loop(logits: np.ndarray, top_k: int, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights ``[N, K]`` in float64; Python's sort keeps the order of equals."""
    tokens, experts = logits.shape
    ids = np.zeros((tokens, top_k), dtype=np.int64)
    weights = np.zeros((tokens, top_k))
    for n, row in enumerate(logits.astype(np.float64)):
        exps = np.exp(row - row.max())
        ids[n] = sorted(range(experts), key=lambda e: -row[e])[:top_k]
        weights[n] = (exps / exps.sum())[ids[n]]
        if normalize:
            weights[n] /= weights[n].sum()
    return ids, weights


def dispatch_loop(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    normalize: bool,
    activation: str,
) -> np.ndarray:
    """The formula, token by token and choice by choice, in float64 and without torch."""
    tokens, both, back = (each.double().numpy() for each in (x, gate_up, down))
    act = np.vectorize(ACTIVATIONS[activation], otypes=[np.float64])
    ids, weights = route_loop(logits.numpy(), top_k, normalize)
    y = np.zeros(tokens.shape)
    for n, row in enumerate(tokens):
        for expert, weight in zip(ids[n], weights[n], strict=True):
            gate, up = np.split(both[expert] @ row, 2)
            y[n] += weight * (back[expert] @ (act(gate) * up))
    return y


def linear_loop(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """The formula, choice by choice, in float64 and without torch."""
    rows, matrices = x.double().numpy(), weight.double().numpy()
    y = np.zeros((*ids.shape, weight.shape[1]))
    for n, of_token in enumerate(ids.tolist()):
        for k, expert in enumerate(of_token):
            if 0 <= expert < len(matrices):
                y[n, k] = matrices[expert] @ (rows[n] if x.ndim == 2 else rows[n, k])
    return y


def dispatch_arguments(
    tokens: int,
    experts: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    # Multiples of a quarter: equal logits are frequent, and which of them win is visible in y.
    logits = (4 * normal(tokens, experts)).round() / 4
    gate_up = normal(experts, 2 * intermediate, hidden) / math.sqrt(hidden)
    down = normal(experts, hidden, intermediate) / math.sqrt(intermediate)
    return normal(tokens, hidden).to(dtype), logits, gate_up.to(dtype), down.to(dtype)


def linear_arguments(
    tokens: int,
    top_k: int,
    experts: int,
    in_features: int,
    out_features: int,
    *,
    per_choice: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    beyond: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids and weight; ids reach ``beyond`` further than the experts, on both sides."""
    random = torch.Generator().manual_seed(seed)
    shape = (tokens, top_k, in_features) if per_choice else (tokens, in_features)
    x = torch.randn(shape, generator=random).to(dtype)
    ids = torch.randint(-beyond, experts + beyond, (tokens, top_k), generator=random)
    weight = torch.randn(experts, out_features, in_features, generator=random)
    return x, ids, (weight / math.sqrt(in_features)).to(dtype)


def tolerance(dtype: torch.dtype) -> float:
    """A few roundings to the dtype, of numbers about 1."""
    return 4 * torch.finfo(dtype).eps


def assert_close(found: torch.Tensor, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    limit = tolerance(found.dtype) * max(1.0, np.abs(wanted).max(initial=0.0))
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=0, atol=limit)


def check_dispatch(
    device: InterpretedLibrary,
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    top_k: int,
    normalize: bool = False,
    activation: str = "silu",
) -> list[str]:
    """Compare with the loop; returns the forms that ran."""
    device.launches.clear()
    found = torch_kernels.call(moe_dispatch, device, *arguments, top_k, normalize, activation)
    assert found.dtype == arguments[0].dtype
    assert_close(found, dispatch_loop(*arguments, top_k, normalize, activation))
    return [launched.form for launched in device.launches]


def check_linear(
    device: InterpretedLibrary, x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor
) -> list[str]:
    """Compare with the loop; returns the forms that ran."""
    device.launches.clear()
    found = torch_kernels.call(moe_linear, device, x, ids, weight)
    assert found.dtype == x.dtype
    assert_close(found, linear_loop(x, ids, weight))
    return [launched.form for launched in device.launches]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_takes_matrix_vector_products(
    device: InterpretedLibrary, dtype: torch.dtype
) -> None:
    forms = check_dispatch(device, dispatch_arguments(1, 8, 32, 24, dtype), 3)
    end = NAMES[dtype]
    assert forms == ["moe_route_e64", f"moe_gate_up_one_n4_{end}", f"moe_down_one_n4_{end}"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_search_their_choices(device: InterpretedLibrary, dtype: torch.dtype) -> None:
    forms = check_dispatch(device, dispatch_arguments(5, 6, 32, 40, dtype), 2, normalize=True)
    end = NAMES[dtype]
    assert forms == [
        "moe_route_e64",
        f"moe_gate_up_m16n32_{end}",
        f"moe_down_m16n32_{end}",
        f"moe_combine_{end}",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_are_sorted_by_expert(device: InterpretedLibrary, dtype: torch.dtype) -> None:
    forms = check_dispatch(device, dispatch_arguments(33, 6, 32, 40, dtype), 2)
    end, tile = NAMES[dtype], "m64n32" if dtype == torch.float32 else "m64n64"
    assert forms == [
        "moe_route_e64",
        "moe_group_i32",
        f"moe_gate_up_{tile}_{end}",
        f"moe_down_{tile}_{end}",
        f"moe_combine_{end}",
    ]


@pytest.mark.parametrize(
    ("capability", "dtype", "tile"),
    [
        (80, torch.bfloat16, "m128n64"),
        (86, torch.float16, "m128n64"),
        (90, torch.bfloat16, "m128n128"),
        (100, torch.bfloat16, "m128n128"),
        (120, torch.bfloat16, "m128n64"),
        (90, torch.float32, "m64n32"),
    ],
)
def test_experts_with_many_tokens_take_tall_tiles(
    device: InterpretedLibrary, capability: int, dtype: torch.dtype, tile: str
) -> None:
    # 150 and 50 choices of the two experts: several tiles of the first, none of them full.
    x, _, gate_up, down = dispatch_arguments(200, 2, 16, 24, dtype)
    logits = torch.zeros(200, 2)
    logits[::4, 1] = 1.0
    device.set_capability(capability)
    try:
        forms = check_dispatch(device, (x, logits, gate_up, down), 1)
    finally:
        device.set_capability(90)
    assert f"moe_gate_up_{tile}_{NAMES[dtype]}" in forms
    assert f"moe_down_{tile}_{NAMES[dtype]}" in forms


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device: InterpretedLibrary, tokens: int, activation: str) -> None:
    check_dispatch(device, dispatch_arguments(tokens, 4, 16, 16), 2, True, activation)


@pytest.mark.parametrize("tokens", [1, 2, 20])
@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (17, 5), (36, 44), (130, 68)])
def test_float32_takes_any_size(
    device: InterpretedLibrary, tokens: int, hidden: int, intermediate: int
) -> None:
    forms = check_dispatch(device, dispatch_arguments(tokens, 4, hidden, intermediate), 2)
    odd = hidden % 4 != 0 or intermediate % 4 != 0
    assert all(form.endswith("_fp32_odd" if odd else "_fp32") for form in forms if "_m" in form[3:])


@pytest.mark.parametrize("tokens", [1, 4, 17])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 5), (65, 3)])
def test_numbers_of_experts(
    device: InterpretedLibrary, tokens: int, experts: int, top_k: int
) -> None:
    forms = check_dispatch(device, dispatch_arguments(tokens, experts, 16, 8), top_k)
    assert forms[0] == ("moe_route_e64" if experts <= 64 else "moe_route_e256")


def test_the_most_experts_and_choices(device: InterpretedLibrary) -> None:
    forms = check_dispatch(device, dispatch_arguments(1, 1024, 8, 8), 64, normalize=True)
    assert forms[0] == "moe_route_e1024"


@pytest.mark.parametrize("tokens", [1, 6, 30])
def test_equal_logits_go_to_the_lower_ids(device: InterpretedLibrary, tokens: int) -> None:
    x, _, gate_up, down = dispatch_arguments(tokens, 9, 16, 16)
    check_dispatch(device, (x, torch.zeros(tokens, 9), gate_up, down), 4)


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_all_tokens_may_choose_one_expert(device: InterpretedLibrary, tokens: int) -> None:
    x, logits, gate_up, down = dispatch_arguments(tokens, 8, 16, 16)
    logits[:, 5] = 50.0
    check_dispatch(device, (x, logits, gate_up, down), 1)


def test_no_tokens_are_no_launch(device: InterpretedLibrary) -> None:
    assert check_dispatch(device, dispatch_arguments(0, 4, 16, 16), 2) == []
    assert check_linear(device, *linear_arguments(0, 2, 4, 16, 16)) == []


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_minus_infinity_masks_an_expert(device: InterpretedLibrary, tokens: int) -> None:
    x, logits, gate_up, down = dispatch_arguments(tokens, 6, 16, 16)
    logits[:, [0, 3]] = -math.inf
    check_dispatch(device, (x, logits, gate_up, down), 3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_nan_logits_spoil_their_own_token_only(device: InterpretedLibrary, tokens: int) -> None:
    arguments = dispatch_arguments(tokens, 6, 16, 16)
    whole = torch_kernels.call(moe_dispatch, device, *arguments, 6, False, "silu")
    arguments[1][0] = math.nan
    spoilt = torch_kernels.call(moe_dispatch, device, *arguments, 6, False, "silu")
    assert spoilt[0].isnan().all()
    torch.testing.assert_close(spoilt[1:], whole[1:], rtol=0, atol=0)


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 16),
    top_k=st.integers(1, 16),
    hidden=st.integers(1, 8),
    intermediate=st.integers(1, 6),
    normalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
@example(16, 16, 16, 2, 2, True, torch.bfloat16, 0)
@example(17, 16, 16, 2, 2, False, torch.float16, 0)
def test_dispatch_equals_the_loop(
    device: InterpretedLibrary,
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    normalize: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    arguments = dispatch_arguments(tokens, experts, 8 * hidden, 8 * intermediate, dtype, seed)
    check_dispatch(device, arguments, min(top_k, experts), normalize)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_results_repeat_bit_by_bit(device: InterpretedLibrary, tokens: int) -> None:
    arguments = dispatch_arguments(tokens, 8, 48, 40, torch.bfloat16)
    first, second = (
        torch_kernels.call(moe_dispatch, device, *arguments, 4, False, "silu") for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("per_choice", [False, True])
@pytest.mark.parametrize(
    ("tokens", "form"), [(1, "moe_linear_one_n4"), (9, "moe_linear_m16n32"), (17, "moe_linear_m64")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_paths(
    device: InterpretedLibrary, tokens: int, form: str, per_choice: bool, dtype: torch.dtype
) -> None:
    # Nine tokens of two choices for three experts: more than 16 of them may be one expert's.
    arguments = linear_arguments(tokens, 2, 3, 40, 24, per_choice=per_choice, dtype=dtype)
    forms = check_linear(device, *arguments)
    before = ["moe_group_i64"] if tokens > 16 else []
    assert forms[:-1] == before
    assert forms[-1].startswith(form) and forms[-1].endswith(NAMES[dtype])


@pytest.mark.parametrize("per_choice", [False, True])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 5), (12, 4), (12, 30)])
def test_linear_takes_repeated_ids(
    device: InterpretedLibrary, tokens: int, top_k: int, per_choice: bool
) -> None:
    x, ids, weight = linear_arguments(tokens, top_k, 3, 16, 12, per_choice=per_choice)
    ids[:] = 1
    check_linear(device, x, ids, weight)


@pytest.mark.parametrize("tokens", [1, 3, 16, 30])
def test_linear_makes_zeros_for_ids_out_of_range(device: InterpretedLibrary, tokens: int) -> None:
    x, ids, weight = linear_arguments(tokens, 4, 3, 16, 12, beyond=2, seed=3)
    # In 32 bits this one would be expert 1.
    ids[0, 0] = 2**32 + 1
    ids[-1, -1] = -(2**40)
    assert ((ids < 0) | (ids >= 3)).sum() > 1
    check_linear(device, x, ids, weight)


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 16),
    top_k=st.integers(1, 9),
    in_features=st.integers(1, 6),
    out_features=st.integers(1, 8),
    odd=st.booleans(),
    per_choice=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_linear_equals_the_loop(
    device: InterpretedLibrary,
    tokens: int,
    experts: int,
    top_k: int,
    in_features: int,
    out_features: int,
    odd: bool,
    per_choice: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    side = 7 if odd and dtype == torch.float32 else 8
    arguments = linear_arguments(
        tokens,
        top_k,
        experts,
        side * in_features,
        side * out_features,
        per_choice=per_choice,
        dtype=dtype,
        seed=seed,
        beyond=1,
    )
    check_linear(device, *arguments)


def dispatch_parameters(**changes: int | None) -> Structure:
    """A call of sizes that are accepted, with addresses that are read by no kernel."""
    sizes = {"top_k": 2, "experts": 4, "tokens": 1, "hidden": 16, "intermediate": 16}
    pointers = dict.fromkeys(("x", "router_logits", "gate_up", "down", "y"), 4096)
    return moe_dispatch.structure(**{"dtype": 1, "activation": 0, **sizes, **pointers, **changes})


def linear_parameters(**changes: int | None) -> Structure:
    sizes = {"top_k": 2, "experts": 4, "tokens": 1, "in_features": 16, "out_features": 16}
    pointers = dict.fromkeys(("x", "expert_ids", "weight", "y"), 4096)
    return moe_linear.structure(**{"dtype": 1, **sizes, **pointers, **changes})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            dispatch_parameters(hidden=100),
            "hidden is 100; the kernels need a multiple of 8 in fp16 and bf16: pad it or use fp32.",
        ),
        (
            dispatch_parameters(intermediate=12, dtype=2),
            "intermediate is 12; the kernels need a multiple of 8 in fp16 and bf16: pad it or use "
            "fp32.",
        ),
        (dispatch_parameters(hidden=0), "hidden is 0; it must be between 1 and 16777216."),
        (dispatch_parameters(dtype=7), "dtype is 7; it must be between 0 and 2."),
        (dispatch_parameters(activation=5), "activation is 5; it must be between 0 and 4."),
        (dispatch_parameters(experts=1025), "experts is 1025; it must be between 1 and 1024."),
        (
            dispatch_parameters(top_k=5),
            "top_k is 5; it must be between 1 and 4, the number of experts.",
        ),
        (
            dispatch_parameters(top_k=65, experts=200),
            "top_k is 65; it must be between 1 and 64.",
        ),
        (dispatch_parameters(tokens=-1), "tokens is -1; it must be between 0 and 2147483647."),
        (
            linear_parameters(tokens=2**30),
            "tokens * top_k is 2147483648; it must be between 0 and 1073741824: split the call "
            "into smaller ones.",
        ),
        (dispatch_parameters(down=None), "down is null; pass its device address."),
        (
            dispatch_parameters(x=4104),
            "x is not aligned to 16 bytes; copy it to where it is.",
        ),
        (
            linear_parameters(in_features=4),
            "in_features is 4; the kernels need a multiple of 8 in fp16 and bf16: pad it or use "
            "fp32.",
        ),
        (linear_parameters(top_k=0), "top_k is 0; it must be between 1 and 1073741824."),
        (linear_parameters(experts=0), "experts is 0; it must be between 1 and 1073741824."),
        (linear_parameters(expert_ids=None), "expert_ids is null; pass its device address."),
        (linear_parameters(tokens=20), "workspace is null; pass its device address."),
    ],
)
def test_refusals(device: InterpretedLibrary, parameters: Structure, message: str) -> None:
    workspace = 4096 if isinstance(parameters, moe_dispatch.structure) else None
    device.launches.clear()
    with pytest.raises(LibraryError) as caught:
        device.run(parameters, workspace, 1 << 40, None)
    assert str(caught.value) == message
    assert device.launches == []


@pytest.mark.parametrize("tokens", [1, 2, 20, 200])
def test_kernels_stay_in_the_workspace(device: InterpretedLibrary, tokens: int) -> None:
    # With 15 experts and 200 tokens the table of tiles is just over a unit of the workspace.
    x, logits, gate_up, down = dispatch_arguments(tokens, 15, 20, 12)
    y = torch.empty_like(x)
    parameters = moe_dispatch.structure(
        dtype=0,
        activation=0,
        normalize=0,
        top_k=2,
        experts=15,
        tokens=tokens,
        hidden=20,
        intermediate=12,
        x=x.data_ptr(),
        router_logits=logits.data_ptr(),
        gate_up=gate_up.data_ptr(),
        down=down.data_ptr(),
        y=y.data_ptr(),
    )
    size = device.workspace_bytes(parameters)
    memory = torch.full((size + 8192,), 0x5A, dtype=torch.uint8)
    begin = -memory.data_ptr() % 256 + 1024
    device.run(parameters, memory.data_ptr() + begin, size, None)
    assert_close(y, dispatch_loop(x, logits, gate_up, down, 2, False, "silu"))
    assert (memory[:begin] == 0x5A).all()
    assert (memory[begin + size :] == 0x5A).all()


@pytest.fixture
def sliced(device: InterpretedLibrary) -> Iterator[InterpretedLibrary]:
    device.tune(slice_tokens=32)
    yield device
    device.tune()


def poisoned(
    device: InterpretedLibrary,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """MoeDispatch in a workspace that begins as NaN and is no larger than the call needs."""

    def run(library: InterpretedLibrary, parameters: Structure, x: torch.Tensor) -> None:
        size = needed(library, parameters)
        assert size <= library.workspace_bytes(parameters)
        workspace = torch.full((size + 4096,), 255, dtype=torch.uint8)
        library.run(parameters, workspace.data_ptr(), size, None)
        assert bool((workspace[size:] == 255).all()), "written behind the workspace"

    monkeypatch.setattr(torch_kernels, "_run", run)
    y: torch.Tensor = torch_kernels.call(moe_dispatch, device, *arguments, 2, True, "silu")
    return y


def needed(device: InterpretedLibrary, parameters: Structure) -> int:
    """What the refusal of an empty workspace says that a call needs."""
    with pytest.raises(LibraryError) as caught:
        device.run(parameters, 4096, 0, None)
    found = re.fullmatch(
        r"moe_(dispatch|linear) needs (\d+) bytes of workspace for this call and was given 0; "
        r"pass as many as ingot_moe_\1_workspace says\.",
        str(caught.value),
    )
    assert found is not None, caught.value
    return int(found[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "slices"), [(32, [32]), (33, [32, 1]), (70, [32, 32, 6])])
def test_many_tokens_are_dispatched_in_slices(
    sliced: InterpretedLibrary,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    slices: list[int],
    dtype: torch.dtype,
) -> None:
    # Sides that leave no row aligned in float32.
    side = 13 if dtype == torch.float32 else 24
    arguments = dispatch_arguments(tokens, 5, side, side, dtype)
    sliced.launches.clear()
    found = poisoned(sliced, monkeypatch, arguments)
    assert_close(found, dispatch_loop(*arguments, 2, True, "silu"))
    grids = [each.grid for each in sliced.launches if each.form == "moe_route_e64"]
    assert grids == [(count, 1, 1) for count in slices]


def test_slices_are_nearly_equal(sliced: InterpretedLibrary) -> None:
    sliced.tune(slice_tokens=64)
    sliced.launches.clear()
    torch_kernels.call(moe_dispatch, sliced, *dispatch_arguments(130, 3, 8, 8), 1, False, "silu")
    grids = [each.grid[0] for each in sliced.launches if each.form == "moe_route_e64"]
    assert grids == [48, 48, 34]


def test_a_call_is_not_refused_for_its_length(device: InterpretedLibrary) -> None:
    largest = dispatch_parameters(tokens=2**31 - 1, top_k=4)
    assert device.workspace_bytes(largest) == device.workspace_bytes(
        dispatch_parameters(tokens=8192, top_k=4)
    )


@pytest.mark.parametrize("tokens", [4 * 4096, 16 * 8192])
def test_the_workspace_of_olmoe_is_that_of_a_slice(device: InterpretedLibrary, tokens: int) -> None:
    sizes = {"experts": 64, "top_k": 8, "hidden": 2048, "intermediate": 1024}
    # Ids, weights, places and the rows of both products, of each choice; then the table of tiles.
    of_choice = 4 + 4 + 4 + 2 * 1024 + 4 * 2048
    found = device.workspace_bytes(dispatch_parameters(dtype=2, tokens=tokens, **sizes))
    assert 0 < found - 8192 * 8 * of_choice < 20_000


@pytest.mark.parametrize("name", ["dispatch", "linear"])
def test_a_refused_size_is_no_workspace_of_0(device: InterpretedLibrary, name: str) -> None:
    call: Structure = dispatch_parameters(hidden=100)
    message = "hidden is 100; the kernels need a multiple of 8"
    if name == "linear":
        call, message = linear_parameters(tokens=2**30), "split the call into smaller ones"
    with pytest.raises(LibraryError, match=message):
        device.workspace_bytes(call)


@given(
    tokens=st.integers(17, 100_000),
    less=st.one_of(st.integers(0, 40), st.integers(0, 100_000)),
    top_k=st.integers(1, 64),
    more_experts=st.integers(0, 900),
    side=st.integers(1, 300),
    dtype=st.sampled_from([0, 1, 2]),
    capability=st.sampled_from([80, 86, 89, 90, 100, 120]),
    slice_tokens=st.sampled_from([0, 16, 48, 4096]),
    tile=st.sampled_from([None, (32, 64), (256, 64)]),
)
@settings(max_examples=150, deadline=None)
def test_a_workspace_is_enough_for_fewer_tokens_on_another_device(
    device: InterpretedLibrary,
    tokens: int,
    less: int,
    top_k: int,
    more_experts: int,
    side: int,
    dtype: int,
    capability: int,
    slice_tokens: int,
    tile: tuple[int, int] | None,
) -> None:
    fewer = max(17, tokens - less)
    same: dict[str, int] = {"top_k": top_k, "experts": top_k + more_experts, "dtype": dtype}
    dispatch = {**same, "hidden": 8 * side, "intermediate": 8 * (301 - side)}
    linear = {**same, "in_features": 8 * side, "out_features": 8}
    try:
        device.tune(slice_tokens=slice_tokens, tile=tile)
        for make, sizes in ((dispatch_parameters, dispatch), (linear_parameters, linear)):
            device.set_capability(90)
            bound = device.workspace_bytes(make(tokens=tokens, **sizes))
            assert bound >= device.workspace_bytes(make(tokens=fewer, **sizes))
            device.set_capability(capability)
            assert bound >= needed(device, make(tokens=fewer, **sizes))
    finally:
        device.tune()
        device.set_capability(90)


@pytest.mark.parametrize("dtype", [0, 2])
@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (8, 2), (4, 4)])
def test_a_workspace_is_enough_for_every_device_and_fewer_tokens(
    device: InterpretedLibrary, dtype: int, experts: int, top_k: int
) -> None:
    """TensorRT reserves it where an engine is built, for the most tokens of a profile."""
    found: dict[str, list[int]] = {"dispatch": [], "linear": []}
    try:
        for tokens in (1, 2, 15, 16, 17, 32, 33, 128, 500, 4096):
            dispatch = moe_dispatch.structure(
                dtype=dtype,
                top_k=top_k,
                experts=experts,
                tokens=tokens,
                hidden=2048,
                intermediate=1024,
            )
            linear = moe_linear.structure(
                dtype=dtype,
                top_k=top_k,
                experts=experts,
                tokens=tokens,
                in_features=2048,
                out_features=1024,
            )
            for name, parameters in (("dispatch", dispatch), ("linear", linear)):
                of_devices = set()
                for capability in (80, 86, 89, 90, 100, 120):
                    device.set_capability(capability)
                    of_devices.add(device.workspace_bytes(parameters))
                assert len(of_devices) == 1
                found[name] += of_devices
    finally:
        device.set_capability(90)
    assert all(sizes == sorted(sizes) for sizes in found.values())
    assert found["dispatch"][0] > 0
