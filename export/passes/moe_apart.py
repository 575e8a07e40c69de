"""``ingot::MoeDispatch`` -> two ``ingot::MoeLinear`` with the activation between."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from ingot.export.passes.constants import integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.nodes import Nodes
from ingot.export.passes.replace import take_place
from ingot.plugins.activations import activation_body
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear
from ingot.plugins.operator import BODY_OPSET, DOMAIN


class ExpertsApart(GraphPass):
    """Takes the products of a gated MLP's experts apart, where no kernel has them as one.

    ``MoeLinearToMatMuls`` makes plain products of them then, an expert each, of whatever kind there
    is a kernel for.

    Args:
        of: says of a node whether to take it apart.
    """

    looks_for = (moe_dispatch.name,)

    def __init__(self, of: Callable[[ir.Node], bool]) -> None:
        super().__init__()
        self.of = of

    def requires(self, model: ir.Model) -> None:
        for node in filter(self._taken, model.graph):
            for value in node.inputs:
                known = value is not None and value.dtype == ir.DataType.FLOAT
                self.require(known, node, "is not float32")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in filter(self._taken, list(model.graph)):
            nodes = Nodes()
            result = _apart(model, nodes, node)
            model.graph.insert_before(node, nodes)
            take_place(node.outputs[0], result)
            model.graph.remove(node, safe=True)
            modified = True
        if modified:
            RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(not self._taken(node), node, "is still one")

    def _taken(self, node: ir.Node) -> bool:
        is_dispatch = node.domain == DOMAIN and node.op_type == moe_dispatch.name
        return is_dispatch and self.of(node)


def _apart(model: ir.Model, nodes: Nodes, node: ir.Node) -> ir.Value:
    """``[N, H]``, by the words of ``plugins.moe_dispatch``."""
    x, logits, gate_up, down = node.inputs
    assert x is not None and gate_up is not None and down is not None
    assert down.shape is not None
    top_k = node.attributes["top_k"].as_int()
    best = ir.node("TopK", [logits, integers(model, [top_k])], num_outputs=2)
    nodes.append(best)
    # Of equal logits TopK gives the lower id first, as the operator does.
    ids = best.outputs[1]
    ids.type, ids.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None, top_k])
    weights = nodes.add("GatherElements", nodes.add("Softmax", logits, axis=-1), ids, axis=-1)
    if node.attributes["normalize"].as_int():
        weights = nodes.add("Div", weights, nodes.add("ReduceSum", weights, integers(model, [-1])))
    both = _linear(nodes, x, ids, gate_up)
    inner = down.shape.numpy()[2]
    half = ir.node("Split", [both, integers(model, [inner, inner])], {"axis": -1}, num_outputs=2)
    nodes.append(half)
    gate, up = half.outputs
    activated = _activated(nodes, gate, node.attributes["activation"].as_string())
    product = nodes.add("Mul", activated, up)
    product.type, product.shape = x.type, ir.Shape([None, top_k, inner])
    each = _linear(nodes, product, ids, down)
    weighted = nodes.add("Mul", each, nodes.add("Unsqueeze", weights, integers(model, [2])))
    return nodes.add("ReduceSum", weighted, integers(model, [1]), keepdims=0)


def _linear(nodes: Nodes, x: ir.Value, ids: ir.Value, weight: ir.Value) -> ir.Value:
    node = ir.node(moe_linear.name, [x, ids, weight], domain=DOMAIN)
    nodes.append(node)
    node.outputs[0].type = x.type
    return node.outputs[0]


def _activated(nodes: Nodes, value: ir.Value, activation: str) -> ir.Value:
    text = activation_body(activation, "given")
    body = onnx.parser.parse_function(
        f'<opset_import: ["" : {BODY_OPSET}], domain: "{DOMAIN}"> '
        f"activation (given) => (activated) {{ {text} }}"
    )
    values = {"given": value}
    for each in body.node:
        attributes = {a.name: ir.serde.deserialize_attribute(a) for a in each.attribute}
        node = ir.node(each.op_type, [values[name] for name in each.input], attributes)
        nodes.append(node)
        values[each.output[0]] = node.outputs[0]
    return values["activated"]
