"""The custom operators' function bodies, put into the model beside their nodes."""

from __future__ import annotations

import onnx_ir as ir

from ingot.plugins.operator import DOMAIN, VERSION
from ingot.plugins.registry import OPERATORS


class AttachFunctionBodies(ir.passes.InPlacePass):
    """Adds the standard-operator body of every ``ingot`` operator the graph uses.

    Postcondition: any ONNX runtime can run the model, with or without our kernels.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.domain != DOMAIN or node.op_identifier() in model.functions:
                continue
            function = ir.serde.deserialize_function(OPERATORS[node.op_type].body(node))
            model.functions[function.identifier()] = function
            modified = True
        if modified:
            model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=modified)
