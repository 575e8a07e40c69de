"""The base of every pass: conditions that are checked where ``INGOT_DEBUG`` is set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import ClassVar

import onnx_ir as ir


class GraphPass(ir.passes.InPlacePass):
    """A change of a graph, with what it requires and what it ensures in onnx-ir's two hooks.

    The hooks are for whoever changes a pass: they run where ``INGOT_DEBUG`` is in the environment,
    as in every test, and nowhere else. Each pass states both; one that takes any graph says so with
    ``requires = GraphPass.any_graph``. A pass sees the nodes of the graph itself: neither those
    of a subgraph nor function bodies, which serve runtimes without our kernels.

    Attributes:
        looks_for: op types that the pass would miss in a subgraph; None where any node counts.
        keeps_interface: whether the graph's inputs and outputs stay, by name, dtype and shape.

    Raises:
        PreconditionError, PostconditionError: a sentence of the pass and a node or value.
    """

    looks_for: ClassVar[tuple[str, ...] | None] = None
    keeps_interface: ClassVar[bool] = True

    def __call__(self, given: ir.Model | ir.passes.PassResult, /) -> ir.passes.PassResult:
        model = given.model if isinstance(given, ir.passes.PassResult) else given
        if not os.environ.get("INGOT_DEBUG"):
            return self.call(model)
        for node in model.graph.all_nodes():
            counts = self.looks_for is None or node.op_type in self.looks_for
            is_inside = counts and node.graph is not model.graph
            self.require(not is_inside, node, "is in a subgraph, where the pass does not look")
        before = _interface(model)
        result = super().__call__(model)
        after = _interface(model)
        same = before == after or not self.keeps_interface
        self.ensure(same, "the graph", f"had {before - after} and now has {after - before}")
        return result

    def any_graph(self, model: ir.Model) -> None:
        """The ``requires`` of a pass that leaves alone whatever it cannot change."""

    def require(self, holds: bool, what: ir.Node | ir.Value | str, why: str) -> None:
        """Refuse the graph unless a precondition holds."""
        if not holds:
            name = type(self).__name__
            raise ir.passes.PreconditionError(f"{name} cannot run: {_named(what)} {why}")

    def ensure(self, holds: bool, what: ir.Node | ir.Value | str, why: str) -> None:
        """Refuse the pass's own work unless a postcondition holds."""
        if not holds:
            name = type(self).__name__
            raise ir.passes.PostconditionError(f"{name} went wrong: {_named(what)} {why}")


def run(model: ir.Model, passes: Iterable[ir.passes.PassBase]) -> None:
    """Run passes in turn, each in place.

    What a pass raises comes as it is; onnx-ir's ``Sequential`` would wrap a refusal that the user
    is to read.
    """
    for each in passes:
        each(model)


def _interface(model: ir.Model) -> set[str]:
    """Direction, place, name, dtype and shape of each input and output of the graph."""
    return {
        f"{direction} {place} {value.name} {value.dtype} {value.shape}"
        for direction, values in (("input", model.graph.inputs), ("output", model.graph.outputs))
        for place, value in enumerate(values)
    }


def _named(what: ir.Node | ir.Value | str) -> str:
    if isinstance(what, ir.Node):
        return f"{what.op_type} {what.name or what.outputs[0].name}"
    return what if isinstance(what, str) else f"the value {what.name}"
