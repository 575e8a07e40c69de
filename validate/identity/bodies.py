"""What the nodes of a graph compute, each as one digest, whatever their values are called.

Two graphs in which every node has the same digests compute the same, in whatever order their nodes
stand and whatever names the exporter numbered. What a digest is made of is all that a node's
message holds but names: operator, overload, attributes, graphs inside of it, metadata, and the
digests of what it reads. Weights go by their names, dtypes and shapes; a constant inside the file
goes by its dtype, shape and bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import numpy_helper

GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@dataclass(frozen=True, eq=False)
class Node:
    """One node.

    Attributes:
        operator: its domain and op type.
        inputs: names of what it reads, in their places; the empty string where it reads nothing.
        outputs: names of what it makes, likewise.
        rest: digest of what its message says beside these, its name and its attributes.
        attributes: by name; those that are graphs are in ``bodies``.
        bodies: graphs inside of it, by attribute and number.
        types: digests of what the file says of the dtype and shape of each output.
        local: digest of operator, attributes and constants, without what other nodes give it.
        computes: digest of what the node is, with all that it is computed from.
    """

    operator: tuple[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rest: bytes
    attributes: Mapping[str, onnx.AttributeProto]
    bodies: Mapping[tuple[str, int], Body]
    types: tuple[bytes, ...]
    local: bytes
    computes: bytes

    @property
    def whole(self) -> bytes:
        """Of what it computes, and of what is said of its outputs."""
        return digest(self.computes, *self.types)

    @property
    def name(self) -> str:
        """Of its first output, by which it is found in the file."""
        return next(filter(None, self.outputs), "")


@dataclass(frozen=True, eq=False)
class Body:
    """The nodes of a graph, of a graph inside of a node, or of a function.

    Attributes:
        inputs: names, in order.
        outputs: names, in order.
        nodes: in the order of the file.
        tensors: constants and weights that nodes may read, by name, those of graphs around it
            included.
        own: the names of its own among them.
        values: digest of every value that nodes may read, by name.
        types: what the file says of dtype and shape, by the name of the value.
        rest: digest of what is said beside all this.
        digest: of all of it, whatever anything is called but the inputs and outputs of an outermost
            graph.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    tensors: Mapping[str, onnx.TensorProto]
    own: frozenset[str]
    values: Mapping[str, bytes]
    types: Mapping[str, onnx.TypeProto]
    rest: bytes
    digest: bytes = field(default=b"")


def digest(*parts: bytes) -> bytes:
    """One digest of several, each with its length."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.digest()


def message(proto: object, *without: str) -> bytes:
    """The bytes of a message without some of its fields."""
    copy = type(proto)()
    copy.CopyFrom(proto)  # type: ignore[attr-defined]
    for name in without:
        copy.ClearField(name)  # type: ignore[attr-defined]
    text: bytes = copy.SerializeToString(deterministic=True)  # type: ignore[attr-defined]
    return text


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside of them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from all_nodes(inner)


def is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether its data lies outside of the graph file."""
    external: int = onnx.TensorProto.EXTERNAL
    return tensor.data_location == external


def tensor_digest(tensor: onnx.TensorProto) -> bytes:
    """Of a weight its name, dtype and shape, of another tensor its bytes."""
    kind = f"{tensor.data_type} {list(tensor.dims)}".encode()
    if is_weight(tensor):
        return digest(b"weight", tensor.name.encode(), kind)
    if tensor.data_type == onnx.TensorProto.STRING:
        return digest(b"strings", kind, *tensor.string_data)
    try:
        data = numpy_helper.to_array(tensor).tobytes()
    # Its data does not fit its shape, or it has a dtype that there is none of.
    except (TypeError, ValueError, KeyError):
        data = message(tensor, "name")
    return digest(b"constant", kind, data, message(tensor, *_DATA))


# Fields of a tensor that its bytes and its kind say already, in whichever of them they are kept.
_DATA = (
    *("name", "data_type", "dims", "raw_data", "float_data", "int32_data", "int64_data"),
    *("double_data", "uint64_data", "string_data"),
)


def read_graph(graph: onnx.GraphProto, around: Body | None = None, depth: int = 0) -> Body:
    """The body of a graph.

    Args:
        graph: with its constants; weights are not read.
        around: the body whose values its nodes may read; None for an outermost graph.
        depth: in how many nodes it is.
    """
    infos = (*graph.value_info, *graph.input, *graph.output)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    rest = message(graph, "node", "initializer", "value_info", "input", "output", "name")
    names = tuple(value.name for value in graph.input)
    named = () if around is None else ("name",)
    return _read(
        graph.node,
        names,
        tuple(value.name for value in graph.output),
        # The inputs of an outermost graph are fed by their names.
        names if around is None else tuple(f"{depth} {n}" for n in range(len(names))),
        tensors,
        {info.name: info.type for info in infos},
        digest(rest, *(message(value, *named) for value in (*graph.input, *graph.output))),
        around,
        depth,
    )


def read_function(function: onnx.FunctionProto) -> Body:
    """The body of a function; its inputs and outputs go by their places."""
    places = tuple(str(place) for place in range(len(function.input)))
    without = ("node", "input", "output", "value_info", "opset_import")
    opsets = sorted(f"{each.domain} {each.version}".encode() for each in function.opset_import)
    return _read(
        function.node,
        tuple(function.input),
        tuple(function.output),
        places,
        {},
        {info.name: info.type for info in function.value_info},
        digest(message(function, *without), *opsets),
        None,
        0,
    )


def _read(
    nodes: Iterable[onnx.NodeProto],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    called: Sequence[str],
    own: Mapping[str, onnx.TensorProto],
    types: Mapping[str, onnx.TypeProto],
    rest: bytes,
    around: Body | None,
    depth: int,
) -> Body:
    values = {} if around is None else dict(around.values)
    tensors = {} if around is None else dict(around.tensors)
    for name, call in zip(inputs, called, strict=True):
        values[name] = digest(b"input", call.encode())
        tensors.pop(name, None)
    for name, tensor in own.items():
        # An input with a default is another thing than an input, and than a constant.
        before = values[name] if name in inputs else b""
        values[name] = digest(before, tensor_digest(tensor))
        tensors[name] = tensor
    body = Body(inputs, outputs, (), tensors, frozenset(own), values, types, rest)
    made = []
    for proto in nodes:
        node = _node(proto, body, depth)
        made.append(node)
        for place, name in enumerate(node.outputs):
            if name:
                values[name] = digest(node.computes, str(place).encode())
                # A name that is taken anew hides what was called so around it.
                tensors.pop(name, None)
    gives = [values.get(name, b"nothing") for name in outputs]
    kept = sorted(digest(values[name], _type(types, name)) for name in own)
    whole = digest(rest, *gives, *sorted(node.whole for node in made), *kept)
    return Body(
        inputs, outputs, tuple(made), tensors, frozenset(own), values, types, rest, digest=whole
    )


def _node(proto: onnx.NodeProto, body: Body, depth: int) -> Node:
    attributes = {each.name: each for each in proto.attribute}
    bodies = {
        (each.name, number): read_graph(graph, body, depth + 1)
        for each in proto.attribute
        if each.type in GRAPHS
        for number, graph in enumerate([each.g] if each.type == GRAPHS[0] else each.graphs)
    }
    plain = [attribute_digest(each) for _, each in sorted(attributes.items())]
    rest = digest(message(proto, "input", "output", "name", "attribute", "domain", "op_type"))
    inner = [
        part
        for (name, number), each in sorted(bodies.items())
        for part in (f"{name} {number}".encode(), each.digest)
    ]
    operator = _domain(proto.domain), proto.op_type
    kind = digest(
        *(each.encode() for each in operator),
        rest,
        *plain,
        str([bool(name) for name in proto.output]).encode(),
    )
    reads = [body.values.get(name, digest(b"unknown", name.encode())) for name in proto.input]
    constants = [
        tensor_digest(body.tensors[name]) if name in body.tensors else b"" for name in proto.input
    ]
    return Node(
        operator,
        tuple(proto.input),
        tuple(proto.output),
        rest,
        attributes,
        bodies,
        tuple(_type(body.types, name) for name in proto.output if name),
        digest(kind, *constants),
        digest(kind, *inner, *reads),
    )


def attribute_digest(attribute: onnx.AttributeProto) -> bytes:
    """Of an attribute's name and value; of one that holds graphs, without these."""
    parts = [message(attribute, "g", "graphs", "t", "tensors")]
    parts += [tensor_digest(each) for each in (attribute.t, *attribute.tensors)]
    return digest(*parts)


def _type(types: Mapping[str, onnx.TypeProto], name: str) -> bytes:
    found = types.get(name)
    return b"" if found is None else found.SerializeToString(deterministic=True)


def _domain(name: str) -> str:
    """ONNX's own domain has two names."""
    return "" if name == "ai.onnx" else name
