"""Matrices, tables and experts in panels, for Ingot's own kernels of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from ingot.export.codecs.blocks import Blocks
from ingot.export.codecs.coder import Coder
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.replace import take_place
from ingot.export.passes.store import is_matrix, narrowed
from ingot.export.passes.weights import Weight
from ingot.plugins.cpu.operators import DOMAIN, EMBEDDING, LINEAR, VERSION
from ingot.plugins.cpu.panels import (
    EXACT,
    ROWS,
    Bytes,
    Format,
    Whole,
    pack_bfloat16,
    pack_float32,
    pack_whole,
    rounding,
)
from ingot.plugins.moe_dispatch import moe_dispatch
from ingot.plugins.moe_linear import moe_linear
from ingot.plugins.operator import DOMAIN as INGOT

PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
# The panels that floats go into, by the type that they are stored in.
PANELS = {ir.DataType.FLOAT: Format("float32"), ir.DataType.BFLOAT16: Format("bfloat16")}


class _Packed(NamedTuple):
    """How a weight is stored, and its shape before, ``[N, K]`` or ``[E, N, K]``."""

    form: Format
    shape: tuple[int, ...]


class PackMatrices(GraphPass):
    """Stores each matrix as ``ingot.cpu``'s operators read it, and has them read it.

    A product becomes ``Linear``, a lookup ``Embedding``, and the operators of experts their
    namesakes. A table that is a head as well is stored once. Norms, biases, convolutions, what a
    scan's time step is made of, and routers are small and stay as they are.

    Args:
        dtype_of: by the name of a weight, the type to store its floats in.
        coder: chooses formats and numbers of those that are stored in whole numbers; None where
            none are.
        round_activations: to what products may round their activations, of ``plugins.cpu.panels``.
    """

    looks_for = (moe_dispatch.name, moe_linear.name)

    def __init__(
        self,
        dtype_of: Callable[[str], ir.DataType],
        coder: Coder | None = None,
        *,
        round_activations: int = EXACT,
    ) -> None:
        super().__init__()
        self.dtype_of = dtype_of
        self.coder = coder
        self.round_activations = round_activations

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        packed: dict[ir.Value, _Packed] = {}
        for value in list(model.graph.initializers.values()):
            turned = _turned(value)
            if turned is not None:
                packed[value] = self._pack(value, turned)
        for node in list(model.graph):
            weights = [packed[value] for value in node.inputs if value in packed]
            if weights:
                self._call_kernel(model, node, weights)
        if packed:
            model.opset_imports[DOMAIN] = VERSION
            RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        return ir.passes.PassResult(model, modified=bool(packed))

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            for node, _ in value.uses() if value.dtype == ir.DataType.UINT8 else ():
                self.ensure(node.domain == DOMAIN, node, f"computes with the bytes of {value.name}")
        for node in model.graph:
            experts = node.domain == INGOT and node.op_type in self.looks_for
            self.ensure(not experts, node, "is left without panels")

    def _pack(self, value: ir.Value, turned: bool) -> _Packed:
        """Store a weight in panels, unread."""
        weight, name = value.const_value, value.name
        assert isinstance(weight, Weight) and name is not None
        blocks = None if self.coder is None else self.coder.format(weight.origins[0].parameter)
        if blocks is None:
            dtype = self.dtype_of(name)
            # Of half precision float32 has every number.
            dtype = dtype if dtype in PANELS else ir.DataType.FLOAT
            form, pack = PANELS[dtype], partial(_packed_floats, dtype, name)
        else:
            form, pack = blocks.form, partial(self._packed_numbers, weight, blocks)
        shape = tuple(weight.shape.numpy())
        plain = shape[::-1] if turned else shape
        *stack, rows, columns = plain
        packed = (*stack, -(-rows // ROWS), form.panel_bytes(columns))
        read = weight.read_block

        def panels(block: int) -> Bytes:
            array = read(block).reshape(shape[-2:])
            return pack(block, array.T if turned else array)

        value.shape, value.type = ir.Shape(packed), ir.TensorType(ir.DataType.UINT8)
        value.const_value = Weight(name, packed, ir.DataType.UINT8, panels, weight.origins)
        return _Packed(form, plain)

    def _packed_numbers(
        self, weight: Weight, blocks: Blocks, block: int, rows: np.ndarray
    ) -> Bytes:
        assert self.coder is not None
        encoded = self.coder.encode(*weight.origins[block], np.ascontiguousarray(rows))
        numbers, zeros = blocks.unpack(encoded)
        return pack_whole(blocks.form, Whole(numbers, encoded.scales, zeros))

    def _call_kernel(self, model: ir.Model, node: ir.Node, weights: list[_Packed]) -> None:
        """Swap a node for the operator over the same weights in panels."""
        (form, (*stack, rows, columns)), *others = weights
        sizes: dict[str, Any] = {"in_features": columns, "out_features": rows}
        if others:
            ((second, _),) = others
            both = _stored(form, "gate_up_") | _stored(second, "down_")
            sizes = {"experts": stack[0], "hidden": columns, "intermediate": rows // 2, **both}
        else:
            sizes |= {"experts": stack[0]} if stack else {}
            sizes |= _stored(form)
        kind, inputs = _kernel(node)
        if kind == LINEAR:
            sizes["scale"] = 1.0
        if kind != EMBEDDING:
            possible = rounding(True, *(each.form for each in weights))
            same = possible == self.round_activations
            sizes["round_activations"] = possible if same else EXACT
        attributes = sizes if kind in (LINEAR, EMBEDDING) else {**node.attributes, **sizes}
        made = ir.node(kind, inputs, attributes=attributes, domain=DOMAIN, version=VERSION)
        model.graph.insert_before(node, made)
        take_place(node.outputs[0], made.outputs[0])
        model.graph.remove(node, safe=True)


def _kernel(node: ir.Node) -> tuple[str, list[ir.Value | None]]:
    """The operator that takes a node's place, and its inputs."""
    inputs = list(node.inputs)
    if node.op_type == "Gather":
        table, ids = inputs
        return EMBEDDING, [ids, table]
    return LINEAR if node.op_type in PRODUCTS else node.op_type, inputs


def _stored(form: Format, prefix: str = "") -> dict[str, Any]:
    """How a weight is stored, as attributes say it."""
    return {
        f"{prefix}numbers": form.numbers,
        f"{prefix}block": form.block,
        f"{prefix}zero_points": int(form.zero_points),
    }


def _turned(value: ir.Value) -> bool | None:
    """Whether a weight is stored ``[K, N]``; None of one that no kernel here reads."""
    weight = value.const_value
    if not isinstance(weight, Weight) or not is_matrix(value):
        return None
    # Two readers that want two layouts would need two tables.
    turned, *others = {_wants_turned(node, weight) for node, _ in value.uses()}
    return None if others else turned


def _wants_turned(node: ir.Node, weight: Weight) -> bool | None:
    if node.domain == INGOT:
        return False
    if len(weight.shape) != 2:
        return None
    attributes = node.attributes
    if node.op_type == "Gather":
        return None if attributes.get_int("axis", 0) else False
    plain = node.op_type in PRODUCTS and not attributes.get_int("transA", 0)
    plain &= all(attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    plain &= bias is None or (bias.shape is not None and len(bias.shape) == 1)
    return not attributes.get_int("transB", 0) if plain else None


def _packed_floats(dtype: ir.DataType, name: str, _block: int, rows: np.ndarray) -> Bytes:
    if dtype == ir.DataType.FLOAT:
        return pack_float32(rows)
    return pack_bfloat16(narrowed(rows, dtype, name).view(np.uint16))
