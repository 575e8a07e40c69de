"""The custom operators' function bodies, put into the model beside their nodes."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ingot.export.passes.graph_pass import GraphPass
from ingot.plugins.operator import DOMAIN, VERSION
from ingot.plugins.registry import OPERATORS


class AttachFunctionBodies(GraphPass):
    """Adds the standard-operator body of every ``ingot`` operator the graph uses.

    So any ONNX runtime can run the model, with or without our kernels.
    """

    def requires(self, model: ir.Model) -> None:
        bodies: dict[ir.OperatorIdentifier, onnx.FunctionProto] = {}
        for node in model.graph:
            if node.domain == DOMAIN:
                self.require(node.op_type in OPERATORS, node, "is no operator of ours")
                body = OPERATORS[node.op_type].body(node)
                shared = bodies.setdefault(node.op_identifier(), body)
                self.require(body == shared, node, "needs another body than a node before it")

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

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.domain == DOMAIN:
                self.ensure(node.op_identifier() in model.functions, node, "has no function body")
                imported = model.opset_imports.get(DOMAIN) == VERSION
                self.ensure(imported, node, f"has no import of {DOMAIN} {VERSION}")
