"""The causal depthwise convolution with its state -> one ``ingot::CausalConv``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.export.passes.constants import constant
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import CausalConv, match_causal_conv
from ingot.export.passes.replace import take_place
from ingot.plugins.causal_conv import causal_conv
from ingot.plugins.operator import DOMAIN


class CausalConvToOperator(GraphPass):
    """Gathers the transposes, the concatenation, the convolution and its activation in one node.

    Function bodies are for a later pass to attach.
    """

    looks_for = ("Conv",)

    def requires(self, model: ir.Model) -> None:
        for match in filter(None, map(match_causal_conv, model.graph)):
            weight, bias = (*match.conv.inputs[1:], None)[:2]
            assert weight is not None and weight.shape is not None
            self.require(weight.dtype is not None, match.conv, "has a weight of unknown dtype")
            fits = bias is None or bias.shape == weight.shape.numpy()[:1]
            self.require(fits, match.conv, "has a bias that is not [C]")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            match = match_causal_conv(node)
            if match is not None:
                _gather(model, match)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(match_causal_conv(node) is None, node, "is causal and was not gathered")
            if node.domain == DOMAIN and node.op_type == causal_conv.name:
                self.ensure(_fits(node), node, "has a state or a bias that its weight does not fit")


def _fits(node: ir.Node) -> bool:
    """Whether its inputs are state ``[B, C, W-1]``, weight ``[C, 1, W]`` and bias ``[C]``."""
    shapes = [value.shape for value in node.inputs if value is not None and value.shape is not None]
    if len(shapes) != 4 or not shapes[2].is_static() or len(shapes[2]) != 3:
        return False
    channels, depth, width = shapes[2].numpy()
    state = shapes[1][1:]
    return depth == 1 and state == (channels, width - 1) and shapes[3] == (channels,)


def _gather(model: ir.Model, match: CausalConv) -> None:
    weight, bias = (*match.conv.inputs[1:], None)[:2]
    assert weight is not None and weight.shape is not None and weight.dtype is not None
    if bias is None:
        channels = weight.shape.numpy()[0]
        zeros = np.zeros(channels, dtype=weight.dtype.numpy())
        bias = constant(model, f"no_bias_{channels}", zeros)
    inputs = [match.inward.inputs[0], match.concat.inputs[0], weight, bias]
    made = ir.node(
        causal_conv.name,
        inputs,
        domain=DOMAIN,
        num_outputs=2,
        attributes={"activation": _activation(match.activation)},
    )
    model.graph.insert_before(match.conv, made)
    take_place(match.outward.outputs[0], made.outputs[0])
    take_place(match.tail.outputs[0], made.outputs[1])
    done = [match.outward, *reversed(match.activation), match.conv, match.tail, match.concat]
    model.graph.remove([*done, match.inward], safe=True)


def _activation(nodes: tuple[ir.Node, ...]) -> str:
    """The operator's name of the activation that the nodes compute."""
    if not nodes:
        return "identity"
    last = nodes[-1]
    if last.op_type == "Gelu":
        approximate = last.attributes.get_string("approximate", "none")
        return "gelu_tanh" if approximate == "tanh" else "gelu"
    return {"Mul": "silu", "Swish": "silu", "Relu": "relu"}[last.op_type]
