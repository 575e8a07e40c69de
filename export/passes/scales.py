"""Constant multipliers on the signal path, folded into the weights before them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.export.passes.constants import constant
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import producer
from ingot.export.passes.replace import take_place
from ingot.export.passes.weights import Weight, scale

# Metadata of a node: the factor that its second input was rounded from.
FACTOR = "ingot.factor"
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class NoteFactors(GraphPass):
    """Notes each constant factor before it is rounded to the precision of what it multiplies.

    PyTorch multiplies a half-precision tensor by a Python number in float32 and rounds the result;
    the exporter casts the number first, and the cast folds away. In bfloat16 that alone would make
    a multiplier of 0.22 wrong by 0.3 %. ``FoldScales`` takes the note. So the pass runs on what
    the exporter returns, before any constant is folded.
    """

    looks_for = ("Mul", "Div")

    def requires(self, model: ir.Model) -> None:
        for node in filter(_is_half_product, model.graph):
            factor = node.inputs[1]
            folded = ir.convenience.get_const_tensor(factor) if factor is not None else None
            late = folded is not None and folded.size == 1
            self.require(not late, node, "has a factor that is rounded already")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            exact = _unrounded(node)
            if exact is not None:
                node.metadata_props[FACTOR] = repr(exact)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            noted = node.metadata_props.get(FACTOR)
            exact = _unrounded(node)
            same = exact is None if noted is None else float(noted) == exact
            self.ensure(same, node, f"multiplies by {exact} and has {noted} as its note")


def _is_half_product(node: ir.Node) -> bool:
    return node.op_type in ("Mul", "Div") and node.outputs[0].dtype in HALVES


def _unrounded(node: ir.Node) -> float | None:
    """The number that is cast to half precision and multiplied by."""
    cast = producer(node.inputs[1], "Cast") if _is_half_product(node) else None
    number = cast.inputs[0] if cast is not None else None
    exact = ir.convenience.get_const_tensor(number) if number is not None else None
    return float(exact.numpy()) if exact is not None and exact.size == 1 else None


class FoldScales(GraphPass):
    """Folds ``y * c`` and ``y / c`` into the weights that make y, so that they cost nothing.

    A linear layer takes the factor into its weight and bias. A head that shares the embedding's
    table takes it into the norm before it. An embedding whose table is shared takes it into the
    table, and the norm before the head takes the inverse.

    A value that is also an output of the graph, or has another use, keeps its multiplication, in
    float32 where the factor is not one of the graph's precision.

    Args:
        matrices: whether a matrix or a table may take a factor; its numbers are then no longer the
            checkpoint's, and what is stored narrower would be rounded by that.
    """

    looks_for = ("Mul", "Div")

    def __init__(self, *, matrices: bool = True) -> None:
        super().__init__()
        self.matrices = matrices

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            product = FACTOR not in node.metadata_props or node.op_type in ("Mul", "Div")
            self.require(product, node, "has a note of a factor and multiplies by none")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            factor = _factor(node)
            value = node.inputs[0]
            if factor is None or value is None:
                continue
            producer = value.producer() if _only_use(value) else None
            if producer is not None and self._fold(producer, factor):
                take_place(node.outputs[0], value)
                model.graph.remove(node, safe=True)
            elif FACTOR in node.metadata_props:
                _widen(model, node, factor)
            else:
                continue
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(FACTOR not in node.metadata_props, node, "has a factor still to be folded")
            value = node.inputs[0] if _factor(node) is not None else None
            layer = producer(value, "MatMul") if value is not None and _only_use(value) else None
            costs = layer is not None and _own_weight(layer.inputs[1]) is not None and self.matrices
            self.ensure(not costs, node, "multiplies what a linear layer's weight could hold")

    def _fold(self, producer: ir.Node, factor: float) -> bool:
        if self.matrices:
            return _fold(producer, factor)
        norm = _norm_weight(producer) if producer.op_type == "MatMul" else None
        if norm is not None:
            scale(norm, factor)
        return norm is not None


def _factor(node: ir.Node) -> float | None:
    """c of ``y * c``, or 1/c of ``y / c``, for a constant scalar; otherwise None."""
    number = _number(node)
    if node.op_type == "Mul":
        return number
    return 1 / number if number else None


def _number(node: ir.Node) -> float | None:
    """c of ``y * c`` or ``y / c``, for a constant scalar; otherwise None."""
    if node.op_type not in ("Mul", "Div") or node.inputs[1] is None:
        return None
    if FACTOR in node.metadata_props:
        return float(node.metadata_props[FACTOR])
    constant = node.inputs[1].const_value
    if constant is None or isinstance(constant, Weight) or len(constant.shape):
        return None
    return float(constant.numpy())


def _widen(model: ir.Model, node: ir.Node, factor: float) -> None:
    """Multiply in float32 and round the product, as PyTorch does."""
    dtype = node.outputs[0].dtype
    assert dtype is not None
    exact = constant(model, f"factor_{factor!r}", np.array(factor, dtype=np.float32))
    wide = ir.node("Cast", [node.inputs[0]], attributes={"to": ir.DataType.FLOAT.value})
    product = ir.node("Mul", [wide.outputs[0], exact])
    rounded = ir.node("Cast", [product.outputs[0]], attributes={"to": dtype.value})
    model.graph.insert_before(node, [wide, product, rounded])
    take_place(node.outputs[0], rounded.outputs[0])
    model.graph.remove(node, safe=True)


def _only_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _own_weight(value: ir.Value | None) -> ir.Value | None:
    """A weight of the checkpoint with no other use."""
    if value is None or not isinstance(value.const_value, Weight) or not _only_use(value):
        return None
    return value


def _fold(producer: ir.Node, factor: float) -> bool:
    if producer.op_type == "Add":
        product, bias = producer.inputs
        layer = product.producer() if product is not None and _only_use(product) else None
        weight = _own_weight(layer.inputs[1]) if layer and layer.op_type == "MatMul" else None
        bias = _own_weight(bias)
        if weight is None or bias is None:
            return False
        scale(weight, factor)
        scale(bias, factor)
        return True
    if producer.op_type == "MatMul":
        weight = _own_weight(producer.inputs[1]) or _norm_weight(producer)
        if weight is not None:
            scale(weight, factor)
        return weight is not None
    if producer.op_type == "Gather":
        return _fold_embedding(producer.inputs[0], factor)
    return False


def _norm_weight(head: ir.Node) -> ir.Value | None:
    """The weight, to be scaled, of the norm whose only use is this product."""
    norm = producer(head.inputs[0], "RMSNormalization")
    if norm is None or not _only_use(norm.outputs[0]):
        return None
    weight = _own_weight(norm.inputs[1])
    if weight is not None:
        # It is no longer what its name says, or will not be.
        name = (norm.outputs[0].name or "").removeprefix("scaled.")
        norm.outputs[0].name = f"scaled.{name}"
    return weight


def _fold_embedding(table: ir.Value | None, factor: float) -> bool:
    if table is None or not isinstance(table.const_value, Weight):
        return False
    others = [use.node for use in table.uses() if use.node.op_type != "Gather"]
    if len(table.uses()) != 1 + len(others) or len(others) > 1:
        return False
    if others:
        # The norm before the head could not take the inverse.
        if factor == 0:
            return False
        turned = others[0].outputs[0]
        if others[0].op_type != "Transpose" or not _only_use(turned):
            return False
        norm = _norm_weight(next(iter(turned.uses())).node)
        if norm is None:
            return False
        scale(norm, 1 / factor)
    scale(table, factor)
    return True
