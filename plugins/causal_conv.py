"""``ingot::CausalConv``: a causal depthwise convolution that carries its last inputs along.

With ``window = state ++ x`` along the tokens, for every channel c::

    y[t, c] = act(bias[c] + sum_w weight[c, 0, w] * window[t + w, c])
    new_state = the last W-1 tokens of window

The eager graph calls the operator. The canonical graph has it in the standard operators that
``translate`` makes of the call, for runtimes have a Conv of their own, and the ONNX operator stands
where a target has a kernel that fuses them.

Source: the short convolution of Mamba (Gu and Dao 2023, arXiv:2312.00752, section 3.4).

Shape letters: B batch, T tokens, C channels, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ingot.plugins.activations import activate, activation_body
from ingot.plugins.operator import BODY_OPSET, DOMAIN, Attribute, Operator, tensor

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import torch

# Limit of the kernel.
MOST_WIDTH = 8
INT64_MAX = 2**63 - 1


def eager(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager reference of the operator; the module docstring has the formula.

    Args:
        x: ``[B, T, C]``, float32, float16, bfloat16 or float64. Padding is zeros, as what lies
            before a sequence is.
        state: the W-1 columns before the first token, ``[B, C, W-1]`` of x's dtype.
        weight: ``[C, 1, W]`` of x's dtype; W is at least 2.
        bias: ``[C]`` of x's dtype, or None.
        activation: a key of ``plugins.activations.ACTIVATIONS``.

    Returns:
        ``y [B, T, C]`` and the last W-1 columns, ``[B, C, W-1]``, both of x's dtype and contiguous,
        as the kernel writes them.
    """
    import torch
    import torch.nn.functional as F

    tokens, channels = x.shape[1:]
    window = torch.cat((state, x.transpose(1, 2)), dim=-1)
    new_state = window[..., tokens:].contiguous()
    # PyTorch refuses a window shorter than the kernel, whose result has no column.
    if tokens == 0:
        return x.new_empty(x.shape), new_state
    y = F.conv1d(window, weight, bias, groups=channels)
    y = activate(activation, y)
    return y.transpose(1, 2).contiguous(), new_state


def translate(x: Any, state: Any, weight: Any, bias: Any, activation: str) -> Any:
    """Entry of the torch exporter's translation table: one FX call becomes standard operators.

    They stand as ``export.passes.match.match_causal_conv`` knows them. Every size comes from
    the weight, so B and T stay symbolic.
    """
    from onnxscript import opset23 as op

    channels, _, width = weight.shape
    columns = op.Transpose(x, perm=[0, 2, 1])
    window = op.Concat(state, columns, axis=-1)
    convolved = op.Conv(window, weight, bias, group=channels)
    y = op.Transpose(_activated(convolved, activation), perm=[0, 2, 1])
    # starts, ends, axes
    last: list[Any] = [op.Constant(value_ints=[number]) for number in (1 - width, INT64_MAX, 2)]
    return y, op.Slice(window, *last)


def _activated(value: Any, activation: str) -> Any:
    """The activation in the exporter's operators."""
    from onnxscript import opset23 as op

    if activation == "silu":
        return op.Mul(value, op.Sigmoid(value))
    if activation == "gelu":
        return op.Gelu(value)
    if activation == "gelu_tanh":
        return op.Gelu(value, approximate="tanh")
    return op.Relu(value) if activation == "relu" else value


def function_body(activation: str, channels: int, width: int) -> onnx.FunctionProto:
    """The operator in standard ONNX operators, for runtimes without a kernel of its own.

    A function can take neither the group of a Conv nor a branch from its inputs, so one body
    serves one shape and one activation.

    Args:
        activation: a key of ``plugins.activations.ACTIVATIONS``.
        channels: C.
        width: W.
    """
    import onnx.parser

    text = f"""
    <opset_import: ["" : {BODY_OPSET}], domain: "{DOMAIN}">
    CausalConv <activation> (x, state, weight, bias) => (y, new_state)
    {{
        columns = Transpose <perm = [0, 2, 1]> (x)
        window = Concat <axis = 2> (state, columns)
        convolved = Conv <group = {channels}> (window, weight, bias)
        {activation_body(activation, "convolved")}
        y = Transpose <perm = [0, 2, 1]> (activated)
        start = Constant <value_ints: ints = [{1 - width}]> ()
        end = Constant <value_ints: ints = [{INT64_MAX}]> ()
        axis = Constant <value_ints: ints = [2]> ()
        new_state = Slice (window, start, end, axis)
    }}
    """
    return onnx.parser.parse_function(text)


def body(node: ir.Node) -> onnx.FunctionProto:
    """``function_body`` of a node, whose weight has a shape."""
    weight = node.inputs[2]
    assert weight is not None and weight.shape is not None
    channels, _, width = weight.shape.numpy()
    return function_body(node.attributes["activation"].as_string(), channels, width)


def refusal(sizes: Mapping[str, int], dtype: str) -> str:
    """Why the kernel does not take these sizes, and the way out; empty where it does."""
    if sizes["W"] > MOST_WIDTH:
        return f"width {sizes['W']}; the kernel takes up to {MOST_WIDTH}: export for --target ort"
    return ""


causal_conv = Operator(
    "CausalConv",
    doc=__doc__ or "",
    eager=eager,
    body=body,
    refusal=refusal,
    inputs=(
        tensor("x", "T", "B T C"),
        tensor("state", "T", "B C W-1"),
        tensor("weight", "T", "C 1 W", draw="scaled"),
        tensor("bias", "T", "C", optional=True),
    ),
    outputs=(tensor("y", "T", "B T C"), tensor("new_state", "T", "B C W-1")),
    attributes=(Attribute("activation", "activation"),),
    call="activation batch=B tokens=T channels=C width=W",
    kernels="mamba2",
    workspace=False,
)
