"""The custom operators' function bodies, put into the model beside their nodes."""

from __future__ import annotations

import onnx_ir as ir

from plugins import moe_dispatch


class AttachFunctionBodies(ir.passes.InPlacePass):
    """Adds the standard-operator body of every ``ingot`` operator the graph uses.

    Postcondition: any ONNX runtime can run the model, with or without our kernels.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.domain != moe_dispatch.DOMAIN or node.op_identifier() in model.functions:
                continue
            activation = node.attributes["activation"].as_string()
            function = ir.serde.deserialize_function(moe_dispatch.function_body(activation))
            model.functions[function.identifier()] = function
            modified = True
        if modified:
            model.opset_imports[moe_dispatch.DOMAIN] = moe_dispatch.VERSION
        return ir.passes.PassResult(model, modified=modified)
