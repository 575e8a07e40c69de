"""Small constants of a graph: one of each name, of the right value."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from text_graph import parsed, run

from ingot.export.passes.constants import constant, integers

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
small (float[2, 3] x) => (float[3, 2] y) { y = Identity (x) }
"""


def test_a_name_stands_for_one_constant() -> None:
    model = parsed(TEXT)
    first = constant(model, "two", np.array([2], dtype=np.int64))
    assert constant(model, "two", np.array([3], dtype=np.int64)) is first
    assert model.graph.initializers["two"] is first
    assert first.shape == (1,) and first.dtype == ir.DataType.INT64
    assert first.const_value is not None and first.const_value.numpy().tolist() == [2]


def test_vectors_of_integers_are_told_apart() -> None:
    model = parsed(TEXT)
    vectors = [[1], [-1], [1, 1], [11], [1, -1], [0, 0, -1]]
    values = [integers(model, vector) for vector in vectors]
    assert len({value.name for value in values}) == len(vectors)
    assert integers(model, [1, -1]) is values[4]
    for vector, value in zip(vectors, values, strict=True):
        assert value.const_value is not None
        assert value.const_value.dtype == ir.DataType.INT64
        assert value.const_value.numpy().tolist() == vector


def test_a_runtime_reads_them() -> None:
    model = parsed(TEXT)
    node = ir.node("Reshape", [model.graph.inputs[0], integers(model, [3, -1])])
    model.graph.insert_before(model.graph[0], node)
    model.graph[1].replace_input_with(0, node.outputs[0])
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(run(model, {"x": x})["y"], x.reshape(3, 2))
