"""Which value of an ingot's graph is which of the reference's, by what the two graphs compute.

Most names are numbered by the exporter, so a node more or less gives another value the same name.
Names that say something are those of inputs, weights, outputs, routers and hidden states. From
there on, what does the same to the same values is the same. Behind a node that only one side has,
nothing is; there the nodes of a layer are aligned in their order, as ``diff`` aligns lines of text,
and a node is taken for its partner where both are computed from a value they have in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from ingot.export.request import EXTRA_OUTPUTS
from ingot.validate.locate.graph import Graph, Label


@dataclass(frozen=True, eq=False)
class Node:
    """A node that depends on an input of its graph.

    Attributes:
        operator: its domain and name.
        label: what it does; see ``Graph.label``.
        variables: the values it reads that are no constants.
        outputs: the values it makes, in their places; the empty string where it makes none.
        position: its layer; see ``Graph.positions``.
    """

    operator: tuple[str, str]
    label: Label
    variables: tuple[str, ...]
    outputs: tuple[str, ...]
    position: int


class _Side:
    """One graph's nodes in the order of computation, and by the values they make."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = [
            Node(
                (node.domain, node.op_type),
                graph.label(node),
                tuple(graph.variables(node)),
                tuple(node.output),
                graph.positions[name],
            )
            for node in graph.model.graph.node
            if (name := next(filter(None, node.output))) in graph.positions
        ]
        self.makers = {name: node for node in self.nodes for name in filter(None, node.outputs)}

    def sources(self, node: Node, known: Mapping[str, str]) -> tuple[frozenset[str], ...]:
        """By variable, the nearest known values that it is computed from, as ``known`` has them."""
        return tuple(frozenset(self._nearest(name, known)) for name in node.variables)

    def _nearest(self, value: str, known: Mapping[str, str]) -> Iterator[str]:
        seen, rest = set(), [value]
        while rest:
            name = rest.pop()
            if name in known:
                yield known[name]
            elif name not in seen and name in self.makers:
                rest += self.makers[name].variables
            seen.add(name)


def anchors(graph: Graph) -> set[str]:
    """Values whose name says what they are, in whatever graph: outputs, routers, hidden states."""
    outputs = {value.name for value in graph.model.graph.output}
    return outputs | {n for n in graph.makers if n.partition(".")[0] in EXTRA_OUTPUTS}


def pair_values(reference: Graph, actual: Graph) -> dict[str, str]:
    """The ingot's values by those of the reference that they should equal.

    Args:
        reference: the graph as it should be.
        actual: the ingot's; it may have more nodes, and none for some of the reference's.
    """
    pairing = _Pairing(reference, actual)
    pairing.follow(lambda node: node.label)
    for node, other in pairing.aligned():
        if pairing.related(node, other):
            pairing.pair(node, other)
            pairing.follow(lambda node: node.label)
    # What reads the same and is still alone is another operator in the place of the right one.
    pairing.follow(lambda _node: ())
    return pairing.pairs


class _Pairing:
    """The pairs found so far; ``taken`` has the ingot's values among them."""

    def __init__(self, reference: Graph, actual: Graph) -> None:
        self.reference, self.actual = _Side(reference), _Side(actual)
        self._anchors = anchors(reference)
        named = reference.inputs & actual.inputs | self._anchors & actual.makers.keys()
        self.pairs = {name: name for name in named}
        self.taken = dict(self.pairs)

    def pair(self, node: Node, other: Node) -> None:
        """Take the outputs of two nodes for the same, but those that have a name to be found by."""
        for name, value in zip(node.outputs, other.outputs, strict=False):
            known = name in self.pairs or name in self._anchors or value in self.taken
            if name and value and not known:
                self.pairs[name] = self.taken[value] = value

    def follow(self, does: Callable[[Node], Label]) -> None:
        """Pair the nodes that do the same to paired values, in the order of computation."""
        alone: dict[Label, list[Node]] = defaultdict(list)
        for other in self.actual.nodes:
            if _is_alone(other, self.taken):
                alone[does(other), other.variables].append(other)
        for node in self.reference.nodes:
            if _is_alone(node, self.pairs):
                others = alone[does(node), tuple(map(self.pairs.get, node.variables))]
                if others:
                    self.pair(node, others.pop(0))

    def related(self, node: Node, other: Node) -> bool:
        """Whether both are alone, and computed from a value they have in common."""
        if not (_is_alone(node, self.pairs) and _is_alone(other, self.taken)):
            return False
        mine = frozenset[str]().union(*self.reference.sources(node, self.pairs))
        return not mine.isdisjoint(frozenset[str]().union(*self.actual.sources(other, self.taken)))

    def aligned(self) -> Iterator[tuple[Node, Node]]:
        """Nodes of both sides that stand in the same place among those of their layer."""
        mine = {n: (n.label, self.reference.sources(n, self.pairs)) for n in self.reference.nodes}
        theirs = {n: (n.label, self.actual.sources(n, self.taken)) for n in self.actual.nodes}
        both = {**mine, **theirs}
        tellings = [both.__getitem__, lambda node: node.label, lambda node: node.operator]
        for position in sorted({node.position for node in mine}):
            yield from _matched(
                [node for node in mine if node.position == position],
                [other for other in theirs if other.position == position],
                tellings,
            )


def _is_alone(node: Node, paired: Mapping[str, str]) -> bool:
    return any(name not in paired for name in node.outputs if name)


def _matched(
    nodes: Sequence[Node], others: Sequence[Node], tellings: Sequence[Callable[[Node], Any]]
) -> Iterator[tuple[Node, Node]]:
    """Nodes that match in two sequences, told apart finely first, and in the gaps less so."""
    if not tellings:
        return
    tell, *coarser = tellings
    matcher = SequenceMatcher(None, list(map(tell, nodes)), list(map(tell, others)), autojunk=False)
    for tag, begin, end, other_begin, other_end in matcher.get_opcodes():
        some, some_others = nodes[begin:end], others[other_begin:other_end]
        if tag == "equal":
            yield from zip(some, some_others, strict=True)
        else:
            yield from _matched(some, some_others, coarser)
