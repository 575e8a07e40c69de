"""A head that shares the embedding's table, without a transposed copy of it."""

from __future__ import annotations

import onnx_ir as ir

from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import producer
from ingot.export.passes.replace import take_place


class TiedHeadToFusedMatMul(GraphPass):
    """``MatMul(x, Transpose(weight))`` -> ``com.microsoft::FusedMatMul`` with ``transB``.

    Left as it is, ONNX Runtime folds the Transpose at load into a second copy of the largest
    table of the model.
    """

    # The branches of a lowered scan have products and transposes of their own.
    looks_for = ()

    def requires(self, model: ir.Model) -> None:
        for node in model.graph.all_nodes():
            turn = _turn(node)
            if turn is not None:
                here = node.graph is model.graph
                self.require(here, node, "is in a subgraph, where the pass does not look")
                perm = list(turn.attributes.get_ints("perm", [1, 0]))
                self.require(perm == [1, 0], turn, f"does not turn a table, with {perm}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            turn = _turn(node)
            if turn is None:
                continue
            weight = turn.inputs[0]
            fused = ir.node(
                "FusedMatMul",
                [node.inputs[0], weight],
                domain="com.microsoft",
                attributes={"transB": 1},
            )
            model.graph.insert_before(node, fused)
            take_place(node.outputs[0], fused.outputs[0])
            model.graph.remove(node, safe=True)
            if not turn.outputs[0].uses():
                model.graph.remove(turn, safe=True)
            model.opset_imports["com.microsoft"] = 1
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(_turn(node) is None, node, "reads a transposed initializer")
            if node.op_type == "FusedMatMul":
                x, table = (value.shape if value is not None else None for value in node.inputs)
                fits = x is not None and table is not None and x[-1] == table[-1]
                self.ensure(fits, node, f"multiplies {x} by the turned {table}")


def _turn(node: ir.Node) -> ir.Node | None:
    """The Transpose of an initializer ``[V, H]`` that a MatMul has on its right."""
    turn = producer(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
    weight = turn.inputs[0] if turn is not None else None
    is_table = weight is not None and weight.is_initializer() and len(weight.shape or ()) == 2
    return turn if is_table else None
