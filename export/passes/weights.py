"""Weights in the graph: from graph inputs to initializers, and into the layout their use wants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import torch


def _lazy(
    name: str, shape: tuple[int, ...], dtype: ir.DataType, read: Callable[[], np.ndarray]
) -> ir.LazyTensor:
    """A weight that is read anew at each use and never kept."""
    return ir.LazyTensor(
        lambda: ir.Tensor(read(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
    )


def rearrange(
    value: ir.Value, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]
) -> None:
    """Store a weight as ``change`` of what it was, of ``shape``; it stays lazy.

    Precondition: the weight has one use, which knows of the change.
    """
    before = value.const_value
    assert isinstance(before, ir.LazyTensor), f"{value.name} is no lazy weight"
    assert len(value.uses()) == 1 and value.name is not None
    value.shape = ir.Shape(shape)
    value.const_value = _lazy(
        value.name, shape, before.dtype, lambda: np.ascontiguousarray(change(before.numpy()))
    )


class WeightsToInitializers(ir.passes.InPlacePass):
    """Turns the graph inputs that stand for weights into lazy initializers.

    Precondition: weights are graph inputs named with ``prefix``.
    Postcondition: no graph input has the prefix; every weight is used.
    """

    def __init__(self, prefix: str, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self.prefix = prefix
        self.read = read

    def _read(self, name: str) -> np.ndarray:
        return self.read(name).numpy()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        weights = [v for v in graph.inputs if (v.name or "").startswith(self.prefix)]
        for value in weights:
            name = (value.name or "").removeprefix(self.prefix)
            assert value.uses(), f"the graph never uses the weight {name}"
            assert value.shape is not None and value.dtype is not None
            graph.inputs.remove(value)
            value.name = name
            value.const_value = _lazy(
                name,
                tuple(value.shape.numpy()),
                value.dtype,
                partial(self._read, name),
            )
            graph.register_initializer(value)
        return ir.passes.PassResult(model, modified=bool(weights))


class FoldWeightTransposes(ir.passes.InPlacePass):
    """Stores a linear layer's weight transposed, as MatMul wants it, instead of at each load.

    A weight with other uses, such as a tied embedding, keeps its layout and its Transpose.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
                continue
            perm = node.attributes["perm"].as_ints()
            assert weight.shape is not None
            sizes = weight.shape.numpy()
            rearrange(
                weight,
                partial(np.transpose, axes=perm),
                tuple(sizes[axis] for axis in perm),
            )
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
