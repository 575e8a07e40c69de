"""The base of every pass: conditions that are checked where ``INGOT_DEBUG`` is set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir

from ingot.plugins.errors import IngotError


class PassError(IngotError):
    """A graph that a pass cannot change: it is no graph that this version's tracer makes."""


class UnmetPreconditionError(PassError, ir.passes.PreconditionError):
    """A graph that is not as a pass requires; it was not changed."""


class UnmetPostconditionError(PassError, ir.passes.PostconditionError):
    """A graph that is not as a pass ensures."""


@dataclass(frozen=True)
class Applied:
    """What one pass did to a graph.

    Attributes:
        name: of the pass.
        removed: nodes that it took away, by op type, those of subgraphs among them.
        added: nodes that it put there, by op type.
        attributes: nodes that have other attributes than before.
        initializers: weights and constants that it added, or stores in another layout or by another
            factor.
        functions: function bodies that it added.
    """

    name: str
    removed: dict[str, int] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    attributes: int = 0
    initializers: int = 0
    functions: int = 0

    def summary(self) -> dict[str, Any]:
        """The name and whatever is not nothing."""
        return {name: value for name, value in vars(self).items() if value}


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
            raise UnmetPreconditionError(f"{name} cannot run: {_named(what)} {why}")

    def ensure(self, holds: bool, what: ir.Node | ir.Value | str, why: str) -> None:
        """Refuse the pass's own work unless a postcondition holds."""
        if not holds:
            name = type(self).__name__
            raise UnmetPostconditionError(f"{name} went wrong: {_named(what)} {why}")


def run(model: ir.Model, passes: Iterable[ir.passes.PassBase]) -> tuple[Applied, ...]:
    """Run passes in turn, each in place, and note what each did.

    onnx-ir's ``Sequential`` would wrap a refusal that the user is to read.

    Raises:
        IngotError: a refusal of a pass as it is; whatever else a pass raises becomes a
            ``PassError``.
    """
    applied = []
    before = _Snapshot(model)
    for each in passes:
        name = type(each).__name__
        try:
            each(model)
        except IngotError:
            raise
        # A pass that meets what it does not know fails wherever it happens to look first.
        except Exception as error:
            said = " ".join(str(error).split())
            raise PassError(
                f"{name} cannot change this graph ({type(error).__name__}: {said}); it expects "
                "what the tracer makes of the eager graphs of this version, so export again, and "
                "report this where nothing was changed."
            ) from error
        after = _Snapshot(model)
        applied.append(before.to(after, name))
        before = after
    return tuple(applied)


class _Snapshot:
    """What a graph consists of. It holds on to all of it, so that no ``id`` is used again."""

    def __init__(self, model: ir.Model) -> None:
        nodes = list(model.graph.all_nodes())
        self.nodes = {id(node): node for node in nodes}
        self.attributes = {id(node): dict(node.attributes) for node in nodes}
        self.weights = {name: value.const_value for name, value in model.graph.initializers.items()}
        self.functions = set(model.functions)

    def to(self, after: _Snapshot, name: str) -> Applied:
        """What a pass did between the two."""
        gone, new = self.nodes.keys() - after.nodes.keys(), after.nodes.keys() - self.nodes.keys()
        return Applied(
            name,
            _counted(self.nodes[each] for each in gone),
            _counted(after.nodes[each] for each in new),
            sum(
                not _same(self.attributes[each], after.attributes[each])
                for each in self.nodes.keys() & after.nodes.keys()
            ),
            sum(tensor is not self.weights.get(key) for key, tensor in after.weights.items()),
            len(after.functions - self.functions),
        )


def _counted(nodes: Iterable[ir.Node]) -> dict[str, int]:
    """By op type, in alphabetical order: the same for the same change, whatever came first."""
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether attributes are the very same; a pass replaces those that it changes."""
    return before.keys() == after.keys() and all(after[name] is before[name] for name in before)


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
