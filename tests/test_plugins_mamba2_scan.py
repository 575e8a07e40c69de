"""Mamba2Scan: the eager reference and the function body against a plain loop."""

# The paper's matrices keep their capital names.
# ruff: noqa: N806

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.mamba2.modeling_mamba2 import (
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from ingot.plugins import mamba2_scan as op
from ingot.plugins.operator import DOMAIN, VERSION
from ingot.runtime.onnxruntime_session import open_session

Arrays = dict[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]

SHAPES = {
    "x": ["b", "t", "hm", "pm"],
    "dt": ["b", "t", "hm"],
    "A": ["hm"],
    "B": ["b", "t", "g", "ns"],
    "C": ["b", "t", "g", "ns"],
    "D": ["hm"],
    "dt_bias": ["hm"],
    "state": ["b", "hm", "pm", "ns"],
    "mask": ["b", "t"],
}
# The inputs of type T; the others are float32 whatever T.
OF_TYPE_T = ("x", "dt", "B", "C", "mask")
NO_LIMITS = (0.0, math.inf)
BOUND = 2e-5


def plain_loop(a: Arrays, dt_min: float = 0.0, dt_max: float = math.inf) -> Pair:
    """The recurrence, token by token and head by head, in float64 and without torch."""
    x, dt, A, B, C, D, dt_bias, state, mask = (a[name].astype(np.float64) for name in SHAPES)
    tokens, heads = dt.shape[1:]
    heads_of_group = heads // B.shape[2]
    S, y = state.copy(), np.zeros(x.shape)
    for t in range(tokens):
        for h in range(heads):
            B_t, C_t = B[:, t, h // heads_of_group], C[:, t, h // heads_of_group]
            softplus = np.logaddexp(0, dt[:, t, h] + dt_bias[h])
            step = np.where(mask[:, t] == 1, np.clip(softplus, dt_min, dt_max), 0)
            decay = np.exp(step * A[h])
            read = (step[:, None] * x[:, t, h])[:, :, None] * B_t[:, None, :]
            S[:, h] = decay[:, None, None] * S[:, h] + read
            y[:, t, h] = (S[:, h] * C_t[:, None, :]).sum(-1) + D[h] * x[:, t, h]
    return y, S


def arguments(
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 4,
    head_size: int = 3,
    groups: int = 2,
    states: int = 5,
    zero_state: bool = False,
    padding: str = "none",
    seed: int = 0,
) -> Arrays:
    """Inputs scaled like a real model's: most steps lie in 1e-3..1, so that memory is long."""
    random = np.random.default_rng(seed)
    first_step = np.exp(random.uniform(math.log(1e-3), math.log(0.5), heads))
    mask = np.ones((batch, tokens))
    if padding == "left":
        # Row by row another length, the first row full.
        for row in range(batch):
            mask[row, : row * tokens // (batch + 1)] = 0
    elif padding == "holes":
        mask = (random.uniform(size=(batch, tokens)) < 0.6).astype(np.float64)
    arrays = {
        "x": random.normal(size=(batch, tokens, heads, head_size)),
        "dt": random.normal(size=(batch, tokens, heads)),
        "A": -random.uniform(1, 16, size=heads),
        "B": random.normal(size=(batch, tokens, groups, states)),
        "C": random.normal(size=(batch, tokens, groups, states)),
        "D": random.normal(size=heads),
        # The inverse of softplus, as the reference implementation starts dt_bias.
        "dt_bias": first_step + np.log(-np.expm1(-first_step)),
        "state": (0 if zero_state else 1) * random.normal(size=(batch, heads, head_size, states)),
        "mask": mask,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def tensors(arrays: Arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(arrays[name]) for name in SHAPES]


def eager(
    arrays: Arrays, chunk_size: int, dt_min: float = 0.0, dt_max: float = math.inf
) -> tuple[np.ndarray, np.ndarray]:
    y, new_state = op.mamba2_scan(*tensors(arrays), chunk_size, dt_min, dt_max)
    return y.numpy(), new_state.numpy()


def body_model(
    chunk_size: int, dt_min: float, dt_max: float, element: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """One node with the function body; float32 outside, ``element`` inside, for every shape."""
    op.mamba2_scan.register_schema()
    inside = {name: f"{name}_T" if name in OF_TYPE_T else name for name in SHAPES}
    node = helper.make_node(
        op.mamba2_scan.name,
        list(inside.values()),
        ["y_T", "new_state"],
        domain=DOMAIN,
        chunk_size=chunk_size,
        dt_min=dt_min,
        dt_max=dt_max,
    )
    casts = [helper.make_node("Cast", [n], [inside[n]], to=element) for n in OF_TYPE_T]
    graph = helper.make_graph(
        [*casts, node, helper.make_node("Cast", ["y_T"], ["y"], to=TensorProto.FLOAT)],
        "one_node",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in SHAPES.items()
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPES["x"]),
            helper.make_tensor_value_info("new_state", TensorProto.FLOAT, SHAPES["state"]),
        ],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(
        graph, functions=[op.function_body()], opset_imports=imports, ir_version=10
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@functools.cache
def body_session(
    chunk_size: int, dt_min: float, dt_max: float, element: int = TensorProto.FLOAT
) -> onnxruntime.InferenceSession:
    return _session(body_model(chunk_size, dt_min, dt_max, element))


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    # Threads that spin between runs would slow down the eager half of the tests.
    return open_session(model.SerializeToString(), threads=2, spinning=False)


def body(
    arrays: Arrays, chunk_size: int, dt_min: float = 0.0, dt_max: float = math.inf
) -> tuple[np.ndarray, np.ndarray]:
    y, new_state = body_session(chunk_size, dt_min, dt_max).run(None, arrays)
    return y, new_state


IMPLEMENTATIONS = {"eager": eager, "body": body}
each_implementation = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))


def assert_near(found: Pair, expected: Pair, bound: float = BOUND, label: str = "") -> None:
    """Each output within ``bound`` times its own largest magnitude."""
    for name, ours, theirs in zip(("y", "new_state"), found, expected, strict=True):
        assert ours.shape == theirs.shape, (label, name)
        limit = bound * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit, err_msg=f"{label} {name}")


def cut(arrays: Arrays, start: int, end: int, state: np.ndarray) -> Arrays:
    """The tokens from ``start`` to ``end``, after ``state``."""
    piece = {name: a[:, start:end] if name in OF_TYPE_T else a for name, a in arrays.items()}
    return {**piece, "state": state}


@settings(max_examples=100, deadline=None)
@given(
    chunk_size=st.sampled_from([1, 4, 16]),
    length=st.sampled_from(["1", "q - 1", "q", "q + 1", "2 q", "3 q + 2"]),
    batch=st.integers(1, 3),
    heads_and_groups=st.sampled_from([(1, 1), (3, 1), (3, 3), (4, 2), (6, 2), (6, 3)]),
    head_size=st.sampled_from([1, 3, 5]),
    states=st.sampled_from([1, 5, 7]),
    zero_state=st.booleans(),
    limits=st.sampled_from([NO_LIMITS, (0.05, 0.3)]),
    padding=st.sampled_from(["none", "left", "holes"]),
    seed=st.integers(0, 2**31),
)
def test_both_implementations_agree_with_a_plain_loop(
    chunk_size: int,
    length: str,
    batch: int,
    heads_and_groups: tuple[int, int],
    head_size: int,
    states: int,
    zero_state: bool,
    limits: tuple[float, float],
    padding: str,
    seed: int,
) -> None:
    lengths = {
        "1": 1,
        "q - 1": max(1, chunk_size - 1),
        "q": chunk_size,
        "q + 1": chunk_size + 1,
        "2 q": 2 * chunk_size,
        "3 q + 2": 3 * chunk_size + 2,
    }
    arrays = arguments(
        lengths[length],
        batch=batch,
        heads=heads_and_groups[0],
        head_size=head_size,
        groups=heads_and_groups[1],
        states=states,
        zero_state=zero_state,
        padding=padding,
        seed=seed,
    )
    expected = plain_loop(arrays, *limits)
    for name, implementation in IMPLEMENTATIONS.items():
        assert_near(implementation(arrays, chunk_size, *limits), expected, label=name)


@each_implementation
def test_agrees_with_a_plain_loop_over_a_long_chunk(implementation: str) -> None:
    arrays = arguments(300, heads=6, head_size=7, states=16, padding="left")
    assert_near(IMPLEMENTATIONS[implementation](arrays, 256), plain_loop(arrays))


@each_implementation
@pytest.mark.parametrize("padding", ["none", "holes"])
def test_a_split_call_equals_the_whole(implementation: str, padding: str) -> None:
    run = IMPLEMENTATIONS[implementation]
    arrays = arguments(11, padding=padding, seed=1)
    expected = run(arrays, 4)
    for at in range(1, 11):
        before, middle = run(cut(arrays, 0, at, arrays["state"]), 4)
        after, last = run(cut(arrays, at, 11, middle), 4)
        assert_near((np.concatenate([before, after], axis=1), last), expected, 1e-6, str(at))


def test_padding_keeps_the_state_to_the_bit() -> None:
    arrays = arguments(40, batch=3, padding="holes", seed=2)
    state = arrays["state"]
    padded = 0
    for t in range(40):
        after = eager(cut(arrays, t, t + 1, state), 16)[1]
        rows = arrays["mask"][:, t] == 0
        assert np.array_equal(after[rows], state[rows])
        assert not (after[~rows] == state[~rows]).all(axis=(1, 2, 3)).any()
        padded += int(rows.sum())
        state = after
    assert padded > 20

    # Inside one call: with one C for all and no D, y shows the same state again.
    arrays["C"][:] = arrays["C"][:, :1]
    arrays["D"][:] = 0
    y = eager(arrays, 16)[0]
    same = (y[:, 1:] == y[:, :-1]).all(axis=(2, 3))
    assert np.array_equal(same, arrays["mask"][:, 1:] == 0)


@each_implementation
def test_a_call_of_padding_only_returns_the_state(implementation: str) -> None:
    arrays = arguments(9, seed=3)
    arrays["mask"][:] = 0
    assert np.array_equal(IMPLEMENTATIONS[implementation](arrays, 4)[1], arrays["state"])


@each_implementation
@pytest.mark.parametrize("padding", ["left", "holes"])
def test_what_padding_holds_reaches_no_token(implementation: str, padding: str) -> None:
    run = IMPLEMENTATIONS[implementation]
    arrays = arguments(22, batch=3, padding=padding, seed=4)
    is_token = arrays["mask"] == 1
    y, new_state = run(arrays, 16)
    for name in ("x", "dt", "B", "C"):
        # Finite, though nearly every product with it is infinite in float32.
        arrays[name][~is_token] = 3e38
    found_y, found_state = run(arrays, 16)
    assert np.array_equal(found_y[is_token], y[is_token])
    assert np.array_equal(found_state, new_state)


@pytest.mark.parametrize("zero_state", [True, False])
@pytest.mark.parametrize("limits", [NO_LIMITS, (0.05, 0.3)])
@pytest.mark.parametrize("tokens", [5, 16, 37])
def test_agrees_with_transformers_chunk_scan(
    zero_state: bool, limits: tuple[float, float], tokens: int
) -> None:
    arrays = arguments(tokens, zero_state=zero_state, seed=5)
    x, dt, A, B, C, D, dt_bias, state, _ = tensors(arrays)
    expected = mamba2_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=16,
        D=D,
        dt_bias=dt_bias,
        initial_states=None if zero_state else state,
        dt_softplus=True,
        dt_limit=limits,
        return_final_states=True,
    )
    for name, implementation in IMPLEMENTATIONS.items():
        found = implementation(arrays, 16, *limits)
        assert_near(found, (expected[0].numpy(), expected[1].numpy()), label=name)


def test_agrees_with_transformers_decode_step() -> None:
    arrays = arguments(1, batch=3, heads=6, seed=6)
    x, dt, A, B, C, D, dt_bias, state, _ = tensors(arrays)
    rows, columns = (6, 3), (6, 3, 5)
    state = state.clone()
    y = mamba2_selective_state_update(
        state,
        x[:, 0],
        dt[:, 0, :, None].expand(3, *rows),
        A[:, None, None].expand(columns),
        B[:, 0],
        C[:, 0],
        D[:, None].expand(rows),
        dt_bias=dt_bias[:, None].expand(rows),
        dt_softplus=True,
    )
    for name, implementation in IMPLEMENTATIONS.items():
        found = implementation(arrays, 16, *NO_LIMITS)
        assert_near(found, (y[:, None].numpy(), state.numpy()), label=name)


@each_implementation
@pytest.mark.parametrize("decay", [-1.0, -16.0, -1e4])
def test_extreme_steps_give_finite_right_numbers(implementation: str, decay: float) -> None:
    arrays = arguments(13, seed=7)
    arrays["A"][:] = decay
    # A vast step early in each chunk of 4: sums over a chunk are vast, sums after it are not.
    for row, dt in enumerate((80.0, 100.0)):
        arrays["dt"][row, 1::4] = dt
        arrays["dt"][row, 2::4] = -9.0
        arrays["dt"][row, 3::4] = -9.5
    expected = plain_loop(arrays)
    found = IMPLEMENTATIONS[implementation](arrays, 4)
    assert_near(found, expected)
    # Between the vast steps the numbers are small; each token is held to its own scale.
    for t in range(13):
        now = (found[0][:, t], expected[0][:, t])
        np.testing.assert_allclose(*now, rtol=0, atol=BOUND * np.abs(now[1]).max())


@each_implementation
def test_keeps_its_precision_after_large_decays(implementation: str) -> None:
    arrays = arguments(120, seed=11)
    # Sums of dt' A from the chunk's start pass -8000, where float32 has steps of 5e-4.
    arrays["A"][:] = -16
    arrays["dt"][:, :100] = 5
    arrays["dt"][:, 100:] -= 5
    y, new_state = IMPLEMENTATIONS[implementation](arrays, 128)
    expected_y, expected_state = plain_loop(arrays)
    assert_near((y[:, 100:], new_state), (expected_y[:, 100:], expected_state))


@each_implementation
@pytest.mark.parametrize("dt", [-1e3, -100.0, 100.0, 1e3, 1e30])
def test_no_step_overflows(implementation: str, dt: float) -> None:
    arrays = arguments(6, seed=8)
    arrays["dt"][:] = dt
    arrays["A"][0] = -1e10
    assert_near(IMPLEMENTATIONS[implementation](arrays, 4), plain_loop(arrays))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_round_only_y(dtype: torch.dtype) -> None:
    arrays = arguments(37, padding="left", seed=9)
    narrow = dict(zip(SHAPES, tensors(arrays), strict=True))
    for name in OF_TYPE_T:
        narrow[name] = narrow[name].to(dtype)
    exact = {name: tensor.float().numpy() for name, tensor in narrow.items()}
    y, new_state = plain_loop(exact)
    element = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}[dtype]
    eager_y, eager_state = op.mamba2_scan(*narrow.values(), 16, *NO_LIMITS)
    assert eager_y.dtype == dtype and eager_state.dtype == torch.float32
    results = {
        "eager": (eager_y.float().numpy(), eager_state.numpy()),
        "body": body_session(16, *NO_LIMITS, element).run(None, exact),
    }
    rounding = torch.finfo(dtype).eps / 2 * np.abs(y) + BOUND * np.abs(y).max()
    for name, (found_y, found_state) in results.items():
        assert (np.abs(found_y - y) <= rounding).all(), name
        rounded = torch.from_numpy(found_y).to(dtype).float().numpy()
        assert np.array_equal(found_y, rounded), name
        assert found_state.dtype == np.float32
        assert np.abs(found_state - new_state).max() <= BOUND * np.abs(new_state).max(), name


def test_float64_is_computed_in_float64() -> None:
    arrays = {name: a.astype(np.float64) for name, a in arguments(37, padding="holes").items()}
    found = eager(arrays, 16)
    assert [a.dtype for a in found] == [np.float64, np.float64]
    assert_near(found, plain_loop(arrays), 1e-13)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_opcheck(tokens: int, dtype: torch.dtype) -> None:
    sample = dict(zip(SHAPES, tensors(arguments(tokens, padding="left")), strict=True))
    for name in OF_TYPE_T:
        sample[name] = sample[name].to(dtype)
    limits = (4, 0.05, 0.3)
    torch.library.opcheck(op.mamba2_scan.custom_op, (*sample.values(), *limits))
    # As the projections' slices arrive: not contiguous.
    sample["x"] = sample["x"].transpose(1, 2).contiguous().transpose(1, 2)
    sample["state"] = sample["state"].transpose(2, 3).contiguous().transpose(2, 3)
    torch.library.opcheck(op.mamba2_scan.custom_op, (*sample.values(), *limits))


def test_the_function_body_means_the_same_to_onnx() -> None:
    evaluator = ReferenceEvaluator(body_model(4, 0.05, 0.3))
    for tokens in (1, 11):
        arrays = arguments(tokens, padding="holes", seed=10)
        y, new_state = (np.asarray(value) for value in evaluator.run(None, arrays))
        assert_near((y, new_state), plain_loop(arrays, 0.05, 0.3))


def test_the_function_body_repeats_to_the_bit() -> None:
    arrays = arguments(70, heads=8, head_size=32, states=33)
    first = body(arrays, 16)
    for _ in range(50):
        again = body(arrays, 16)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_function_body_scatters_nothing() -> None:
    def operators(nodes: Any) -> Iterator[str]:
        for node in nodes:
            yield node.op_type
            for attribute in node.attribute:
                yield from operators(attribute.g.node)

    found = set(operators(op.function_body().node))
    assert "Scan" in found and "CumSum" in found
    assert not [name for name in found if name.startswith("Scatter") or name == "NonZero"]


class _OneScan(torch.nn.Module):
    def forward(
        self, weights: dict[str, torch.Tensor], tokens: dict[str, torch.Tensor], state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = op.mamba2_scan(
            tokens["x"],
            tokens["dt"],
            weights["A"],
            tokens["B"],
            tokens["C"],
            weights["D"],
            weights["dt_bias"],
            state,
            tokens["mask"],
            16,
            0.0,
            math.inf,
        )
        return result


def test_the_exporter_emits_one_node_with_two_outputs() -> None:
    with FakeTensorMode():
        sample = {name: torch.empty(array.shape) for name, array in arguments(3).items()}
    auto = torch.export.Dim.AUTO
    weights = {name: sample[name] for name in ("A", "D", "dt_bias")}
    tokens = {name: sample[name] for name in OF_TYPE_T}
    dynamic = (dict.fromkeys(weights), {name: {0: auto, 1: auto} for name in tokens}, {0: auto})
    traced = torch.export.export(
        _OneScan(), (weights, tokens, sample["state"]), dynamic_shapes=dynamic, strict=False
    )
    program = torch.onnx.export(
        traced,
        dynamo=True,
        opset_version=23,
        custom_translation_table={op.mamba2_scan.overload: op.mamba2_scan.translate},
        optimize=False,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    (node,) = model.graph.node
    assert (node.domain, node.op_type) == (DOMAIN, op.mamba2_scan.name)
    names = [value.name for value in model.graph.input]
    inputs = dict(zip((*weights, *tokens, "state"), names, strict=True))
    assert list(node.input) == [inputs[name] for name in SHAPES]
    assert list(node.output) == [value.name for value in model.graph.output]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"chunk_size": 16, "dt_min": 0.0, "dt_max": math.inf}

    # The exported model with the body beside it runs, at another batch and length.
    model.functions.append(op.function_body())
    onnx.checker.check_model(model)
    arrays = arguments(21, batch=3, padding="left")
    found = _session(model).run(None, {inputs[name]: array for name, array in arrays.items()})
    assert_near((found[0], found[1]), plain_loop(arrays))
