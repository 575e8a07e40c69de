"""Nodes in the making, and those that more than one pass makes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ingot.export.passes.constants import constant


class Nodes(list[ir.Node]):
    """Nodes in their order, to be put into a graph all at once."""

    def add(
        self, op_type: str, *inputs: ir.Value | None, **attributes: int | tuple[int, ...]
    ) -> ir.Value:
        """The one output of a new standard node behind the others."""
        node = ir.node(op_type, inputs, attributes=attributes)
        self.append(node)
        return node.outputs[0]


def additive_bias(model: ir.Model, nodes: Nodes, mask: ir.Value) -> ir.Value:
    """What is added to attention scores, float32, made of a bool mask of the same shape."""
    zero = constant(model, "bias_visible", np.array(0, dtype=np.float32))
    # The lowest float, not -inf: a row without any key must not become NaN.
    lowest = constant(model, "bias_hidden", np.array(np.finfo(np.float32).min, dtype=np.float32))
    return nodes.add("Where", mask, zero, lowest)
