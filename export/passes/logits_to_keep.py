"""The logits of the last tokens alone, where a call asks for them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.export.passes.constants import constant, integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import INT64_MAX, producer
from ingot.export.passes.nodes import Nodes
from ingot.graphs.state import KEPT, LOGITS_TO_KEEP, SEQUENCE

# Of what lies between the head's product and the logits: a factor, and the types around it.
BETWEEN = ("Cast", "Div", "Mul")


class KeepLastLogits(GraphPass):
    """Gives the graph an input ``logits_to_keep [1]``: of how many of the last tokens it is asked.

    The hidden states are cut before the head's product, which makes the largest tensor of a call:
    ``[B, T, H]`` -> ``[B, kept_sequence, H]``, from column -K on. From -0 on they are all of them,
    as from before the first. The cut is behind the final norm, whose output is a hidden state, and
    those stay whole.

    The input has an initializer of 0, so that who does not know it feeds nothing and gets the
    logits of all tokens. It is the eager graph's argument of that name, of which the tracer would
    make a constant.

    Args:
        head: the weight of the head's product.
    """

    looks_for = ("MatMul",)
    keeps_interface = False

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head

    def requires(self, model: ir.Model) -> None:
        taken = LOGITS_TO_KEEP in model.graph.initializers
        self.require(not taken, LOGITS_TO_KEEP, "is the name of an initializer already")
        products = self._products(model)
        self.require(len(products) == 1, self.head, f"is multiplied by at {len(products)} places")
        for node in products:
            x, behind = node.inputs[0], _behind(node)
            whole = x is not None and x.shape is not None and list(x.shape)[1:2] == [SEQUENCE]
            self.require(whole, node, "is not over all new tokens")
            ends = [value for value in behind if value.is_graph_output()]
            self.require(len(ends) == 1, node, f"ends in {len(ends)} outputs of the graph")
            for value in behind:
                for use in value.uses():
                    known = use.node.op_type in BETWEEN
                    self.require(known, use.node, "reads logits, and is neither factor nor type")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        (product,) = self._products(model)
        count = constant(model, LOGITS_TO_KEEP, np.array([0], dtype=np.int64))
        model.graph.inputs.insert(_place(model.graph), count)
        hidden, nodes = product.inputs[0], Nodes()
        assert hidden is not None and hidden.shape is not None
        start = nodes.add("Neg", count)
        start.type, start.shape = count.type, count.shape
        end, axis = integers(model, [INT64_MAX]), integers(model, [1])
        kept = nodes.add("Slice", hidden, start, end, axis)
        kept.type, kept.shape = hidden.type, hidden.shape.copy()
        model.graph.insert_before(product, nodes)
        product.replace_input_with(0, kept)
        for value in (kept, *_behind(product)):
            _rename(value, SEQUENCE, KEPT)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        self.ensure(
            any(value.name == LOGITS_TO_KEEP for value in model.graph.inputs),
            LOGITS_TO_KEEP,
            "is no input",
        )
        for node in self._products(model):
            cut = producer(node.inputs[0], "Slice")
            self.ensure(cut is not None, node, "is over all new tokens")
            for value in _behind(node):
                named = value.shape is not None and value.shape[1] == KEPT
                self.ensure(named, value, f"is of shape {value.shape}")

    def _products(self, model: ir.Model) -> list[ir.Node]:
        """The products with the head's weight, as it is or turned."""
        weight = model.graph.initializers.get(self.head)
        uses = [] if weight is None else list(weight.uses())
        turned = [use.node for use in uses if use.node.op_type == "Transpose"]
        uses += [use for node in turned for use in node.outputs[0].uses()]
        return [use.node for use in uses if use.node.op_type == "MatMul" and use.idx == 1]


def _place(graph: ir.Graph) -> int:
    """Behind the inputs of the tokens, before the states."""
    tokens = [n for n, v in enumerate(graph.inputs) if v.dtype == ir.DataType.INT64]
    return tokens[-1] + 1


def _behind(product: ir.Node) -> list[ir.Value]:
    """What is made of a product: itself, and whatever follows from it."""
    found, ahead = [], [product.outputs[0]]
    while ahead:
        value = ahead.pop()
        found.append(value)
        ahead += [use.node.outputs[0] for use in value.uses()]
    return found


def _rename(value: ir.Value, before: str, after: str) -> None:
    if value.shape is not None:
        value.shape = ir.Shape([after if each == before else each for each in value.shape])
