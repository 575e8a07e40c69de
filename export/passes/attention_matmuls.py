"""``Attention`` -> the two products and the softmax it stands for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.export.passes.constants import constant, integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import is_plain_attention
from ingot.export.passes.nodes import Nodes, additive_bias
from ingot.export.passes.replace import take_place


class AttentionToMatMuls(GraphPass):
    """Takes float32 attention apart, for which TensorRT has no fused kernel.

    TensorRT refuses such a node unless it is marked decomposable, which an ONNX file cannot say;
    and TensorRT-RTX 1.7.1 ends without a message where one is marked and a Loop of unknown length
    is in the same network, as in the function bodies of the mixtures of experts.

    Grouped heads get an axis of their own, so that no key or value is repeated.
    """

    looks_for = ("Attention",)

    def requires(self, model: ir.Model) -> None:
        for node in filter(_is_wide, model.graph):
            plain = is_plain_attention(node)
            self.require(plain, node, "is more than q, k, v, a bool mask and a scale")
            shapes = [value.shape for value in node.inputs[:3] if value is not None]
            known = all(shape is not None and len(shape) == 4 for shape in shapes)
            text = ", ".join(map(str, shapes))
            self.require(known, node, f"is over {text}, not [B, h, T, D] each")
            sizes = [size for shape in shapes if shape is not None for size in shape[1::2]]
            static = all(isinstance(size, int) for size in sizes)
            self.require(static, node, f"is over {text}, with heads or head sizes unknown")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if _is_wide(node)]
        biases: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            _take_apart(model, node, biases)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(not _is_wide(node), node, "is left in float32")
            if node.op_type == "Softmax":
                self.ensure(node.attributes.get_int("axis", -1) == -1, node, "is not over the keys")


def _is_wide(node: ir.Node) -> bool:
    return node.op_type == "Attention" and node.outputs[0].dtype == ir.DataType.FLOAT


def _take_apart(model: ir.Model, node: ir.Node, biases: dict[ir.Value, ir.Value]) -> None:
    query, key, value, mask = node.inputs[:4]
    assert query is not None and key is not None and value is not None and mask is not None
    assert query.shape is not None and key.shape is not None
    heads, size, groups = query.shape[1], query.shape[3], key.shape[1]
    assert isinstance(heads, int) and isinstance(size, int) and isinstance(groups, int)
    nodes = Nodes()
    if mask not in biases:
        biases[mask] = additive_bias(model, nodes, mask)
    bias = biases[mask]
    if heads != groups:
        one, two = integers(model, [1]), integers(model, [2])
        apart = integers(model, [0, groups, heads // groups, -1, size])
        query = nodes.add("Reshape", query, apart)
        key, value = nodes.add("Unsqueeze", key, two), nodes.add("Unsqueeze", value, two)
        bias = nodes.add("Unsqueeze", bias, one)
    swap = (0, 1, 3, 2) if heads == groups else (0, 1, 2, 4, 3)
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else size**-0.5
    factor = constant(model, f"attention_scale_{scale!r}", np.array(scale, dtype=np.float32))
    scaled = nodes.add("Mul", query, factor)
    scores = nodes.add("MatMul", scaled, nodes.add("Transpose", key, perm=swap))
    weights = nodes.add("Softmax", nodes.add("Add", scores, bias), axis=-1)
    result = nodes.add("MatMul", weights, value)
    if heads != groups:
        result = nodes.add("Reshape", result, integers(model, [0, heads, -1, size]))
    model.graph.insert_before(node, nodes)
    take_place(node.outputs[0], result)
    model.graph.remove(node, safe=True)
