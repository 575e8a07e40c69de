"""Matrices stored in a narrower type than they are computed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from ingot.export.passes.graph_pass import GraphPass, PassError
from ingot.export.passes.replace import take_place
from ingot.export.passes.weights import ReadBlock, Weight
from ingot.plugins.errors import named
from ingot.plugins.registry import OPERATORS

# Of each operator the inputs that are matrices of a linear layer, of experts, or a table.
MATRICES: dict[str, tuple[int, ...]] = {
    "Gemm": (1,),
    "MatMul": (1,),
    "FusedMatMul": (1,),
    "Transpose": (0,),
    "Gather": (0,),
    "MoE": (2, 4),
    **{
        name: tuple(
            place
            for place, tensor in enumerate(operator.inputs)
            if tensor.name in ("weight", "gate_up", "down")
        )
        for name, operator in OPERATORS.items()
        if name.startswith("Moe")
    },
}
# A router decides by small differences: its weights are as exact as the arithmetic.
ROUTER = "router_logits."


class StoreNarrow(GraphPass):
    """Stores each matrix in the type that it is asked for in, and widens it where it is read.

    What is computed is computed in float32 as before: of a table the rows that were looked up are
    widened, and of any other matrix the whole, which a runtime without a product of such a type
    does once, when it loads the graph. Norms, biases, convolutions, what a scan's time step is made
    of, and routers are small and stay as they are.

    Args:
        dtype_of: by the name of a weight, the type to store it in; a wider one than its own changes
            nothing.
    """

    looks_for = ()

    def __init__(self, dtype_of: Callable[[str], ir.DataType]) -> None:
        super().__init__()
        self.dtype_of = dtype_of

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        order = {node: place for place, node in enumerate(model.graph)}
        for value in list(model.graph.initializers.values()):
            weight = value.const_value
            if not isinstance(weight, Weight) or not is_matrix(value) or value.name is None:
                continue
            narrow = self.dtype_of(value.name)
            if narrow.itemsize >= weight.dtype.itemsize:
                continue
            wide = weight.dtype
            shape = tuple(weight.shape.numpy())
            read = partial(_narrowed, weight.read_block, narrow, value.name)
            value.const_value = Weight(value.name, shape, narrow, read, weight.origins)
            value.type = ir.TensorType(narrow)
            _widen_where_read(model, value, wide, order)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            weight = value.const_value
            if not isinstance(weight, Weight):
                continue
            self.ensure(weight.dtype == value.dtype, value, f"is stored as {weight.dtype}")
            # Whole numbers have kernels of their own.
            if weight.dtype == ir.DataType.UINT8:
                continue
            for node, _ in value.uses():
                kept = weight.dtype == ir.DataType.FLOAT or node.op_type in ("Cast", "Gather")
                self.ensure(kept, node, f"computes in the type that {value.name} is stored in")


def is_matrix(value: ir.Value) -> bool:
    """Whether an initializer is a matrix, a stack of them or a table, and no router's."""
    uses = list(value.uses())
    return bool(uses) and all(
        index in MATRICES.get(node.op_type, ()) and not _routes(node) for node, index in uses
    )


def _routes(node: ir.Node) -> bool:
    return any((output.name or "").startswith(ROUTER) for output in node.outputs)


def _widen_where_read(
    model: ir.Model, value: ir.Value, dtype: ir.DataType, order: Mapping[ir.Node, int]
) -> None:
    """Cast in front of the first node that computes with it, by the order of the nodes."""
    to = {"to": dtype.value}
    others = []
    for node, index in list(value.uses()):
        if node.op_type != "Gather":
            others.append((node, index))
            continue
        # Of a table what was looked up, so that the whole is never wide.
        result = node.outputs[0]
        rows = ir.node("Gather", list(node.inputs), attributes=node.attributes)
        wide = ir.node("Cast", [rows.outputs[0]], attributes=to)
        model.graph.insert_before(node, [rows, wide])
        take_place(result, wide.outputs[0])
        model.graph.remove(node, safe=True)
    if others:
        wide = ir.node("Cast", [value], attributes=to)
        wide.outputs[0].shape, wide.outputs[0].type = value.shape, ir.TensorType(dtype)
        wide.outputs[0].name = f"wide.{value.name}"
        first = min((node for node, _ in others), key=order.__getitem__)
        model.graph.insert_before(first, wide)
        for node, index in others:
            node.replace_input_with(index, wide.outputs[0])


def _narrowed(read: ReadBlock, dtype: ir.DataType, name: str, block: int) -> np.ndarray:
    return narrowed(read(block), dtype, name)


def narrowed(wide: np.ndarray, dtype: ir.DataType, name: str) -> np.ndarray:
    """Numbers of a weight, each rounded to the nearest of a narrower type.

    Raises:
        PassError: one that is beyond its largest.
    """
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype.numpy())
    if not np.isfinite(narrow).all():
        largest = float(np.abs(wide).max())
        raise PassError(
            f"{named(name)} holds {largest:.3g}, which is beyond {dtype.numpy().name}; give "
            "--weights bf16 or fp32."
        )
    return narrow
