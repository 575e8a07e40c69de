"""Mamba2's scan becomes LinearAttention: the graph, its numbers and its conditions."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import session
from scan_graph import CHUNK, NO_LIMITS, Results, Sizes, recurrence, scan_inputs, scan_model
from text_graph import (
    Arrays,
    interface,
    notices,
    notices_nothing_done,
    operators,
    refuses,
    the,
)

from ingot.export.passes.scan import Mamba2ScanToLinearAttention

PER_TOKEN = ("x", "dt", "B", "C", "mask")
BOUND = 1e-5


@functools.cache
def lowered(sizes: Sizes, limits: tuple[float, float]) -> onnxruntime.InferenceSession:
    return session(scan_model(sizes, limits), Mamba2ScanToLinearAttention())


def run(arrays: Arrays, limits: tuple[float, float] = NO_LIMITS) -> Results:
    sizes = (*arrays["x"].shape[2:], *arrays["B"].shape[2:])
    y, new_state = lowered(sizes, limits).run(None, arrays)
    return np.asarray(y), np.asarray(new_state)


def cut(arrays: Arrays, start: int, end: int, state: np.ndarray) -> Arrays:
    """The tokens from ``start`` to ``end``, after ``state``."""
    pieces = {name: a[:, start:end] if name in PER_TOKEN else a for name, a in arrays.items()}
    return {**pieces, "past_states.0.ssm": state}


def assert_near(found: Results, expected: Results, bound: float = BOUND) -> None:
    """Each result within ``bound`` times its own largest magnitude."""
    for ours, plain in zip(found, expected, strict=True):
        assert ours.shape == plain.shape
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, plain, rtol=0, atol=bound * np.abs(plain).max())


@settings(max_examples=150, deadline=None)
@given(
    heads_and_groups=st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 2), (6, 3)]),
    # ONNX Runtime has another kernel for sizes that fill its vectors, such as the last two.
    head_and_state_size=st.sampled_from([(1, 1), (3, 5), (5, 3), (16, 32), (32, 16)]),
    tokens=st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]),
    batch=st.integers(1, 3),
    limits=st.sampled_from([NO_LIMITS, (0.05, math.inf), (0.0, 0.3), (0.05, 0.3)]),
    padding=st.sampled_from(["none", "left", "holes"]),
    seed=st.integers(0, 2**31),
)
def test_the_lowered_scan_agrees_with_the_recurrence(
    heads_and_groups: tuple[int, int],
    head_and_state_size: tuple[int, int],
    tokens: int,
    batch: int,
    limits: tuple[float, float],
    padding: str,
    seed: int,
) -> None:
    (heads, groups), (head_size, states) = heads_and_groups, head_and_state_size
    sizes = (heads, head_size, groups, states)
    arrays = scan_inputs(sizes, batch, tokens, padding=padding, seed=seed)
    assert_near(run(arrays, limits), recurrence(arrays, limits))


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("sizes", [(4, 3, 2, 5), (4, 32, 1, 32)])
def test_a_lowered_scan_split_anywhere_equals_the_whole(sizes: Sizes, padding: str) -> None:
    tokens = CHUNK + 3
    arrays = scan_inputs(sizes, 2, tokens, padding=padding, seed=1)
    expected = run(arrays)
    first = arrays["past_states.0.ssm"]
    for at in range(1, tokens):
        before, middle = run(cut(arrays, 0, at, first))
        after, last = run(cut(arrays, at, tokens, middle))
        assert_near((np.concatenate([before, after], axis=1), last), expected, 2e-6)
    steps, state = [], first
    for t in range(tokens):
        y, state = run(cut(arrays, t, t + 1, state))
        steps.append(y)
    assert_near((np.concatenate(steps, axis=1), state), expected, 2e-6)


@pytest.mark.parametrize("sizes", [(4, 3, 2, 5), (4, 32, 1, 32)])
@pytest.mark.parametrize("tokens", [1, CHUNK + 1])
def test_padding_keeps_the_state_to_the_bit(sizes: Sizes, tokens: int) -> None:
    arrays = scan_inputs(sizes, 3, tokens, seed=2)
    # Rows 0 and 2 are padding from end to end.
    arrays["mask"][[0, 2]] = 0
    state = arrays["past_states.0.ssm"]
    _, new_state = run(arrays)
    assert np.array_equal(new_state[[0, 2]], state[[0, 2]])
    assert not np.array_equal(new_state[1], state[1])


@pytest.mark.parametrize("sizes", [(4, 3, 2, 5), (4, 32, 1, 32)])
@pytest.mark.parametrize("tokens", [1, CHUNK + 1])
def test_what_padding_holds_reaches_no_token(sizes: Sizes, tokens: int) -> None:
    arrays = scan_inputs(sizes, 3, tokens, padding="left", seed=3)
    arrays["mask"][0, -1] = 0
    is_token = arrays["mask"] == 1
    assert 0 < is_token.sum() < is_token.size
    y, new_state = run(arrays)
    for name in ("x", "dt", "B", "C"):
        # Finite, though nearly every product with it is infinite in float32.
        arrays[name][~is_token] = 3e38
    found_y, found_state = run(arrays)
    assert np.array_equal(found_y[is_token], y[is_token])
    assert np.array_equal(found_state, new_state)


@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("decay", [-16.0, -90.0, -1e4, -1e30])
def test_extreme_steps_give_finite_right_numbers(tokens: int, decay: float) -> None:
    arrays = scan_inputs((4, 32, 2, 16), 2, tokens, seed=4)
    arrays["A"][:] = decay
    arrays["dt"][:, ::3] = 80.0
    arrays["dt"][:, 1::3] = -100.0
    found, expected = run(arrays), recurrence(arrays)
    assert all(np.isfinite(array).all() for array in found)
    # Between the vast steps the numbers are small; each token is held to its own scale.
    for t in range(tokens):
        assert_near((found[0][:, t], found[1]), (expected[0][:, t], expected[1]))


def test_a_scan_becomes_two_forms_of_the_kernel() -> None:
    model = scan_model((6, 3, 2, 5))
    before = interface(model)
    assert Mamba2ScanToLinearAttention()(model).modified
    # The two results go on to the graph's outputs through an Identity each.
    expected = "Shape Equal Unsqueeze Add Softplus Mul Mul Unsqueeze Mul Reshape If"
    expected += " Unsqueeze Mul Add Identity Identity"
    assert operators(model.graph) == Counter(expected.split())
    branch = next(node for node in model.graph if node.op_type == "If").attributes
    one, many = (branch[name].as_graph() for name in ("then_branch", "else_branch"))
    assert operators(one)["LinearAttention"] == operators(many)["LinearAttention"] == 1
    assert operators(one)["Transpose"] == 0
    assert operators(many)["Transpose"] == 2
    assert not model.functions
    assert interface(model) == before
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (NO_LIMITS, []),
        ((0.25, math.inf), [[0.25, None]]),
        ((0.0, 0.5), [[None, 0.5]]),
        ((0.25, 0.5), [[0.25, 0.5]]),
    ],
)
def test_only_limits_that_a_step_can_reach_are_kept(
    limits: tuple[float, float], expected: list[list[float | None]]
) -> None:
    model = scan_model((2, 3, 1, 5), limits)
    Mamba2ScanToLinearAttention()(model)
    clips = [node for node in model.graph if node.op_type == "Clip"]
    assert [[number(value) for value in node.inputs[1:]] for node in clips] == expected


def number(value: ir.Value | None) -> float | None:
    if value is None:
        return None
    assert value.const_value is not None
    return float(value.const_value.numpy())


def test_a_scan_of_unknown_sizes_keeps_its_node_and_body() -> None:
    model = scan_model((4, 3, 2, 5), unknown=("x",))
    assert not Mamba2ScanToLinearAttention()(model).modified
    assert operators(model.graph)["Mamba2Scan"] == 1
    assert model.functions


def test_a_scan_in_another_type_keeps_its_node() -> None:
    model = scan_model((4, 3, 2, 5))
    for node in model.graph:
        if node.op_type == "Mamba2Scan":
            for value in node.inputs:
                assert value is not None
                value.type = ir.TensorType(ir.DataType.FLOAT16)
    assert not Mamba2ScanToLinearAttention()(model).modified


def test_refuses_groups_that_its_heads_do_not_fill() -> None:
    model = scan_model((5, 3, 2, 5))
    why = "Mamba2Scan .* has 5 heads in 2 groups"
    refuses(Mamba2ScanToLinearAttention(), model, why)


def test_refuses_a_state_of_other_sizes() -> None:
    model = scan_model((4, 3, 2, 5))
    state = the(model, "Mamba2Scan").inputs[7]
    assert state is not None
    state.shape = ir.Shape(["b", 4, 5, 3])
    refuses(Mamba2ScanToLinearAttention(), model, r"Mamba2Scan .* has a state \[b,4,5,3\]")


def test_notices_what_is_left() -> None:
    model = scan_model((4, 3, 2, 5))
    notices_nothing_done(Mamba2ScanToLinearAttention(), model, "Mamba2Scan .* was not swapped")


def give_a_name_twice(model: ir.Model) -> None:
    model.graph[0].outputs[0].name = the(model, "LinearAttention").outputs[0].name


def count_queries_wrong(model: ir.Model) -> None:
    the(model, "LinearAttention").attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", 3)


def leave_the_branch(model: ir.Model) -> None:
    inputs = [model.graph.inputs[0]] * 5
    model.graph.append(ir.node("LinearAttention", inputs, domain="com.microsoft"))


def rename_the_state(model: ir.Model) -> None:
    model.graph.outputs[1].name = "val_9"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (give_a_name_twice, "is in a branch and has another's name"),
        (count_queries_wrong, "LinearAttention .* has 3 heads of queries for 4 of states"),
        (leave_the_branch, "LinearAttention .* is in no branch of an If"),
        (rename_the_state, "the graph had .*present_states.0.ssm"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(Mamba2ScanToLinearAttention(), scan_model((4, 3, 2, 5)), spoil, why)
