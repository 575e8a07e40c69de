"""Constant multipliers on the signal path, folded into the weights before them."""

from __future__ import annotations

import onnx_ir as ir

from export.passes.replace import take_place
from export.passes.weights import Weight, scale


class FoldScales(ir.passes.InPlacePass):
    """Folds ``y * c`` and ``y / c`` into the weights that make y, so that they cost nothing.

    A linear layer takes the factor into its weight and bias. A head that shares the embedding's
    table takes it into the norm before it. An embedding whose table is shared takes it into the
    table, and the norm before the head takes the inverse.

    A value that is also an output of the graph, or has another use, keeps its multiplication.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            factor = _factor(node)
            value = node.inputs[0]
            if factor is None or value is None or not _only_use(value):
                continue
            producer = value.producer()
            if producer is None or not _fold(producer, factor):
                continue
            take_place(node.outputs[0], value)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _factor(node: ir.Node) -> float | None:
    """c of ``y * c``, or 1/c of ``y / c``, for a constant scalar; otherwise None."""
    if node.op_type not in ("Mul", "Div") or node.inputs[1] is None:
        return None
    constant = node.inputs[1].const_value
    if constant is None or isinstance(constant, Weight) or len(constant.shape):
        return None
    value = float(constant.numpy())
    return value if node.op_type == "Mul" else 1 / value


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
    """The weight of the norm whose only use is this product."""
    norm = head.inputs[0].producer() if head.inputs[0] is not None else None
    if norm is None or norm.op_type != "RMSNormalization" or not _only_use(norm.outputs[0]):
        return None
    return _own_weight(norm.inputs[1])


def _fold_embedding(table: ir.Value | None, factor: float) -> bool:
    if table is None or not isinstance(table.const_value, Weight):
        return False
    others = [use.node for use in table.uses() if use.node.op_type != "Gather"]
    if len(table.uses()) != 1 + len(others) or len(others) > 1:
        return False
    if others:
        turned = others[0].outputs[0]
        if others[0].op_type != "Transpose" or not _only_use(turned):
            return False
        norm = _norm_weight(next(iter(turned.uses())).node)
        if norm is None:
            return False
        scale(norm, 1 / factor)
    scale(table, factor)
    return True
