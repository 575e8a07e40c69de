"""The causal convolution becomes one of an image: the graph, its numbers and its conditions."""

from __future__ import annotations

import functools
import platform
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from convolution_graph import ACTIVATIONS, causal, convolution_text, kernel_and_bias
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import session
from text_graph import interface, notices, notices_nothing_done, operators, parsed, the

from ingot.export.passes.convolution import CausalConvToBlocked
from ingot.runtime.onnxruntime_session import open_session

BOUND = 1e-5


@functools.cache
def rewritten(
    channels: int, width: int, activation: str, bias: bool
) -> onnxruntime.InferenceSession:
    text = convolution_text(channels, width, activation, bias)
    return session(parsed(text, kernel_and_bias(channels, width, bias)), CausalConvToBlocked())


@settings(max_examples=100, deadline=None)
@given(
    # Blocks of channels are 8 or 16 wide.
    channels=st.sampled_from([1, 6, 16, 24, 40]),
    width=st.sampled_from([2, 4]),
    tokens=st.sampled_from([1, 2, 3, 4, 11]),
    batch=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_rewritten_convolution_agrees_with_its_definition(
    channels: int, width: int, tokens: int, batch: int, activation: str, bias: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=(batch, tokens, channels)).astype(np.float32)
    past = random.normal(size=(batch, channels, width - 1)).astype(np.float32)
    run = rewritten(channels, width, activation, bias).run
    y, present = (np.asarray(found) for found in run(None, {"x": x, "past": past}))
    weights = kernel_and_bias(channels, width, bias)
    expected_y, expected_present = causal(x, past, weights, activation)
    np.testing.assert_allclose(y, expected_y, rtol=0, atol=BOUND * np.abs(expected_y).max() + 1e-6)
    assert np.array_equal(present, expected_present)

    # The state carries over: call by call, one token each.
    steps = []
    for t in range(tokens):
        step, past = run(None, {"x": x[:, t : t + 1], "past": past})
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), y, rtol=0, atol=1e-5)
    assert np.array_equal(past, present)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_convolution_moves_to_an_image(activation: str) -> None:
    model = parsed(convolution_text(activation=activation), kernel_and_bias())
    before = interface(model)
    assert CausalConvToBlocked()(model).modified
    assert interface(model) == before
    found = operators(model.graph)
    assert found["Concat"] == found["Slice"] == found["Conv"] == found["Squeeze"] == 1
    # Of the past, of the new state, and the two around the convolution, which become part of it.
    assert found["Transpose"] == 4
    # Of the image, and of the kernel, once, at load.
    assert found["Unsqueeze"] == 2
    (conv,) = (node for node in model.graph if node.op_type == "Conv")
    assert [use.node.op_type for use in conv.outputs[0].uses()] == ["Transpose"]
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="blocked layouts are asked for on x86")
def test_onnx_runtime_runs_it_in_blocks_without_transposing(tmp_path: Path) -> None:
    model = parsed(convolution_text(24), kernel_and_bias(24))
    CausalConvToBlocked()(model)
    graph = ir.serde.serialize_model(model).SerializeToString()
    open_session(graph, optimized=tmp_path / "optimized.onnx")
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    found = Counter((node.domain, node.op_type) for node in nodes)
    assert found["com.microsoft.nchwc", "Conv"] == 1
    # Of the past and of the new state, both small.
    assert found["", "Transpose"] == 2
    assert found["com.microsoft", "QuickGelu"] == 1


def test_notices_what_is_left() -> None:
    model = parsed(convolution_text(), kernel_and_bias())
    notices_nothing_done(CausalConvToBlocked(), model, "Conv convolved is causal and was not moved")


def activate_the_image(model: ir.Model) -> None:
    conv = the(model, "Conv")
    (back,) = (use.node for use in conv.outputs[0].uses())
    between = ir.node("Relu", [conv.outputs[0]])
    back.replace_input_with(0, between.outputs[0])
    model.graph.insert_after(conv, between)


def test_notices_an_activation_within_the_layout() -> None:
    model = parsed(convolution_text(), kernel_and_bias())
    why = r"Conv .* is not followed by the transpose to \[B, 1, T, C\]"
    notices(CausalConvToBlocked(), model, activate_the_image, why)
