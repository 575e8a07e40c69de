"""Matrices and tables in blocks of whole numbers, for ONNX Runtime's own kernels."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ingot.export.codecs.coder import Coder
from ingot.export.passes.constants import integers
from ingot.export.passes.encoded import Stored, encode, side_by_side
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.quantise_experts import ACCURACY
from ingot.export.passes.replace import take_place
from ingot.export.passes.store import is_matrix
from ingot.export.passes.weights import Weight

MICROSOFT = "com.microsoft"
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


class QuantiseMatrices(GraphPass):
    """Stores each matrix of a linear layer, and each table, in the blocks that a coder chooses.

    A product becomes ``MatMulNBits``, a lookup ``GatherBlockQuantized``. A table that is a head as
    well is stored once. Norms, biases, convolutions, what a scan's time step is made of, and
    routers are small and stay as they are.

    Args:
        coder: chooses formats and numbers.
        accuracy: of ``ACCURACY``.
    """

    looks_for = ()

    def __init__(self, coder: Coder, accuracy: str) -> None:
        super().__init__()
        self.coder = coder
        self.accuracy = accuracy

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        stored = []
        for value in list(model.graph.initializers.values()):
            found = self._store(model, value)
            stored += [] if found is None else [found]
        if stored:
            model.opset_imports[MICROSOFT] = 1
        side_by_side(model, stored)
        return ir.passes.PassResult(model, modified=bool(stored))

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            if value.dtype != ir.DataType.UINT8:
                continue
            for node, _ in value.uses():
                reads = node.domain == MICROSOFT or node.op_type == "Reshape"
                self.ensure(reads, node, f"computes with the numbers of {value.name}")

    def _store(self, model: ir.Model, value: ir.Value) -> Stored | None:
        weight = value.const_value
        if not isinstance(weight, Weight) or len(weight.shape) != 2 or not is_matrix(value):
            return None
        readers = [node for node, _ in value.uses()]
        blocks = self.coder.format(weight.origins[0].parameter)
        # Two readers that want two layouts would need two tables.
        turned, *others = {_turned(node) for node in readers}
        if blocks is None or turned is None or others:
            return None
        shape = tuple(weight.shape.numpy())
        count, columns = shape[::-1] if turned else shape
        stored = encode(model, value, self.coder, blocks, turned=turned)
        for node in readers:
            if node.op_type == "Gather":
                self._look_up(model, node, stored, columns)
            else:
                self._multiply(model, node, stored, count, columns)
        return stored

    def _multiply(
        self, model: ir.Model, node: ir.Node, stored: Stored, count: int, columns: int
    ) -> None:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        inputs = [node.inputs[0], stored.numbers, stored.scales, stored.zero_points]
        inputs += [] if bias is None else [None, bias]
        attributes = {
            "N": count,
            "K": columns,
            "accuracy_level": ACCURACY[self.accuracy],
            **_format(stored),
        }
        product = ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT)
        model.graph.insert_before(node, product)
        take_place(node.outputs[0], product.outputs[0])
        model.graph.remove(node, safe=True)

    def _look_up(self, model: ir.Model, node: ir.Node, stored: Stored, columns: int) -> None:
        rows = ir.node("Reshape", [stored.numbers, integers(model, [0, -1])])
        found = ir.node(
            "GatherBlockQuantized",
            [rows.outputs[0], node.inputs[1], *stored.companions],
            attributes={"gather_axis": 0, "quantize_axis": 1, **_format(stored)},
            domain=MICROSOFT,
        )
        nodes = [rows, found]
        if columns % stored.blocks.size:
            # Behind the row lies what fills its last block.
            ends = [integers(model, [n]) for n in (0, columns, -1)]
            nodes.append(ir.node("Slice", [found.outputs[0], *ends]))
        model.graph.insert_before(node, nodes)
        take_place(node.outputs[0], nodes[-1].outputs[0])
        model.graph.remove(node, safe=True)


def _format(stored: Stored) -> Mapping[str, int]:
    return {"bits": stored.blocks.bits, "block_size": stored.blocks.size}


def _turned(node: ir.Node) -> bool | None:
    """Whether a reader wants its matrix ``[K, N]``; None of one that no kernel here stands for."""
    if node.op_type == "Gather":
        return False
    attributes = node.attributes
    turned = not attributes.get_int("transB", 0)
    plain = node.op_type in PRODUCTS
    plain &= not attributes.get_int("transA", 0)
    plain &= all(attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return turned if plain else None
