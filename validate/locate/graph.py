"""One side of a location: a graph whose values have a place, and of which parts can be run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper

from ingot.export.ingot import GRAPH, WEIGHTS
from ingot.export.write_weights import weights_of

Array = npt.NDArray[Any]
Values = dict[str, Array]
Label = tuple[Any, ...]

BEFORE, AFTER = -1, sys.maxsize
LAYER = re.compile(r"\.(\d+)\.")


class Graph:
    """A graph: its nodes by what they make, and its weights, read when they are needed.

    Args:
        model: without the weights' data.
        read: gives a weight by name.
        precision: of the graph, by PyTorch's name.

    Attributes:
        inputs: names of the graph's inputs; one that need not be given is its default here.
        makers: value -> the node it is an output of, in the order of computation.
        initializers: weights and constants by name.
        functions: bodies of operators by domain and name.
        constants: value that depends on no input -> the weights that it is made of.
        positions: every other value's layer, ``BEFORE`` the first or ``AFTER`` the last, in the
            order of computation. A value belongs to the last layer whose weights or states it
            depends on, and behind the layers once a weight of no layer meets such a value: the
            final norm, the head.
    """

    def __init__(
        self, model: onnx.ModelProto, read: Callable[[str], Array], precision: str
    ) -> None:
        self.model = model
        self.read = read
        self.precision = precision
        self.makers = {name: node for node in model.graph.node for name in node.output if name}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input} - self.initializers.keys()
        self.functions = {(each.domain, each.name): each for each in model.functions}
        self.constants: dict[str, frozenset[str]] = {
            name: frozenset([name] if self.is_weight(name) else []) for name in self.initializers
        }
        self.positions: dict[str, int] = {}
        inputs = {name: _named_layer(name) for name in self.inputs}
        for node in model.graph.node:
            names = set(uses(node))
            weights = {w for name in names for w in self.constants.get(name, ())}
            before = [at[name] for name in names for at in (inputs, self.positions) if name in at]
            outputs = [name for name in node.output if name]
            if not before:
                self.constants.update(dict.fromkeys(outputs, frozenset(weights)))
                continue
            layers = [_named_layer(name) for name in weights]
            position = max(before + layers)
            if position != BEFORE and BEFORE in layers:
                position = AFTER
            self.positions.update(dict.fromkeys(outputs, position))

    def is_weight(self, name: str) -> bool:
        """Whether it comes from the checkpoint; other constants are inside the graph file."""
        tensor = self.initializers.get(name)
        return tensor is not None and tensor.data_location == onnx.TensorProto.EXTERNAL

    def variables(self, node: onnx.NodeProto) -> list[str]:
        """The values that a node reads and that are no constants."""
        return [name for name in uses(node) if name in self.positions or name in self.inputs]

    def label(self, node: onnx.NodeProto) -> Label:
        """What a node does, whatever the values are called: operator, attributes, constants."""
        return self._label(node, self.constant)

    def body(self, node: onnx.NodeProto) -> Label | None:
        """What the function does that a node calls; None where it calls none of the graph's."""
        function = self.functions.get((node.domain, node.op_type))
        if function is None:
            return None
        # It sees nothing of the graph that calls it.
        return self._body(function.node, function.input, function.output, (), lambda _name: None)

    def _label(self, node: onnx.NodeProto, told: Callable[[str], Any]) -> Label:
        return (
            node.domain,
            node.op_type,
            frozenset((a.name, self._attribute(a, told)) for a in node.attribute),
            tuple(told(name) for name in node.input),
        )

    def _attribute(
        self, attribute: onnx.AttributeProto, told: Callable[[str], Any]
    ) -> bytes | Label:
        graphs = branches(attribute)
        if graphs:
            return tuple(
                self._body(
                    graph.node,
                    [value.name for value in graph.input],
                    [value.name for value in graph.output],
                    graph.initializer,
                    told,
                )
                for graph in graphs
            )
        plain = onnx.AttributeProto()
        plain.CopyFrom(attribute)
        plain.ClearField("doc_string")
        plain.t.ClearField("name")
        text: bytes = plain.SerializeToString(deterministic=True)
        return text

    def _body(
        self,
        nodes: Iterable[onnx.NodeProto],
        inputs: Iterable[str],
        outputs: Iterable[str],
        initializers: Iterable[onnx.TensorProto],
        outer: Callable[[str], Any],
    ) -> Label:
        """What a branch or a function does: each node, and which values it reads by their place.

        What a value of the graph around it is, ``outer`` tells.
        """
        places: dict[str, Any] = {name: ("input", at) for at, name in enumerate(inputs)}
        places |= {tensor.name: _unnamed(tensor) for tensor in initializers}

        def told(name: str) -> Any:
            return places[name] if name in places else outer(name)

        labels = []
        for at, node in enumerate(nodes):
            labels.append(self._label(node, told))
            places |= {name: ("node", at, index) for index, name in enumerate(node.output)}
        return tuple(labels), tuple(told(name) for name in outputs)

    def constant(self, name: str) -> bytes | str | Label | None:
        """What a constant is: a weight its name, others their numbers; None for another value."""
        if name not in self.constants:
            return None
        if self.is_weight(name):
            return name
        if name in self.makers:
            return self.label(self.makers[name])
        return _unnamed(self.initializers[name])

    def leaving(self, position: int) -> set[str]:
        """The values of one position that a later one reads, and the graph's outputs among them."""
        read = {value.name for value in self.model.graph.output}
        for node in self.model.graph.node:
            if any(self.positions.get(name, BEFORE) > position for name in node.output):
                read.update(uses(node))
        return {
            name for name, where in self.positions.items() if where == position and name in read
        }

    def walk(self, value: str, given: Collection[str], seen: set[str]) -> bool:
        """Add to ``seen`` what one value is computed from; False where an input is not given."""
        rest = [value]
        while rest:
            name = rest.pop()
            if name in seen or name in given:
                continue
            seen.add(name)
            if name in self.inputs:
                return False
            if name in self.makers:
                rest += uses(self.makers[name])
        return True


def of_model(model: ir.Model, precision: str) -> Graph:
    """The graph of a model with lazy weights, which is left as it is."""
    weights = {value.name: value.const_value for value in weights_of(model)}

    def read(name: str) -> Array:
        tensor = weights[name]
        assert tensor is not None
        return tensor.numpy()

    return Graph(unread(model), read, precision)


def unread(model: ir.Model) -> onnx.ModelProto:
    """The file that would be written of a graph, whose weights are not read.

    Args:
        model: with lazy weights; it is the same after as before.
    """
    with _stand_ins(model):
        proto: onnx.ModelProto = ir.serde.serialize_model(model)
    return proto


@contextmanager
def _stand_ins(model: ir.Model) -> Iterator[None]:
    """Weights as they are when they were written, since writing a lazy one reads it."""
    values = weights_of(model)
    before = [value.const_value for value in values]
    for value, tensor in zip(values, before, strict=True):
        assert tensor is not None
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.ExternalTensor(
            WEIGHTS, 0, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or ""
        )
    try:
        yield
    finally:
        for value, tensor in zip(values, before, strict=True):
            value.const_value = tensor


def of_ingot(folder: Path, precision: str) -> Graph:
    """The graph of an ingot, as its file has it."""
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    entries = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            file, offset = folder / place["location"], int(place.get("offset", 0))
            entries[tensor.name] = (file, dtype, offset, tuple(tensor.dims))

    def read(name: str) -> Array:
        file, dtype, offset, shape = entries[name]
        return np.memmap(file, dtype, "r", offset, shape)

    return Graph(model, read, precision)


def branches(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """The graphs that an attribute holds: a branch, or the body of a loop."""
    if attribute.type == onnx.AttributeProto.GRAPH:
        return [attribute.g]
    return list(attribute.graphs)


def uses(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those inside its branches included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in branches(attribute):
            for inner in graph.node:
                yield from uses(inner)
            yield from (value.name for value in graph.output)


def _unnamed(tensor: onnx.TensorProto) -> bytes:
    """A constant's type, shape and numbers."""
    plain = onnx.TensorProto()
    plain.CopyFrom(tensor)
    plain.ClearField("name")
    plain.ClearField("doc_string")
    text: bytes = plain.SerializeToString(deterministic=True)
    return text


def _named_layer(name: str) -> int:
    """The layer in the name of a weight or a state; ``BEFORE`` where there is none."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else BEFORE
