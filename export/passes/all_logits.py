"""The logits of all tokens, for a target whose sessions ask for no others."""

from __future__ import annotations

import onnx_ir as ir

from ingot.export.passes.graph_pass import GraphPass
from ingot.graphs.state import KEPT, LOGITS_TO_KEEP, SEQUENCE


class AllLogits(GraphPass):
    """Takes out the input ``logits_to_keep`` and the ``Slice`` by it, as if it were always 0.

    A size that a tensor's content decides is TensorRT's hardest kind, and an engine's profile would
    have to know the largest.
    """

    looks_for = ("Slice",)
    keeps_interface = False

    def requires(self, model: ir.Model) -> None:
        for node in _negations(model):
            self.require(node.op_type == "Neg", node, f"reads {LOGITS_TO_KEEP}")
            for use in node.outputs[0].uses():
                cut = use.node.op_type == "Slice" and use.idx == 1
                self.require(cut, use.node, f"reads {LOGITS_TO_KEEP} turned around")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        negations = _negations(model)
        for node in negations:
            for cut in [use.node for use in node.outputs[0].uses()]:
                whole = cut.inputs[0]
                assert whole is not None
                ir.convenience.replace_all_uses_with(cut.outputs[0], whole)
                model.graph.remove(cut, safe=True)
            model.graph.remove(node, safe=True)
        for value in [each for each in model.graph.inputs if each.name == LOGITS_TO_KEEP]:
            model.graph.inputs.remove(value)
        model.graph.initializers.pop(LOGITS_TO_KEEP, None)
        for value in _values(model.graph):
            if value.shape is not None and KEPT in list(value.shape):
                value.shape = ir.Shape([SEQUENCE if each == KEPT else each for each in value.shape])
        return ir.passes.PassResult(model, modified=bool(negations))

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.inputs:
            self.ensure(value.name != LOGITS_TO_KEEP, value, "is still an input")
        for value in _values(model.graph):
            kept = value.shape is not None and KEPT in list(value.shape)
            self.ensure(not kept, value, f"is of shape {value.shape}")


def _negations(model: ir.Model) -> list[ir.Node]:
    """The nodes that turn the count into where the last tokens begin."""
    values = [value for value in model.graph.inputs if value.name == LOGITS_TO_KEEP]
    return [use.node for value in values for use in value.uses()]


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [output for node in graph for output in node.outputs]
