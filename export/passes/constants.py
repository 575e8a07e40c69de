"""Small constants of a graph, shared by name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def constant(model: ir.Model, name: str, value: np.ndarray) -> ir.Value:
    """The initializer of that name, made from ``value`` where the graph lacks it."""
    if name not in model.graph.initializers:
        tensor = ir.tensor(value, name=name)
        model.graph.register_initializer(
            ir.Value(
                name=name,
                shape=ir.Shape(value.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        )
    return model.graph.initializers[name]


def integers(model: ir.Model, values: list[int]) -> ir.Value:
    """A shared int64 vector constant."""
    name = "int64_" + "_".join(str(value).replace("-", "m") for value in values)
    return constant(model, name, np.array(values, dtype=np.int64))
