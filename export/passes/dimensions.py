"""Symbolic dimension names a reader understands, in place of the tracer's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

from ingot.export.passes.graph_pass import GraphPass

# How the tracer names a size.
SYMBOL = r"\bs\d+\b"


class NameDimensions(GraphPass):
    """Replaces the tracer's symbols (``s27``) by the names of the graph's documented inputs.

    Args:
        inputs: graph input name -> its dimensions, integers or names.
    """

    keeps_interface = False

    def __init__(self, inputs: dict[str, tuple[int | str, ...]]) -> None:
        super().__init__()
        self.inputs = inputs

    def requires(self, model: ir.Model) -> None:
        for value in model.graph.inputs:
            wanted = self.inputs.get(value.name or "")
            self.require(wanted is not None, value, "is an input without documented dimensions")
            fits = len(value.shape or ()) == len(wanted or ())
            self.require(fits, value, f"is {value.shape}, and documented as {wanted}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        names: dict[str, str] = {}
        for value in model.graph.inputs:
            assert value.shape is not None and value.name is not None
            for found, wanted in zip(value.shape, self.inputs[value.name], strict=True):
                if isinstance(found, ir.SymbolicDim) and isinstance(wanted, str):
                    names[str(found.value)] = wanted
        # The tracer knows that the total is past + new tokens and may spell it as that sum.
        sums = {frozenset(("past_sequence", "sequence")): "total_sequence"}

        for value in _values(model.graph):
            if value.shape is not None:
                value.shape = renamed(value.shape, names, sums)
        for value in model.graph.inputs:
            value.shape = ir.Shape(self.inputs[value.name or ""])
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.inputs:
            wanted = self.inputs[value.name or ""]
            self.ensure(value.shape == wanted, value, f"is {value.shape} and not {wanted}")
        for value in _values(model.graph):
            traced = re.search(SYMBOL, str(value.shape))
            self.ensure(traced is None, value, f"has the tracer's symbols in {value.shape}")


def renamed(
    shape: ir.Shape, names: Mapping[str, str], sums: Mapping[frozenset[str], str] | None = None
) -> ir.Shape:
    """A shape with other names of the tracer's symbols.

    Args:
        shape: what the tracer says.
        names: by symbols; those that are not there stay.
        sums: what the sum of some names is called.
    """

    def of(symbol: str) -> str:
        text = re.sub(SYMBOL, lambda m: names.get(m.group(), m.group()), symbol)
        return (sums or {}).get(frozenset(text.split(" + ")), text)

    return ir.Shape([of(str(d.value)) if isinstance(d, ir.SymbolicDim) else d for d in shape])


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]
