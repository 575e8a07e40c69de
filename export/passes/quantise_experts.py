"""``com.microsoft::MoE`` -> ``com.microsoft::QMoE``: experts in blocks of whole numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ingot.export.codecs.coder import Coder
from ingot.export.passes.constants import constant, integers
from ingot.export.passes.encoded import Stored, encode, side_by_side
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import producer
from ingot.export.passes.nodes import Nodes
from ingot.export.passes.replace import take_place
from ingot.export.passes.weights import Weight

# Levels of com.microsoft operators: whether a product may round its activations to int8.
ACCURACY = {"exact": 0, "fast": 4}
MOE = (GATE_UP, DOWN) = (2, 4)
# Of QMoE: fc1, its scales; fc2, its scales; zero points of both; what mixes the experts' outputs.
QMOE_INPUTS = 15
FC1, FC2, FC1_ZEROS, FC2_ZEROS, ROUTER_WEIGHTS = 2, 5, 11, 12, 14


class QuantiseExperts(GraphPass):
    """Stores the experts of each MoE in the blocks that a coder chooses, for ONNX Runtime's QMoE.

    The kernel's router weights are given: of its own it makes those of the K chosen experts add
    up to one, whatever the attribute says (1.31.1). It takes whole blocks only; where a size is no
    multiple of the block, activations, columns and rows are filled up with zeros and the result is
    cut.

    Args:
        coder: chooses formats and numbers.
        accuracy: of ``ACCURACY``.
    """

    looks_for = ("MoE",)

    def __init__(self, coder: Coder, accuracy: str) -> None:
        super().__init__()
        self.coder = coder
        self.accuracy = accuracy

    def requires(self, model: ir.Model) -> None:
        for node in filter(_is_moe, model.graph):
            for index in MOE:
                value = node.inputs[index]
                assert value is not None
                own = isinstance(value.const_value, Weight) and len(value.uses()) == 1
                self.require(own, value, "is no weight of the checkpoint with one use")
            interleaved = node.attributes.get_int("swiglu_fusion", 0) == 1
            self.require(interleaved, node, "has no rows of gate and up in turn")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        stored: list[Stored] = []
        for node in filter(_is_moe, list(model.graph)):
            stored += self._swap(model, node)
        side_by_side(model, stored)
        return ir.passes.PassResult(model, modified=bool(stored))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type != "QMoE":
                continue
            given = len(node.inputs) == QMOE_INPUTS
            weights = producer(node.inputs[ROUTER_WEIGHTS], "Softmax") if given else None
            same = weights is not None and weights.inputs[0] is node.inputs[1]
            self.ensure(same, node, "is not given the softmax of its router's logits")

    def _swap(self, model: ir.Model, node: ir.Node) -> list[Stored]:
        x, logits, gate_up, _, down = node.inputs
        assert x is not None and gate_up is not None and down is not None
        origins = [_parameter(value) for value in (gate_up, down)]
        formats = [self.coder.format(name) for name in origins]
        first, second = formats
        if first is None or second is None:
            return []
        assert first == second, origins
        assert down.shape is not None
        _, hidden, inner = down.shape.numpy()
        wide, deep = (-(-size // first.size) * first.size for size in (hidden, inner))
        fc1 = encode(model, gate_up, self.coder, first, rows=2 * deep)
        fc2 = encode(model, down, self.coder, second, rows=wide)
        nodes = Nodes()
        rows = _filled(model, nodes, x, wide - hidden)
        weights = nodes.add("Softmax", logits, axis=-1)
        inputs: list[ir.Value | None] = [None] * QMOE_INPUTS
        inputs[:2] = [rows, logits]
        inputs[FC1 : FC1 + 2] = [fc1.numbers, fc1.scales]
        inputs[FC2 : FC2 + 2] = [fc2.numbers, fc2.scales]
        inputs[FC1_ZEROS], inputs[FC2_ZEROS] = fc1.zero_points, fc2.zero_points
        inputs[ROUTER_WEIGHTS] = weights
        moe = ir.node(
            "QMoE",
            inputs,
            domain="com.microsoft",
            attributes={**node.attributes, **self._attributes(fc1, fc2)},
        )
        nodes.append(moe)
        result = moe.outputs[0]
        result.type = x.type
        if wide > hidden:
            ends = [integers(model, [n]) for n in (0, hidden, -1)]
            result = nodes.add("Slice", result, *ends)
        model.graph.insert_before(node, nodes)
        take_place(node.outputs[0], result)
        model.graph.remove(node, safe=True)
        return [fc1, fc2]

    def _attributes(self, fc1: Stored, fc2: Stored) -> Mapping[str, ir.Attr]:
        numbers = {
            "accuracy_level": ACCURACY[self.accuracy],
            "block_size": fc1.blocks.size,
            "expert_weight_bits": fc1.blocks.bits,
        }
        return {name: ir.AttrInt64(name, value) for name, value in numbers.items()}


def has_no_kernel(coder: Coder, exact: bool, node: ir.Node) -> bool:
    """Whether QMoE cannot run the experts of a MoeDispatch as they are asked for.

    It has SiLU alone, has one size of blocks, on the CPU wants as many bits of one stack as of the
    other, and of experts in 8 bits rounds the activations at every level (1.31.1).
    """
    if node.attributes["activation"].as_string() != "silu":
        return True
    weights = [value for value in node.inputs[2:] if value is not None]
    formats = [coder.format(_parameter(value)) for value in weights]
    eight = any(each is not None and each.bits == 8 for each in formats)
    return len(set(formats)) > 1 or (exact and eight)


def _is_moe(node: ir.Node) -> bool:
    return node.domain == "com.microsoft" and node.op_type == "MoE"


def _parameter(value: ir.Value) -> str:
    weight = value.const_value
    assert isinstance(weight, Weight)
    return weight.origins[0].parameter


def _filled(model: ir.Model, nodes: Nodes, x: ir.Value, missing: int) -> ir.Value:
    """``[N, H]`` with columns of zeros behind."""
    if not missing:
        return x
    pads = constant(model, f"int64_pads_0_{missing}", np.array([0, 0, 0, missing], np.int64))
    return nodes.add("Pad", x, pads)
