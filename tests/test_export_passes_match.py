"""What passes look for: the convolution they know, and every other that they leave alone."""

from __future__ import annotations

import pytest
from convolution_graph import ACTIVATIONS, SILU, convolution_text, kernel_and_bias
from text_graph import parsed, the, wiring

from ingot.export.passes.causal_conv import CausalConvToOperator
from ingot.export.passes.convolution import CausalConvToBlocked
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import (
    is_plain_attention,
    match_causal_conv,
    only_reader,
    producer,
    read_only_by,
    transposes,
)

LEFT_ALONE = {
    "padded": ("pads = [0, 0]", "pads = [3, 0]"),
    "strided": ("strides = [1]", "strides = [2]"),
    "dilated": ("dilations = [1]", "dilations = [2]"),
    "padded by name": ("pads = [0, 0]", 'auto_pad = "SAME_LOWER"'),
    "not depthwise": ("group = 6", "group = 1"),
    "new columns first": ("(past, columns)", "(columns, past)"),
    "no transpose in": ("columns = Transpose <perm = [0, 2, 1]> (x)", "columns = Identity (x)"),
    "another transpose in": ("columns = Transpose <perm = [0, 2, 1]>", "columns = Transpose"),
    "another transpose out": ("y = Transpose <perm = [0, 2, 1]>", "y = Transpose"),
    "no transpose out": ("y = Transpose <perm = [0, 2, 1]> (activated)", "y = Relu (activated)"),
    "another part of the window as state": ("int64[1] {-3}", "int64[1] {-4}"),
    "the state along another axis": ("(window, start, end, axis", "(window, start, end, step"),
    "a state up to some column": ("int64[1] {9223372036854775807}", "int64[1] {7}"),
    "every second column as state": ("axis, step)", "axis, axis)"),
    "the window read elsewhere": ("y = Tr", "more = Relu (window) y = Tr"),
    "the columns read elsewhere": ("y = Tr", "more = Relu (columns) y = Tr"),
    "the convolution read elsewhere": ("y = Tr", "more = Relu (convolved) y = Tr"),
    "the sigmoid read elsewhere": ("y = Tr", "more = Relu (sigmoid) y = Tr"),
    "the activation read elsewhere": ("y = Tr", "more = Relu (activated) y = Tr"),
    "a state from elsewhere": ("present = Slice (window,", "present = Slice (past,"),
    "the window as an output": ("present)", "present, float[b, 6, s] window)"),
    "the convolution as an output": ("present)", "present, float[b, 6, t] convolved)"),
    "the activation as an output": ("present)", "present, float[b, 6, t] activated)"),
    "scaled channels": (SILU, "activated = Mul (convolved, bias)"),
}


@pytest.mark.parametrize("change", LEFT_ALONE)
@pytest.mark.parametrize("lowering", [CausalConvToBlocked, CausalConvToOperator])
def test_any_other_convolution_is_left_alone(lowering: type[GraphPass], change: str) -> None:
    old, new = LEFT_ALONE[change]
    text = convolution_text()
    assert old in text
    model = parsed(text.replace(old, new, 1), kernel_and_bias())
    before = wiring(model)
    assert match_causal_conv(the(model, "Conv")) is None
    assert not lowering()(model).modified
    assert wiring(model) == before


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_knows_a_causal_convolution_by_its_parts(activation: str) -> None:
    model = parsed(convolution_text(activation=activation), kernel_and_bias())
    match = match_causal_conv(the(model, "Conv"))
    assert match is not None
    parts = [match.inward, match.concat, match.tail, match.conv, match.outward]
    names = ["columns", "window", "present", "convolved", "y"]
    assert [node.outputs[0].name for node in parts] == names
    kinds = {"silu": ["Sigmoid", "Mul"], "relu": ["Relu"]}.get(activation, ["Gelu"])
    assert [node.op_type for node in match.activation] == kinds
    assert match_causal_conv(match.inward) is None


def test_knows_a_convolution_without_an_activation() -> None:
    text = convolution_text(activation="relu").replace("activated = Relu (convolved)", "")
    model = parsed(text.replace("(activated)", "(convolved)"), kernel_and_bias())
    match = match_causal_conv(the(model, "Conv"))
    assert match is not None and match.activation == ()


CHAIN = """
<ir_version: 10, opset_import: ["" : 23]>
chain (float[2, 3] x) => (float[3, 2] z, float[2, 3] out) {
    a = Relu (x)
    y = Transpose <perm = [1, 0]> (a)
    z = Add (y, y)
    b = Relu (x)
    out = Add (b, a)
}
"""


def test_readers_of_a_value() -> None:
    a, y, z, b, out = parsed(CHAIN).graph
    assert producer(y.inputs[0], "Relu") is a
    assert producer(y.inputs[0], "Tanh") is producer(a.inputs[0], "Relu") is None
    assert producer(None, "Relu") is None
    assert only_reader(b) is out
    # Two readers; one that reads twice; none but the graph's output.
    assert only_reader(a) is only_reader(y) is only_reader(z) is None
    assert read_only_by(a, [out, y]) and read_only_by(y, [z, z])
    assert not read_only_by(a, [y]) and not read_only_by(y, [z]) and not read_only_by(z, [])


def test_a_transpose_by_its_order() -> None:
    a, y, *_ = parsed(CHAIN).graph
    assert transposes(y, (1, 0))
    assert not transposes(y, (0, 1)) and not transposes(a, (1, 0)) and not transposes(None, (1, 0))


@pytest.mark.parametrize(
    ("attributes", "inputs", "plain"),
    [
        ("", "q, k, v, mask", True),
        (
            "<scale = 0.5, is_causal = 0, softcap = 0.0, qk_matmul_output_mode = 0>",
            "q, k, v, mask",
            True,
        ),
        ("<is_causal = 1>", "q, k, v, mask", False),
        ("<softcap = 2.0>", "q, k, v, mask", False),
        ("<softmax_precision = 1>", "q, k, v, mask", False),
        ("", "q, k, v", False),
        ("", "q, k, v, q", False),
        ("", "q, k, v, mask, k, v", False),
    ],
)
def test_attention_with_no_more_than_a_scale(attributes: str, inputs: str, plain: bool) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    attention (
        float[1, 2, 3, 4] q, float[1, 2, 3, 4] k, float[1, 2, 3, 4] v, bool[1, 1, 3, 3] mask
    ) => (y) {{
        y = Attention {attributes} ({inputs})
    }}
    """
    assert is_plain_attention(the(parsed(text), "Attention")) == plain
