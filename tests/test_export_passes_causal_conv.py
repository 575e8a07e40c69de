"""The causal convolution becomes one operator: the graph, its numbers and its conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from convolution_graph import ACTIVATIONS, causal, convolution_text, kernel_and_bias
from text_graph import (
    interface,
    notices,
    notices_nothing_done,
    operators,
    parsed,
    refuses,
    run,
    the,
)

from ingot.export.passes.causal_conv import CausalConvToOperator
from ingot.export.passes.functions import AttachFunctionBodies


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_convolution_becomes_one_node(activation: str, bias: bool) -> None:
    weights = kernel_and_bias(bias=bias)
    model = parsed(convolution_text(activation=activation, bias=bias), weights)
    before = interface(model)
    random = np.random.default_rng(1)
    x = random.normal(size=(2, 5, 6)).astype(np.float32)
    past = random.normal(size=(2, 6, 3)).astype(np.float32)
    expected, expected_present = causal(x, past, weights, activation)
    assert CausalConvToOperator()(model).modified
    assert interface(model) == before
    left = operators(model.graph)
    assert left["CausalConv"] == 1
    assert not left.keys() & {"Conv", "Concat", "Transpose", "Slice", "Sigmoid", "Gelu", "Relu"}
    assert the(model, "CausalConv").attributes["activation"].as_string() == activation
    # In standard operators, which the function body has.
    AttachFunctionBodies()(model)
    found = run(model, {"x": x, "past": past})
    np.testing.assert_allclose(found["y"], expected, rtol=0, atol=1e-5)
    assert np.array_equal(found["present"], expected_present)


def test_a_convolution_without_activation_is_an_identity() -> None:
    text = convolution_text(activation="relu").replace("activated = Relu (convolved)", "")
    model = parsed(text.replace("(activated)", "(convolved)"), kernel_and_bias())
    assert CausalConvToOperator()(model).modified
    assert the(model, "CausalConv").attributes["activation"].as_string() == "identity"


def test_refuses_what_the_operator_cannot_hold() -> None:
    model = parsed(convolution_text(), kernel_and_bias())
    _, weight, bias = the(model, "Conv").inputs
    assert weight is not None and bias is not None
    bias.shape = ir.Shape([1])
    refuses(CausalConvToOperator(), model, r"Conv convolved has a bias that is not \[C\]")
    weight.type = None
    refuses(CausalConvToOperator(), model, "Conv convolved has a weight of unknown dtype")


def test_notices_what_is_left() -> None:
    model = parsed(convolution_text(), kernel_and_bias())
    notices_nothing_done(CausalConvToOperator(), model, "Conv convolved is causal and was not")


def swap_bias_and_weight(model: ir.Model) -> None:
    node = the(model, "CausalConv")
    _, _, weight, bias = node.inputs
    node.replace_input_with(2, bias)
    node.replace_input_with(3, weight)


def forget_the_state(model: ir.Model) -> None:
    node = the(model, "CausalConv")
    node.replace_input_with(1, node.inputs[0])


def rename_the_state(model: ir.Model) -> None:
    model.graph.outputs[1].name = "val_9"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (swap_bias_and_weight, "CausalConv .* has a state or a bias that its weight does not fit"),
        (forget_the_state, "CausalConv .* has a state or a bias that its weight does not fit"),
        (rename_the_state, "the graph had .*present"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(CausalConvToOperator(), parsed(convolution_text(), kernel_and_bias()), spoil, why)
