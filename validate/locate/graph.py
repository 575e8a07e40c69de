"""One side of a location: a graph whose values have a place, and of which parts can be run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper

from ingot.export.ingot import GRAPH
from ingot.export.write_weights import weights_of
from ingot.plugins.errors import IngotError
from ingot.runtime.onnxruntime_session import open_session, ort_value
from ingot.validate.locate.widen import widen, widened

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
        inputs: names of the graph's inputs.
        makers: value -> the node it is an output of, in the order of computation.
        initializers: weights and constants by name.
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
        self.inputs = {value.name for value in model.graph.input}
        self.makers = {name: node for node in model.graph.node for name in node.output if name}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
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
        return (
            node.domain,
            node.op_type,
            frozenset((a.name, self._attribute(a)) for a in node.attribute),
            tuple(self._constant(name) for name in node.input),
        )

    def _attribute(self, attribute: onnx.AttributeProto) -> bytes | Label:
        if attribute.type == onnx.AttributeProto.GRAPH:
            return tuple(self.label(inner) for inner in attribute.g.node)
        text: bytes = attribute.SerializeToString(deterministic=True)
        return text

    def _constant(self, name: str) -> bytes | str | Label | None:
        """What a constant is: a weight its name, others their numbers; None for another value."""
        if name not in self.constants:
            return None
        if self.is_weight(name):
            return name
        if name in self.makers:
            return self.label(self.makers[name])
        unnamed = onnx.TensorProto()
        unnamed.CopyFrom(self.initializers[name])
        unnamed.ClearField("name")
        text: bytes = unnamed.SerializeToString(deterministic=True)
        return text

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
    """The graph of a model with lazy weights."""
    weights = {value.name: value.const_value for value in weights_of(model)}
    for value in weights_of(model):
        tensor = value.const_value
        assert tensor is not None
        # A stand-in: writing a lazy tensor into the model would read it.
        value.const_value = ir.ExternalTensor(
            "nowhere",
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
        )

    def read(name: str) -> Array:
        tensor = weights[name]
        assert tensor is not None
        return tensor.numpy()

    return Graph(ir.serde.serialize_model(model), read, precision)


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


def uses(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those inside its branches included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from uses(inner)


def _named_layer(name: str) -> int:
    """The layer in the name of a weight or a state; ``BEFORE`` where there is none."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else BEFORE


class LocateError(IngotError):
    """A graph that is too damaged for its values to be computed one by one."""


def run_graph(session: Any, values: Sequence[str], inputs: Mapping[str, Array]) -> Values:
    """Some outputs of ONNX Runtime's session of a graph that may be damaged, by name.

    Raises:
        LocateError: it cannot be run, for example because shapes do not fit each other.
    """
    try:
        found = session.run(list(values), dict(inputs))
    # ONNX Runtime's exceptions share no public base class.
    except Exception as error:
        raise LocateError(f"ONNX Runtime cannot run the graph: {error}") from error
    return dict(zip(values, found, strict=True))


class Part:
    """The piece of a graph between some values that are given and some that are asked for.

    It is computed in float32, whatever the graph's precision.

    Args:
        graph: of which it is.
        values: that are asked for; all can be computed from ``given``.
        given: values by name, as an example of their dtypes and number of axes.
    """

    def __init__(self, graph: Graph, values: Sequence[str], given: Mapping[str, Array]) -> None:
        seen: set[str] = set()
        for value in values:
            graph.walk(value, given, seen)
        nodes = [n for n in graph.model.graph.node if any(name in seen for name in n.output)]
        read = {name for node in nodes for name in uses(node)}
        self.values = list(values)
        self.inputs = [name for name in given if name in read]
        weights = [name for name in graph.initializers if name in read and graph.is_weight(name)]
        # They must outlive the session.
        self._weights = {name: ort_value(widened(graph.read(name))) for name in weights}
        model = onnx.ModelProto(
            ir_version=graph.model.ir_version,
            opset_import=graph.model.opset_import,
            functions=graph.model.functions,
            graph=onnx.GraphProto(
                name="part",
                node=nodes,
                input=[_input(name, given[name]) for name in self.inputs],
                output=[onnx.ValueInfoProto(name=name) for name in values],
                initializer=[t for name, t in graph.initializers.items() if name in read],
            ),
        )
        widen(model, graph.precision)
        self._session: Any = None
        if values:
            self._session = open_session(model.SerializeToString(), weights=self._weights)

    def run(self, known: Mapping[str, Array]) -> Values:
        """Every value asked for, by name.

        Raises:
            LocateError: see ``run_graph``.
        """
        if self._session is None:
            return {}
        return run_graph(self._session, self.values, {name: known[name] for name in self.inputs})


def _input(name: str, array: Array) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, dtype, [None] * array.ndim)
