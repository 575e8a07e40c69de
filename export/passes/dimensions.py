"""Symbolic dimension names a reader understands, in place of the tracer's."""

from __future__ import annotations

import re

import onnx_ir as ir


class NameDimensions(ir.passes.InPlacePass):
    """Replaces the tracer's symbols (``s27``) by the names of the graph's documented inputs.

    Args:
        inputs: graph input name -> its dimensions, integers or names.

    Postcondition: every graph input has exactly the shape given here.
    """

    def __init__(self, inputs: dict[str, tuple[int | str, ...]]) -> None:
        super().__init__()
        self.inputs = inputs

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        names: dict[str, str] = {}
        for value in model.graph.inputs:
            assert value.shape is not None and value.name is not None
            for found, wanted in zip(value.shape, self.inputs[value.name], strict=True):
                if isinstance(found, ir.SymbolicDim) and isinstance(wanted, str):
                    names[str(found.value)] = wanted
        # The tracer knows that the total is past + new tokens and may spell it as that sum.
        sums = {frozenset(("past_sequence", "sequence")): "total_sequence"}

        def renamed(symbol: str) -> str:
            text = re.sub(r"\bs\d+\b", lambda m: names.get(m.group(), m.group()), symbol)
            return sums.get(frozenset(text.split(" + ")), text)

        for value in _values(model.graph):
            if value.shape is not None:
                value.shape = ir.Shape(
                    [
                        renamed(str(d.value)) if isinstance(d, ir.SymbolicDim) else d
                        for d in value.shape
                    ]
                )
        for value in model.graph.inputs:
            value.shape = ir.Shape(self.inputs[value.name or ""])
        return ir.passes.PassResult(model, modified=True)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]
