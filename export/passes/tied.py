"""A head that shares the embedding's table, without a transposed copy of it."""

from __future__ import annotations

import onnx_ir as ir

from ingot.export.passes.replace import take_place


class TiedHeadToFusedMatMul(ir.passes.InPlacePass):
    """``MatMul(x, Transpose(weight))`` -> ``com.microsoft::FusedMatMul`` with ``transB``.

    Left as it is, ONNX Runtime folds the Transpose at load into a second copy of the largest
    table of the model.

    Postcondition: no MatMul reads a transposed initializer.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            right = node.inputs[1] if node.op_type == "MatMul" else None
            turn = right.producer() if right is not None else None
            if turn is None or turn.op_type != "Transpose":
                continue
            weight = turn.inputs[0]
            if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
                continue
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
