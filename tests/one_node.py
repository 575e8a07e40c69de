"""Models of one ``ingot`` operator, for tests of its body and of the passes that lower it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from ingot.export.passes.weights import Weight
from ingot.runtime.onnxruntime_session import open_session

OPSET = 23


def weight(name: str, array: np.ndarray) -> ir.Value:
    """An initializer that passes see as a weight of a checkpoint: read late, a block at a time."""
    dtype = ir.DataType.from_numpy(array.dtype)
    # What `Weight` takes for a stack with a block an expert.
    stack = array.ndim == 3 and array.shape[1] > 1
    tensor = Weight(name, array.shape, dtype, lambda block: array[block] if stack else array)
    return ir.val(name, dtype, array.shape, const_value=tensor)


def one_node(
    body: onnx.FunctionProto,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    attributes: Mapping[str, int | float | str] | None = None,
    *,
    unused: Sequence[ir.Value] = (),
    version: int = 1,
) -> ir.Model:
    """The operator that ``body`` defines, with its body, between graph inputs and graph outputs.

    Args:
        body: names the operator and its domain.
        inputs: of the operator, in order: an initializer (``weight``), or a graph input
            (``onnx_ir.val(name, dtype, shape)``).
        outputs: of the graph, in the order of the operator's own; names, dtypes and shapes.
        attributes: of the operator.
        unused: further graph inputs, which a pass may ask for.
        version: of the operator.
    """
    node = ir.node(
        body.name,
        inputs,
        attributes=attributes or {},
        domain=body.domain,
        num_outputs=len(outputs),
    )
    # As in a whole model, the operator's outputs are not those of the graph.
    ends = []
    for made, output in zip(node.outputs, outputs, strict=True):
        made.type, made.shape = output.type, output.shape
        ends.append(ir.node("Identity", [made], outputs=[output]))
    function = ir.serde.deserialize_function(body)
    graph = ir.Graph(
        [value for value in (*inputs, *unused) if value.const_value is None],
        outputs,
        nodes=[node, *ends],
        initializers=[value for value in inputs if value.const_value is not None],
        opset_imports={"": OPSET, body.domain: version},
        name="one_node",
    )
    model = ir.Model(graph, ir_version=10, functions=[function])
    onnx.checker.check_model(ir.serde.serialize_model(model))
    return model


def session(model: ir.Model, *passes: ir.passes.PassBase) -> onnxruntime.InferenceSession:
    """Apply ``passes`` in place and open the result, on two threads."""
    for change in passes:
        change(model)
    return open_session(ir.serde.serialize_model(model).SerializeToString(), threads=2)
