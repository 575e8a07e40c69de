"""Nodes in the making: their order, and the bias that a mask becomes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from text_graph import parsed, run

from ingot.export.passes.nodes import Nodes, additive_bias


def test_nodes_stand_in_the_order_of_their_making() -> None:
    x = ir.val("x", ir.DataType.FLOAT, [2, 3])
    nodes = Nodes()
    turned = nodes.add("Transpose", x, perm=(1, 0))
    total = nodes.add("ReduceSum", turned, None, keepdims=0)
    assert [node.op_type for node in nodes] == ["Transpose", "ReduceSum"]
    assert [node.domain for node in nodes] == ["", ""]
    assert nodes[1].outputs[0] is total and list(nodes[1].inputs) == [turned, None]
    assert list(nodes[0].attributes["perm"].as_ints()) == [1, 0]


def test_a_bias_hides_by_the_lowest_float() -> None:
    model = parsed("""
        <ir_version: 10, opset_import: ["" : 23]>
        small (bool[b, s] mask) => (float[b, s] y) { y = Cast <to = 1> (mask) }
    """)
    nodes = Nodes()
    bias = additive_bias(model, nodes, model.graph.inputs[0])
    end = ir.node("Identity", [bias])
    end.outputs[0].name, end.outputs[0].type = "bias", ir.TensorType(ir.DataType.FLOAT)
    model.graph.extend([*nodes, end])
    model.graph.outputs.append(end.outputs[0])
    mask = np.array([[True, False], [False, False]])
    found = run(model, {"mask": mask})["bias"]
    lowest = np.finfo(np.float32).min
    np.testing.assert_array_equal(found, np.where(mask, 0, lowest).astype(np.float32))
    # A row without any key becomes an even spread, not NaN.
    assert np.isfinite(found + np.float32(3)).all()
