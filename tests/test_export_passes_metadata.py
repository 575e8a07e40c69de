"""What the tracer noted is removed; the numbers are as they were."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from text_graph import notices, notices_nothing_done, parsed, refuses, run, the

from ingot.export.passes.metadata import DropTracerMetadata
from ingot.export.passes.scales import FACTOR

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
small (float[n, 2] x, float[2, 3] w) => (float[n, 3] y) {
    z = MatMul (x, w)
    y = Relu (z)
}
"""
WEIGHTS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}


def noted() -> ir.Model:
    """A model with a note wherever there can be one."""
    model = parsed(TEXT, WEIGHTS)
    nodes = list(model.graph)
    values = [value for node in nodes for value in node.outputs]
    values += [*model.graph.inputs, *model.graph.initializers.values()]
    props = [model.metadata_props, model.graph.metadata_props]
    props += [node.metadata_props for node in nodes]
    props += [value.metadata_props for value in values]
    for each in props:
        each["trace"] = "/home/someone/model.py"
    return model


def test_no_note_is_left() -> None:
    model = noted()
    x = np.array([[1, -2], [3, 4]], dtype=np.float32)
    expected = run(model, {"x": x})["y"]
    assert b"someone" in ir.serde.serialize_model(model).SerializeToString()
    assert DropTracerMetadata()(model).modified
    assert b"someone" not in ir.serde.serialize_model(model).SerializeToString()
    assert np.array_equal(run(model, {"x": x})["y"], expected)
    assert np.array_equal(expected, np.maximum(x @ WEIGHTS["w"], 0))


def test_refuses_a_graph_with_another_inside() -> None:
    model = parsed("""
        <ir_version: 10, opset_import: ["" : 23]>
        branched (bool which, float[n] x) => (y) {
            y = If (which) <
                then_branch = one () => (float[n] a) { a = Relu (x) },
                else_branch = two () => (float[n] b) { b = Tanh (x) }
            >
        }
    """)
    refuses(DropTracerMetadata(), model, "Relu a is in a subgraph")


def test_refuses_a_factor_that_is_still_to_be_folded() -> None:
    model = noted()
    the(model, "Relu").metadata_props[FACTOR] = "0.25"
    refuses(DropTracerMetadata(), model, "Relu y has a note of a factor that is still to be folded")


def test_notices_what_is_left() -> None:
    notices_nothing_done(DropTracerMetadata(), noted(), "the model has metadata")


def note_a_weight(model: ir.Model) -> None:
    model.graph.initializers["w"].metadata_props["trace"] = "here"


def note_a_node(model: ir.Model) -> None:
    the(model, "Relu").metadata_props["trace"] = "here"


def test_notices_its_own_mistakes() -> None:
    notices(DropTracerMetadata(), noted(), note_a_weight, "MatMul .* has metadata, or one of its")
    notices(DropTracerMetadata(), noted(), note_a_node, "Relu .* has metadata, or one of its")
