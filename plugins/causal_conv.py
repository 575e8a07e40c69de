"""``ingot::CausalConv``: a causal depthwise convolution that carries its last inputs along.

With ``window = state ++ x`` along the tokens, for every channel c::

    y[t, c] = act(bias[c] + sum_w weight[c, 0, w] * window[t + w, c])
    new_state = the last W-1 tokens of window

The canonical graph has it in standard operators; this operator exists for targets that fuse them.
So there is no eager form of it here beside the function body, and ``graphs/mamba2.py`` defines it.

Source: the short convolution of Mamba (Gu and Dao 2023, arXiv:2312.00752, section 3.4).

Shape letters: B batch, T tokens, C channels, W width.
"""

from __future__ import annotations

import onnx
import onnx.parser
from onnx.defs import OpSchema

from plugins.moe_dispatch import ACTIVATIONS, activation_body

DOMAIN = "ingot"
NAME = "CausalConv"
VERSION = 1
BODY_OPSET = 23

SCHEMA = OpSchema(
    NAME,
    DOMAIN,
    VERSION,
    doc=__doc__ or "",
    inputs=[
        OpSchema.FormalParameter("x", "T", "[B, T, C]"),
        OpSchema.FormalParameter("state", "T", "[B, C, W-1]"),
        OpSchema.FormalParameter("weight", "T", "[C, 1, W]"),
        OpSchema.FormalParameter("bias", "T", "[C]"),
    ],
    outputs=[
        OpSchema.FormalParameter("y", "T", "[B, T, C]"),
        OpSchema.FormalParameter("new_state", "T", "[B, C, W-1]"),
    ],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
    attributes=[
        OpSchema.Attribute(
            "activation", OpSchema.AttrType.STRING, ", ".join((*ACTIVATIONS, "identity"))
        )
    ],
)


def function_body(activation: str, channels: int, width: int) -> onnx.FunctionProto:
    """The operator in standard ONNX operators, for runtimes without a kernel of its own.

    A function can take neither the group of a Conv nor a branch from its inputs, so one body
    serves one shape and one activation.

    Args:
        activation: a key of ``plugins.moe_dispatch.ACTIVATIONS``, or ``identity``.
        channels: C.
        width: W.
    """
    text = f"""
    <opset_import: ["" : {BODY_OPSET}], domain: "{DOMAIN}">
    {NAME} <activation> (x, state, weight, bias) => (y, new_state)
    {{
        columns = Transpose <perm = [0, 2, 1]> (x)
        window = Concat <axis = 2> (state, columns)
        convolved = Conv <group = {channels}> (window, weight, bias)
        {activation_body(activation, "convolved")}
        y = Transpose <perm = [0, 2, 1]> (activated)
        start = Constant <value_ints: ints = [{1 - width}]> ()
        end = Constant <value_ints: ints = [{2**63 - 1}]> ()
        axis = Constant <value_ints: ints = [2]> ()
        new_state = Slice (window, start, end, axis)
    }}
    """
    return onnx.parser.parse_function(text)
