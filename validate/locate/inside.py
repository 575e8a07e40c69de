"""Inside of a node: the branches that it holds, and the function that it calls.

Both are compared with those of the reference's node as whole graphs are, by what they compute, so
that a fault in the body of an operator is found at the operator of standard ONNX that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx

from ingot.validate.locate.graph import Graph, branches, uses
from ingot.validate.locate.pairs import pair_values


def differs(reference: Graph, node: onnx.NodeProto, actual: Graph, found: onnx.NodeProto) -> bool:
    """Whether a node does another thing than the reference's, in its branches or function too."""
    if reference.label(node) != actual.label(found):
        return True
    return reference.body(node) != actual.body(found)


def first_inside(
    reference: Graph,
    node: onnx.NodeProto,
    actual: Graph,
    found: onnx.NodeProto,
    pairs: Mapping[str, str],
) -> str:
    """The first operator inside of a node that is not as it should be.

    Args:
        reference: the graph as it should be.
        node: of the reference.
        actual: the ingot's graph.
        found: the node of it that is held against the other.
        pairs: of ``pair_values``.

    Returns:
        Such as ``then_branch: Mul output val_3`` or ``body: Exp output e``; one inside of another
        with both. Empty where nothing inside differs, and where the nodes have not the same parts.
    """
    mine = {body.name: body for body in _bodies(reference, node)}
    for theirs in _bodies(actual, found):
        if theirs.name not in mine:
            continue
        place = _first_of(mine[theirs.name], reference, theirs, actual, pairs)
        if place:
            return f"{theirs.name}: {place}"
    return ""


class _Body(NamedTuple):
    """A branch or a function: a graph of its own, but for the values of the outer one it reads."""

    name: str
    nodes: Sequence[onnx.NodeProto]
    inputs: Sequence[str]
    outputs: Sequence[str]
    initializers: Sequence[onnx.TensorProto] = ()
    # A function sees nothing of the graph that calls it.
    sees: bool = True


def _bodies(graph: Graph, node: onnx.NodeProto) -> Iterator[_Body]:
    """The bodies of a node, named by their attribute; of a function it is ``body``."""
    for attribute in sorted(node.attribute, key=lambda each: each.name):
        held = branches(attribute)
        for at, each in enumerate(held):
            yield _Body(
                attribute.name if len(held) == 1 else f"{attribute.name} {at}",
                each.node,
                [value.name for value in each.input],
                [value.name for value in each.output],
                each.initializer,
            )
    function = graph.functions.get((node.domain, node.op_type))
    if function is not None:
        yield _Body("body", function.node, function.input, function.output, sees=False)


def _first_of(
    body: _Body, reference: Graph, theirs: _Body, actual: Graph, pairs: Mapping[str, str]
) -> str:
    """The first wrong operator of one body."""
    known: dict[str, str] = {}
    taken: dict[str, str] = {}
    if body.sees:
        known = {name: name for name in pairs} | _constants(reference, body)
        taken = {value: name for name, value in pairs.items()} | _constants(actual, theirs)
    mine, _ = _graph(body, known, reference)
    other, names = _graph(theirs, taken, actual)
    inner = pair_values(mine, other)
    back = {value: name for name, value in inner.items()}
    made = [name for name in mine.makers if name in mine.positions]
    for value in made:
        node = mine.makers[value]
        if value not in inner:
            return f"{node.op_type} output {value}, which it does not have"
        found = other.makers[inner[value]]
        deeper = first_inside(mine, node, other, found, inner)
        read = [back.get(name) for name in other.variables(found)]
        if deeper or differs(mine, node, other, found) or read != mine.variables(node):
            # A node that only the ingot's body has stands before the one that reads it.
            unknown = next((name for name in other.variables(found) if name not in back), None)
            if unknown is not None and unknown in other.makers:
                found = other.makers[unknown]
            name = next(filter(None, found.output))
            place = f"{found.op_type} output {names.get(name, name)}"
            return f"{place}, {deeper}" if deeper else place
    return _first_reader_of_another(body, reference, theirs, actual) if body.sees else ""


def _first_reader_of_another(body: _Body, reference: Graph, theirs: _Body, actual: Graph) -> str:
    """The first operator of a body that reads a weight of the outer graph with other numbers."""
    read = {name for node in body.nodes for name in uses(node) if reference.is_weight(name)}
    for node in theirs.nodes:
        for name in uses(node):
            if name not in read or not actual.is_weight(name):
                continue
            if not np.array_equal(reference.read(name), actual.read(name)):
                return f"{node.op_type} output {next(filter(None, node.output))}"
    return ""


def _constants(graph: Graph, body: _Body) -> dict[str, str]:
    """By what they hold, the constants of the outer graph that a body reads."""
    return {
        name: name if graph.is_weight(name) else f"constant {graph.constant(name)!r}"
        for node in body.nodes
        for name in uses(node)
        if name in graph.constants
    }


def _graph(body: _Body, known: Mapping[str, str], outer: Graph) -> tuple[Graph, dict[str, str]]:
    """A body as a graph of its own, whose inputs and outputs have the same names on both sides.

    Args:
        body: the branch or function.
        known: what both sides call the outer values that it may read.
        outer: the graph that it is a part of.

    Returns:
        The graph, and its own names of the values by those that it has here.
    """
    inside = {name for node in body.nodes for name in node.output}
    inside |= {tensor.name for tensor in body.initializers}
    read = {name for node in body.nodes for name in uses(node)} - inside
    names = {name: known[name] for name in sorted(read) if name in known}
    names |= {name: f"input {at}" for at, name in enumerate(body.inputs)}
    outputs = [f"output {at}" for at in range(len(body.outputs))]
    names |= {n: out for n, out in zip(body.outputs, outputs, strict=True) if n in inside}
    nodes = [_renamed(node, names) for node in body.nodes]
    for name, output in zip(body.outputs, outputs, strict=True):
        if names.get(name) != output:
            nodes.append(onnx.helper.make_node("Identity", [names.get(name, name)], [output]))
    initializers = []
    for tensor in body.initializers:
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = names.get(tensor.name, tensor.name)
        initializers.append(copy)
    inputs = dict.fromkeys(name for name in names.values() if name not in outputs)
    model = onnx.ModelProto(
        functions=outer.model.functions,
        graph=onnx.GraphProto(
            node=nodes,
            initializer=initializers,
            input=[onnx.ValueInfoProto(name=name) for name in inputs],
            output=[onnx.ValueInfoProto(name=name) for name in outputs],
        ),
    )
    return Graph(model, outer.read, outer.precision), {new: old for old, new in names.items()}


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """A copy of a node with other names for values, in its branches too."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    _rename((copy,), names)
    return copy


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    for node in nodes:
        for field in (node.input, node.output):
            for at, name in enumerate(field):
                field[at] = names.get(name, name)
        for attribute in node.attribute:
            for graph in branches(attribute):
                _rename(graph.node, names)
                for value in graph.output:
                    value.name = names.get(value.name, value.name)
