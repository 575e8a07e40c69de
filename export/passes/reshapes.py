"""Reshapes by constant shapes, and sizes read from the token inputs alone."""

from __future__ import annotations

import onnx_ir as ir

from ingot.export.passes.constants import integers


class SizesFromTokens(ir.passes.InPlacePass):
    """Reads every dynamic size from a token input instead of from a state input.

    The tracer takes a size from whichever input has it. A state input may be a shared buffer with
    spare room, or be renamed by a lowering, so no size may come from one.

    Postcondition: no ``Shape`` node reads a graph input outside ``tokens``.
    """

    def __init__(self, tokens: tuple[str, ...]) -> None:
        super().__init__()
        self.tokens = tokens

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        inputs = {value.name: value for value in model.graph.inputs}
        source = {}
        for name in reversed(self.tokens):
            token = inputs[name]
            assert token.shape is not None
            for axis, dimension in enumerate(token.shape):
                source[str(dimension)] = (token, axis)
        modified = False
        for node in model.graph:
            value = node.inputs[0] if node.op_type == "Shape" else None
            if value is None or not value.is_graph_input() or value.name in self.tokens:
                continue
            if not {"start", "end"} <= node.attributes.keys():
                continue
            start, end = (node.attributes[name].as_int() for name in ("start", "end"))
            assert value.shape is not None and end == start + 1
            replacement, axis = source[str(value.shape[start])]
            node.replace_input_with(0, replacement)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


class SimplifyReshapes(ir.passes.InPlacePass):
    """Gives a Reshape that keeps its leading dynamic sizes a constant shape with zeros for them.

    ``[B, T, H] -> [B, T, Hq, D]`` needs no computed shape: 0 means "as in the input". It lets a
    runtime see the static sizes, and drops the Shape, Squeeze and Concat nodes behind them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type != "Reshape":
                continue
            value, target = node.inputs[0], node.outputs[0].shape
            if value is None or value.shape is None or target is None:
                continue
            shape = []
            for axis, dimension in enumerate(target):
                if isinstance(dimension, int):
                    shape.append(dimension)
                elif axis < len(value.shape) and str(value.shape[axis]) == str(dimension):
                    shape.append(0)
                else:
                    break
            already_constant = node.inputs[1] is not None and node.inputs[1].is_initializer()
            if len(shape) < len(target) or 0 in target or already_constant:
                continue
            node.replace_input_with(1, integers(model, shape))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
