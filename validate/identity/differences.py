"""How one graph differs from another, in sentences that name a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from ingot.plugins.errors import named, shown
from ingot.validate.identity.align import aligned
from ingot.validate.identity.bodies import (
    GRAPHS,
    Body,
    Node,
    attribute_digest,
    is_weight,
    message,
    read_function,
    read_graph,
    tensor_digest,
)
from ingot.validate.identity.formal import input_names
from ingot.validate.identity.values import attribute_text, tensor_text, type_text

FRESH = "in a fresh capture"
# What a file says of itself.
FACTS = ("ir_version", "producer_name", "producer_version", "domain", "model_version")


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        text: what it is, in a sentence without a full stop; does not name the node.
        nodes: the node of the ingot, or the one that it lacks, within those that it is inside of,
            outermost first; empty where it is of no node.
        fresh: the fresh capture's node in the place of the outermost; None where it has none.
        minor: whether it is only in what the file says of the dtype or shape of a value.
    """

    text: str
    nodes: tuple[Node, ...] = ()
    fresh: Node | None = None
    minor: bool = False

    def inside(self, node: Node, fresh: Node) -> Difference:
        """The same, of a graph inside of a node."""
        return replace(self, nodes=(node, *self.nodes), fresh=fresh)


def differences(found: onnx.ModelProto, fresh: onnx.ModelProto) -> Iterator[Difference]:
    """Whatever a graph has otherwise than a fresh capture, the names of inner values apart.

    Args:
        found: the graph of an ingot, its weights unread.
        fresh: as it should be.
    """
    yield from _model(found, fresh)
    yield from _functions(found, fresh)
    one, other = read_graph(found.graph), read_graph(fresh.graph)
    yield from _interface(found.graph, fresh.graph)
    if one.digest != other.digest:
        formal = input_names(found)
        told = [*_tensors(one, other), *_bodies(one, other, formal)]
        # What is inserted moves names about, and then what is said of them.
        yield from [each for each in told if not each.minor] or told or [_untold(one, other)]


def _model(found: onnx.ModelProto, fresh: onnx.ModelProto) -> Iterator[Difference]:
    """What a file says beside its graph and its functions."""
    mine, theirs = _opsets(found), _opsets(fresh)
    for domain in sorted(mine.keys() | theirs.keys()):
        versions = [_version(each.get(domain)) for each in (mine, theirs)]
        if versions[0] != versions[1]:
            name = domain or "ai.onnx"
            yield Difference(f"opset {name} is {versions[0]}, and {versions[1]} {FRESH}")
    for name in FACTS:
        has, has_fresh = getattr(found, name), getattr(fresh, name)
        # The local part of PyTorch's version says which card it is for, and changes no graph.
        if str(has).partition("+")[0] != str(has_fresh).partition("+")[0]:
            yield Difference(f"{name} is {shown(has)}, and {shown(has_fresh)} {FRESH}")
    without = ("graph", "functions", "opset_import", *FACTS)
    if message(found, *without) != message(fresh, *without):
        # A runtime may take options of a session from there.
        yield Difference(f"its metadata or doc strings are others than {FRESH}")


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {"" if e.domain == "ai.onnx" else e.domain: e.version for e in model.opset_import}


def _version(version: int | None) -> str:
    return "not imported" if version is None else str(version)


def _functions(found: onnx.ModelProto, fresh: onnx.ModelProto) -> Iterator[Difference]:
    """The function bodies, by their names."""
    mine, theirs = (
        {(each.domain, each.name, each.overload): each for each in model.functions}
        for model in (found, fresh)
    )
    for key in sorted(mine.keys() | theirs.keys()):
        name = f"the function {key[0]}::{key[1]}"
        if key not in theirs:
            yield Difference(f"{name} is there, and none of that name {FRESH}")
        elif key not in mine:
            yield Difference(f"{name} of a fresh capture is missing")
        else:
            one, other = read_function(mine[key]), read_function(theirs[key])
            if one.digest == other.digest:
                continue
            told = [*_bodies(one, other, input_names(found))]
            for each in told or [_untold(one, other)]:
                yield Difference(f"{name}: {_named(each)}")
    if len(found.functions) != len(mine):
        yield Difference("it has two functions of one name")


def _named(difference: Difference) -> str:
    return "".join(f"{path(node)}: " for node in difference.nodes) + difference.text


def path(node: Node) -> str:
    """What a node is called."""
    return f"{node.operator[1]} {named(node.name)}".strip()


def _interface(found: onnx.GraphProto, fresh: onnx.GraphProto) -> Iterator[Difference]:
    """Inputs and outputs, by name and in order."""
    for kind, mine, theirs in (
        ("input", found.input, fresh.input),
        ("output", found.output, fresh.output),
    ):
        names, others = [v.name for v in mine], [v.name for v in theirs]
        if names != others:
            more, less = _only(names, others), _only(others, names)
            if more:
                yield Difference(f"it has the {kind} {_list(more)}, which is none {FRESH}")
            if less:
                yield Difference(f"it lacks the {kind} {_list(less)} of a fresh capture")
            if not more and not less:
                yield Difference(f"its {kind}s are in another order than {FRESH}")
        fresh_types = {value.name: value for value in theirs}
        for value in mine:
            other = fresh_types.get(value.name)
            if other is not None and message(value) != message(other):
                types = type_text(value.type), type_text(other.type)
                yield Difference(f"{kind} {value.name} is {types[0]}, and {types[1]} {FRESH}")


def _only(names: Sequence[str], others: Sequence[str]) -> list[str]:
    return list((Counter(names) - Counter(others)).elements())


def _list(names: Sequence[str]) -> str:
    return ", ".join(named(name) for name in names[:3]) + ", ..." * (len(names) > 3)


def _tensors(one: Body, other: Body) -> Iterator[Difference]:
    """Weights by name; what reads them is another matter."""
    mine, theirs = _weights(one), _weights(other)
    more, less = _only(list(mine), list(theirs)), _only(list(theirs), list(mine))
    if more:
        yield Difference(f"it has the weight {_list(more)}, which is none {FRESH}")
    if less:
        yield Difference(f"it lacks the weight {_list(less)} of a fresh capture")
    for name in [name for name in mine if name in theirs]:
        if tensor_digest(mine[name]) != tensor_digest(theirs[name]):
            texts = tensor_text(mine[name]), tensor_text(theirs[name])
            yield Difference(f"{texts[0]} is {texts[1]} {FRESH}")


def _weights(body: Body) -> dict[str, onnx.TensorProto]:
    return {n: body.tensors[n] for n in sorted(body.own) if is_weight(body.tensors[n])}


def _bodies(
    one: Body,
    other: Body,
    formal: Mapping[tuple[str, str], Sequence[str]],
    around: Mapping[str, str] | None = None,
) -> Iterator[Difference]:
    """The nodes of two bodies, and what the bodies give.

    Args:
        one: of the ingot.
        other: of a fresh capture.
        formal: names of the inputs of operators.
        around: of bodies inside of others, the value of the ingot by the fresh one.
    """
    pairs = list(aligned(one.nodes, other.nodes))
    # The value of the ingot by the fresh one.
    same = {**(around or {}), **dict(zip(other.inputs, one.inputs, strict=False))}
    # Values of nodes that only one side has; what reads them reads others by need.
    alone: set[str] = set()
    lost: set[str] = set()
    for node, fresh in pairs:
        if node is None or fresh is None:
            alone.update(() if node is None else filter(None, node.outputs))
            lost.update(() if fresh is None else filter(None, fresh.outputs))
        else:
            same.update(zip(fresh.outputs, node.outputs, strict=False))
    wires = _Wires(one, other, same, alone, lost, formal)
    for node, fresh in pairs:
        if fresh is None and node is not None:
            yield Difference(f"there is no such node {FRESH}", (node,))
        elif node is None and fresh is not None:
            yield Difference("this node of a fresh capture is missing", (fresh,), fresh)
        elif node is not None and fresh is not None and node.whole != fresh.whole:
            for text in _texts(node, fresh, wires):
                yield Difference(text, (node,), fresh)
            for text in _types(node, fresh, wires):
                yield Difference(text, (node,), fresh, minor=True)
            yield from _inner(node, fresh, formal, same)
    for value, fresh_value in zip(one.outputs, other.outputs, strict=False):
        expected = same.get(fresh_value)
        explained = value in alone or fresh_value in lost
        if (
            expected != value
            and not explained
            and one.values.get(value) != other.values.get(fresh_value)
        ):
            called = wires.called(value), wires.called_fresh(fresh_value)
            yield Difference(f"the output {value} is {called[0]}, and {called[1]} {FRESH}")


def _inner(
    node: Node,
    fresh: Node,
    formal: Mapping[tuple[str, str], Sequence[str]],
    same: Mapping[str, str],
) -> Iterator[Difference]:
    """The graphs inside of two nodes."""
    for key in sorted(node.bodies.keys() | fresh.bodies.keys()):
        if key not in node.bodies or key not in fresh.bodies:
            yield Difference(f"its {key[0]} is another than {FRESH}", (node,), fresh)
        elif node.bodies[key].digest != fresh.bodies[key].digest:
            told = [*_bodies(node.bodies[key], fresh.bodies[key], formal, same)]
            # What is around the node is told there.
            yield from (each.inside(node, fresh) for each in told)


class _Wires:
    """What the nodes of two bodies read, the one's values by the other's."""

    def __init__(
        self,
        one: Body,
        other: Body,
        same: Mapping[str, str],
        alone: set[str],
        lost: set[str],
        formal: Mapping[tuple[str, str], Sequence[str]],
    ) -> None:
        self.one, self.other, self.same, self.formal = one, other, same, formal
        self.alone, self.lost = alone, lost
        self._makers = {name: node for node in one.nodes for name in node.outputs}
        self._fresh_makers = {name: node for node in other.nodes for name in node.outputs}

    def called(self, name: str) -> str:
        """A value of the ingot, in words."""
        return _value(name, self.one, self._makers)

    def called_fresh(self, name: str) -> str:
        """A value of a fresh capture, in words."""
        return _value(name, self.other, self._fresh_makers)

    def equal(self, name: str, fresh: str) -> bool:
        """Whether two values are the same, or differ by what is told of other nodes."""
        if name in self.alone or fresh in self.lost:
            return True
        mine, theirs = self.one.tensors.get(name), self.other.tensors.get(fresh)
        if mine is not None and theirs is not None:
            return tensor_digest(mine) == tensor_digest(theirs)
        if mine is not None or theirs is not None or not name or not fresh:
            return name == fresh == ""
        if self.same.get(fresh) == name:
            return True
        return self.one.values.get(name) == self.other.values.get(fresh)


def _texts(node: Node, fresh: Node, wires: _Wires) -> Iterator[str]:
    """What two nodes have otherwise, in themselves and in what they read."""
    if node.operator != fresh.operator:
        yield f"is {_operator(node)}, and {_operator(fresh)} {FRESH}"
        return
    if node.rest != fresh.rest:
        yield f"has another overload, doc string or metadata than {FRESH}"
    for name in sorted(node.attributes.keys() | fresh.attributes.keys()):
        mine, theirs = node.attributes.get(name), fresh.attributes.get(name)
        if mine is None or theirs is None:
            texts = [attribute_text(each) if each else "absent" for each in (mine, theirs)]
            yield f"attribute {name} is {texts[0]}, and {texts[1]} {FRESH}"
        elif attribute_digest(mine) != attribute_digest(theirs) and mine.type not in GRAPHS:
            texts = [attribute_text(each) for each in (mine, theirs)]
            if texts[0] == texts[1]:
                texts = [f"{texts[0]} and more", texts[1]]
            yield f"attribute {name} is {texts[0]}, and {texts[1]} {FRESH}"
    yield from _reads(node, fresh, wires)
    if [bool(name) for name in node.outputs] != [bool(name) for name in fresh.outputs]:
        yield f"makes other outputs than {FRESH}"


def _types(node: Node, fresh: Node, wires: _Wires) -> Iterator[str]:
    """What is said of the values that two nodes make."""
    for name, other in zip(node.outputs, fresh.outputs, strict=False):
        types = wires.one.types.get(name), wires.other.types.get(other)
        if types[0] != types[1]:
            texts = [type_text(each) for each in types]
            yield f"its output is said to be {texts[0]}, and {texts[1]} {FRESH}"


def _reads(node: Node, fresh: Node, wires: _Wires) -> Iterator[str]:
    if len(node.inputs) != len(fresh.inputs):
        yield f"reads {len(node.inputs)} values, and {len(fresh.inputs)} {FRESH}"
        return
    places = range(len(node.inputs))
    wrong = [n for n in places if not wires.equal(node.inputs[n], fresh.inputs[n])]
    left = list(wrong)
    for place in wrong:
        turned = next((n for n in left if wires.equal(node.inputs[n], fresh.inputs[place])), None)
        if turned is not None:
            left.remove(turned)
    if wrong and not left:
        read = ", ".join(wires.called(name) for name in node.inputs if name)
        yield f"reads the same values in another order than {FRESH}: {read}"
        return
    for place in wrong:
        formal = _formal(node, place, wires)
        called = wires.called(node.inputs[place]), wires.called_fresh(fresh.inputs[place])
        yield f"{formal} is {called[0]}, and {called[1]} {FRESH}"


def _formal(node: Node, place: int, wires: _Wires) -> str:
    names = wires.formal.get(node.operator, ())
    return names[place] if place < len(names) else f"input {place + 1}"


def _operator(node: Node) -> str:
    domain, name = node.operator
    return f"{domain}::{name}" if domain else name


def _value(name: str, body: Body, makers: Mapping[str, Node]) -> str:
    """A value in words: a constant by its numbers, another by the node that makes it."""
    if not name:
        return "nothing"
    if name in body.tensors:
        return tensor_text(body.tensors[name])
    if name in makers:
        return f"what {path(makers[name])} makes"
    return named(name)


def _untold(one: Body, other: Body) -> Difference:
    """Where nothing of the above tells two bodies apart, and they still are not the same."""
    known = Counter(node.whole for node in other.nodes)
    for node in one.nodes:
        if not known[node.whole]:
            return Difference(f"computes another thing than {FRESH}", (node,))
        known[node.whole] -= 1
    said = Counter((other.values[name], type_text(other.types.get(name))) for name in other.own)
    for name in sorted(one.own):
        text = type_text(one.types.get(name))
        if not said[one.values[name], text]:
            constant = tensor_text(one.tensors[name])
            return Difference(
                f"it has {constant}, said to be {text}, and there is none such {FRESH}"
            )
    return Difference(f"what it says beside its nodes is another thing than {FRESH}")
