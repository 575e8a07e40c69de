"""The custom operators' function bodies, put into the model beside their nodes."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir

from ingot.plugins import causal_conv, mamba2_scan, moe_dispatch, moe_linear

DOMAIN, VERSION = moe_dispatch.DOMAIN, moe_dispatch.VERSION

# A function cannot branch on a string, so a body may depend on the node's attributes.
BODIES: dict[str, Callable[[ir.Node], onnx.FunctionProto]] = {
    causal_conv.NAME: lambda node: _causal_conv(node),
    mamba2_scan.NAME: lambda _: mamba2_scan.function_body(),
    moe_dispatch.NAME: lambda node: moe_dispatch.function_body(
        node.attributes["activation"].as_string()
    ),
    moe_linear.NAME: lambda _: moe_linear.function_body(),
}


def _causal_conv(node: ir.Node) -> onnx.FunctionProto:
    weight = node.inputs[2]
    assert weight is not None and weight.shape is not None
    channels, _, width = weight.shape.numpy()
    return causal_conv.function_body(node.attributes["activation"].as_string(), channels, width)


class AttachFunctionBodies(ir.passes.InPlacePass):
    """Adds the standard-operator body of every ``ingot`` operator the graph uses.

    Postcondition: any ONNX runtime can run the model, with or without our kernels.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.domain != DOMAIN or node.op_identifier() in model.functions:
                continue
            function = ir.serde.deserialize_function(BODIES[node.op_type](node))
            model.functions[function.identifier()] = function
            modified = True
        if modified:
            model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=modified)
