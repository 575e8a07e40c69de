"""The custom operators' function bodies, put into the model beside their nodes."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ingot.export.passes.graph_pass import GraphPass
from ingot.plugins.errors import IngotError
from ingot.plugins.operator import DOMAIN, VERSION
from ingot.plugins.registry import OPERATORS


class BodyError(IngotError):
    """A graph in which one operator would need two function bodies."""


class AttachFunctionBodies(GraphPass):
    """Adds the standard-operator body of every ``ingot`` operator the graph uses.

    So any ONNX runtime can run the model, with or without our kernels.

    Raises:
        BodyError: two nodes of one operator need different bodies.
    """

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            known = node.domain != DOMAIN or node.op_type in OPERATORS
            self.require(known, node, "is no operator of ours")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        bodies: dict[ir.OperatorIdentifier, onnx.FunctionProto] = {}
        for node in model.graph:
            if node.domain != DOMAIN:
                continue
            body = OPERATORS[node.op_type].body(node)
            # Whether debugging or not: the second node would compute the first one's numbers.
            if bodies.setdefault(node.op_identifier(), body) != body:
                raise BodyError(
                    f"{node.op_type} {node.outputs[0].name} needs another function body than a "
                    "node before it, and a model has one for each operator: all layers must have "
                    "one activation and one convolution width."
                )
        missing = {name: body for name, body in bodies.items() if name not in model.functions}
        for name, body in missing.items():
            model.functions[name] = ir.serde.deserialize_function(body)
        if missing:
            model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=bool(missing))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.domain == DOMAIN:
                self.ensure(node.op_identifier() in model.functions, node, "has no function body")
                imported = model.opset_imports.get(DOMAIN) == VERSION
                self.ensure(imported, node, f"has no import of {DOMAIN} {VERSION}")
