"""Reshapes by constant shapes, and sizes read from the token inputs alone."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ingot.export.passes.constants import integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.plugins.errors import IngotError


class SizeError(IngotError):
    """A graph that takes a size from a state, where no token input has it."""


class SizesFromTokens(GraphPass):
    """Reads every dynamic size from a token input instead of from a state input.

    The tracer takes a size from whichever input has it. A state input may be a shared buffer with
    spare room, or be renamed by a lowering, so no size may come from one.

    Args:
        tokens: names of graph inputs; of two with the same size the first is read.

    Raises:
        SizeError: a size that no token input has, or a state's whole shape.
    """

    looks_for = ("Shape",)

    def __init__(self, tokens: tuple[str, ...]) -> None:
        super().__init__()
        self.tokens = tokens

    def requires(self, model: ir.Model) -> None:
        inputs = {value.name: value for value in model.graph.inputs}
        for name in self.tokens:
            self.require(name in inputs, name, "is no graph input")
        sources = self._sources(model)
        for node in filter(self._reads_a_state, model.graph):
            refusal = _refusal(node, sources)
            self.require(not refusal, node, refusal)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        sources = self._sources(model)
        nodes = [node for node in model.graph if self._reads_a_state(node)]
        for node in nodes:
            refusal = _refusal(node, sources)
            # Whether debugging or not: with a shared buffer the size would be that of its room.
            if refusal:
                raise SizeError(
                    f"Shape {node.name or node.outputs[0].name} {refusal}; take the size from the "
                    "token ids or the attention mask in the eager graph."
                )
            value, axis = sources[_one_size(node)]
            node.replace_input_with(0, value)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(not self._reads_a_state(node), node, "reads a size of a state")

    def _reads_a_state(self, node: ir.Node) -> bool:
        value = node.inputs[0] if node.op_type == "Shape" else None
        return value is not None and value.is_graph_input() and value.name not in self.tokens

    def _sources(self, model: ir.Model) -> dict[str, tuple[ir.Value, int]]:
        """The token input and its axis that each size is read from."""
        inputs = {value.name: value for value in model.graph.inputs}
        return {
            str(size): (inputs[name], axis)
            for name in reversed(self.tokens)
            for axis, size in enumerate(inputs[name].shape or ())
        }


def _one_size(node: ir.Node) -> str:
    """The one size of a state that a Shape reads; empty where it reads another number of them."""
    start, end = (node.attributes.get_int(name, -1) for name in ("start", "end"))
    state = node.inputs[0]
    if state is None or state.shape is None or not 0 <= start == end - 1 < len(state.shape):
        return ""
    return str(state.shape[start])


def _refusal(node: ir.Node, sources: Mapping[str, object]) -> str:
    """Why a Shape of a state cannot read a token input instead; empty where it can."""
    size = _one_size(node)
    if not size:
        return "reads not one size of a state"
    return "" if size in sources else f"reads {size}, which no token input has"


class SimplifyReshapes(GraphPass):
    """Gives a Reshape that keeps its leading dynamic sizes a constant shape with zeros for them.

    ``[B, T, H] -> [B, T, Hq, D]`` needs no computed shape: 0 means "as in the input". It lets a
    runtime see the static sizes, and drops the Shape, Squeeze and Concat nodes behind them.
    """

    looks_for = ("Reshape",)

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type != "Reshape":
                continue
            for value in (node.inputs[0], node.outputs[0]):
                # Two unknown sizes would look the same.
                dimensions = value.shape if value is not None and value.shape is not None else ()
                named = all(isinstance(size, int) or size.value for size in dimensions)
                self.require(named, node, f"has a size without a name in {dimensions}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            shape = _constant_shape(node)
            if shape is not None:
                node.replace_input_with(1, integers(model, shape))
                node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(_constant_shape(node) is None, node, "has a computed shape")
            for axis in _kept_axes(node):
                value, made = node.inputs[0], node.outputs[0]
                assert value is not None and value.shape is not None and made.shape is not None
                same = axis < len(value.shape) and value.shape[axis] == made.shape[axis]
                self.ensure(same, node, f"keeps axis {axis} of {value.shape} for {made.shape}")


def _kept_axes(node: ir.Node) -> list[int]:
    """The axes that a Reshape by a constant takes from its input, where both shapes are known."""
    if node.op_type != "Reshape" or node.attributes.get_int("allowzero"):
        return []
    value, shape = node.inputs
    sizes = ir.convenience.get_const_tensor(shape) if shape is not None else None
    if value is None or value.shape is None or node.outputs[0].shape is None or sizes is None:
        return []
    return [axis for axis, size in enumerate(sizes.numpy()) if size == 0]


def _constant_shape(node: ir.Node) -> list[int] | None:
    """The shape that a Reshape's computed one amounts to; None where it cannot be a constant."""
    if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].is_initializer():
        return None
    value, target = node.inputs[0], node.outputs[0].shape
    if value is None or value.shape is None or target is None or 0 in target:
        return None
    shape = []
    for axis, dimension in enumerate(target):
        if isinstance(dimension, int):
            shape.append(dimension)
        elif axis < len(value.shape) and str(value.shape[axis]) == str(dimension):
            shape.append(0)
        else:
            return None
    return shape
