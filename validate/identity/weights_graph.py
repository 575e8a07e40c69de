"""Where a graph has its weights, what reads each of them, and how that wants it laid out.

An operator's definition says which element of a weight it multiplies by which of its input, so the
layout that a weight must be stored in follows from its reader, whatever the export thought of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import numpy_helper

from ingot.plugins.cpu.operators import DOMAIN as PANELS
from ingot.validate.identity.weights_files import Tensor

# Of the tensors that may be weights; by onnx.proto.
DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "F32",
    onnx.TensorProto.FLOAT16: "F16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.DOUBLE: "F64",
    # What whole numbers of a few bits are packed in.
    onnx.TensorProto.UINT8: "U8",
}
# Operators that hand on what they read, element by element in the same order.
SAME_ORDER = ("Cast", "Identity", "Reshape")
# Operators that take rows of a table.
LOOKUPS = ("Gather", "GatherBlockQuantized", "Embedding")
# How the values are called that routers choose by.
ROUTER_LOGITS = "router_logits."
# Of com.microsoft's operators of experts: where the router's logits are, and which input has which
# matrices.
MOE_LOGITS = 1
MOE_GATE_UP, MOE_DOWN = {"MoE": 2, "QMoE": 2}, {"MoE": 4, "QMoE": 5}


class LayoutError(ValueError):
    """A weight whose reader this module has no layout for."""


@dataclass(frozen=True)
class Layout:
    """How a weight is stored, against rows of outputs and columns of inputs, as Hugging Face's.

    Attributes:
        turned: a matrix ``[inputs, outputs]``.
        interleaved: of a stack ``[E, 2I, H]`` rows of gate and up in turn.
        backwards: of a stack the last expert first.
    """

    turned: bool = False
    interleaved: bool = False
    backwards: bool = False


@dataclass(frozen=True)
class Use:
    """One reading of a value: the node, and which of its inputs it is."""

    node: onnx.NodeProto
    index: int


@dataclass(frozen=True)
class External:
    """Where a graph says that a tensor's bytes are, word for word."""

    location: str
    offset: int
    length: int | None


@dataclass(frozen=True)
class Weight:
    """An initializer of floating-point numbers, or of bytes.

    Attributes:
        tensor: its elements.
        external: where the graph says that they are; None where they are in the graph itself.
    """

    tensor: Tensor
    external: External | None


@dataclass
class Graph:
    """A graph with its subgraphs, and who reads and makes each value.

    Attributes:
        weights: initializers by name.
        uses: value -> its readings.
        producers: value -> the node that makes it.
        constants: initializers of integers in the graph itself, flat.
        scalars: names of numbers that a value may be multiplied by.
    """

    weights: dict[str, Weight] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    constants: dict[str, list[int]] = field(default_factory=dict)
    scalars: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path, name: str) -> Graph:
        """The graph of an ingot, without its external data."""
        model = onnx.load(str(folder / name), load_external_data=False)
        graph = cls()
        for each in _graphs(model.graph):
            for initializer in each.initializer:
                graph._take(initializer, folder)
            for node in each.node:
                for index, value in enumerate(node.input):
                    graph.uses[value].append(Use(node, index))
                for value in node.output:
                    graph.producers[value] = node
        return graph

    def _take(self, initializer: onnx.TensorProto, folder: Path) -> None:
        name, shape = initializer.name, tuple(initializer.dims)
        external = None
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in initializer.external_data}
            length = said.get("length")
            external = External(
                said.get("location", ""),
                int(said.get("offset", 0)),
                None if length is None else int(length),
            )
        elif initializer.data_type == onnx.TensorProto.INT64:
            self.constants[name] = numpy_helper.to_array(initializer).reshape(-1).tolist()
        elif shape in ((), (1,)):
            self.scalars.add(name)
        if initializer.data_type not in DTYPES:
            return
        dtype = DTYPES[initializer.data_type]
        if external is None:
            data = numpy_helper.to_array(initializer).tobytes()
            tensor = Tensor(name, dtype, shape, None, data=data)
        else:
            tensor = Tensor(name, dtype, shape, folder / external.location, external.offset)
        self.weights[name] = Weight(tensor, external)

    def routes(self, name: str) -> bool:
        """Whether a weight makes the logits of a router."""
        uses = self.readers(name)
        made = (output for use in uses for output in use.node.output)
        return any(output.startswith(ROUTER_LOGITS) for output in made)

    def readers(self, value: str) -> list[Use]:
        """Who reads a value in the end, with what only hands it on left out."""
        found = []
        for use in self.uses.get(value, ()):
            if use.node.op_type in SAME_ORDER and not use.node.domain:
                found += self.readers(use.node.output[0])
            else:
                found.append(use)
        return found

    def maker(self, value: str) -> onnx.NodeProto | None:
        """The node that computes a value, with what only hands it on left out."""
        node = self.producers.get(value)
        while node is not None and node.op_type in SAME_ORDER and not node.domain:
            node = self.producers.get(node.input[0])
        return node

    def layout(self, name: str) -> Layout:
        """How a weight is to be stored, by all that read it.

        Raises:
            LayoutError: nothing reads it, or two that want it in other layouts.
        """
        found = {self._layout(use) for use in self.readers(name)}
        if len(found) != 1:
            raise LayoutError("nothing reads it" if not found else "its readers want two layouts")
        return found.pop()

    def _layout(self, use: Use) -> Layout:
        node, kind = use.node, use.node.op_type
        if kind == "MatMul":
            return Layout(turned=True)
        if kind in ("Gemm", "FusedMatMul") and use.index == 1:
            return Layout(turned=not attribute(node, "transB", 0))
        if kind not in MOE_DOWN:
            return Layout()
        # ONNX Runtime's ContribOperators.md: 1 is gate and up in turn, 2 is one after the other.
        fusion = attribute(node, "swiglu_fusion", 0)
        if use.index not in (MOE_GATE_UP[kind], MOE_DOWN[kind]) or fusion not in (1, 2):
            raise LayoutError(f"it is input {use.index} of a {kind} with swiglu_fusion {fusion}")
        return Layout(
            interleaved=fusion == 1 and use.index == MOE_GATE_UP[kind],
            backwards=self._backwards(node.input[MOE_LOGITS]),
        )

    def _backwards(self, logits: str) -> bool:
        """Whether a router's logits are in reverse order."""
        node = self.maker(logits)
        if node is None or node.op_type != "Slice" or len(node.input) < 5:
            return False
        return self.constants.get(node.input[4]) == [-1]

    def multiplied(self, value: str) -> bool:
        """Whether a value is multiplied or divided by a constant number before anything else.

        A bias may be added before, and casts may stand between, or a cut of what rows of a table
        are filled up with.
        """
        made = self.producers.get(value)
        if made is not None and made.domain == PANELS and _scaled(made):
            return True
        for use in self.readers(value):
            node = use.node
            other = [name for index, name in enumerate(node.input) if index != use.index]
            if node.op_type in ("Mul", "Div") and other and other[0] in self.scalars:
                return True
            added = node.op_type == "Add" and other[0] in self.weights
            if added or (node.op_type == "Slice" and use.index == 0):
                return self.multiplied(node.output[0])
        return False


def _scaled(node: onnx.NodeProto) -> bool:
    """Whether an operator multiplies what it computes by a number before it adds it."""
    return any(each.name == "scale" and each.f != 1.0 for each in node.attribute)


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    return next((each.i for each in node.attribute if each.name == name), default)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for each in node.attribute:
            for inner in (each.g, *each.graphs):
                if inner.node or inner.initializer:
                    yield from _graphs(inner)
