"""Rotary position embeddings as one operator, where the tracer leaves six nodes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ingot.export.passes.constants import integers
from ingot.export.passes.graph_pass import GraphPass
from ingot.export.passes.match import producer, read_only_by
from ingot.export.passes.nodes import Nodes
from ingot.export.passes.replace import take_place


@dataclass(frozen=True)
class _Rotation:
    """The nodes of what ``graphs.rope.rotate`` captures to.

    Attributes:
        x: ``[B, T, h, D]``, what is rotated.
        flat: the same as ``[B, T, h*D]``; None where it was never so.
        heads: h.
        size: D.
        cos: ``[B, T, 1, D]``, whose halves are equal.
        sin: the same.
        add: the node whose result it is, ``[B, T, h, D]``.
    """

    x: ir.Value
    flat: ir.Value | None
    heads: int
    size: int
    cos: ir.Value
    sin: ir.Value
    add: ir.Node


class RotationToOperator(GraphPass):
    """``x * cos + rotated(x) * sin`` -> ``RotaryEmbedding``, which reads and writes once.

    Matches heads of ``[B, T, h, D]``, times cosines and sines whose halves both are one Concat of
    a value with itself. Where they were flat before, their Reshape is not needed, nor is that of
    what reads them flat again.
    """

    looks_for = ()

    requires = GraphPass.any_graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [match for match in map(_match, list(model.graph)) if match is not None]
        halves: dict[ir.Value, ir.Value] = {}
        for match in found:
            nodes = Nodes()
            flat = match.flat if match.flat is not None else _flatten(model, nodes, match)
            tables = [_half(model, halves, each, match.size) for each in (match.cos, match.sin)]
            rotated = ir.node(
                "RotaryEmbedding",
                [flat, *tables],
                attributes={"num_heads": match.heads, "interleaved": 0},
            )
            rotated.outputs[0].shape, rotated.outputs[0].type = flat.shape, flat.type
            nodes.append(rotated)
            _hand_on(model, nodes, match, rotated.outputs[0])
            model.graph.insert_before(match.add, nodes)
            if not match.add.outputs[0].uses():
                model.graph.remove(match.add, safe=True)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            self.ensure(_match(node) is None, node, "rotates and is left")


def _match(add: ir.Node) -> _Rotation | None:
    """A rotation by its last node; None of another node."""
    if add.op_type != "Add":
        return None
    straight, turned = (producer(value, "Mul") for value in add.inputs)
    if straight is None or turned is None:
        return None
    x, cos = straight.inputs
    concat, sin = producer(turned.inputs[0], "Concat"), turned.inputs[1]
    if concat is None or x is None or cos is None or sin is None:
        return None
    negated, first = producer(concat.inputs[0], "Neg"), producer(concat.inputs[1], "Slice")
    second = producer(negated.inputs[0], "Slice") if negated is not None else None
    if first is None or second is None or first.inputs[0] is not x or second.inputs[0] is not x:
        return None
    shape = x.shape
    if shape is None or len(shape) != 4:
        return None
    heads, size = shape[2], shape[3]
    if not isinstance(heads, int) or not isinstance(size, int) or size % 2:
        return None
    half = size // 2
    unflatten = producer(x, "Reshape")
    flat = None if unflatten is None else unflatten.inputs[0]
    # Rows of another order, such as those of chosen experts, are flat too.
    fits = flat is None or flat.shape == (*shape[:2], heads * size)
    fits &= _cuts(first, 0, half, size) and _cuts(second, half, size, size)
    fits &= all(_of_two_halves(each, size) for each in (cos, sin))
    fits &= read_only_by(straight, [add]) and read_only_by(turned, [add])
    return _Rotation(x, flat, heads, size, cos, sin, add) if fits else None


def _flatten(model: ir.Model, nodes: Nodes, match: _Rotation) -> ir.Value:
    wide = match.heads * match.size
    flat = nodes.add("Reshape", match.x, integers(model, [0, 0, wide]))
    assert match.x.shape is not None
    flat.shape, flat.type = ir.Shape([*match.x.shape[:2], wide]), match.x.type
    return flat


def _cuts(node: ir.Node, begin: int, end: int, size: int) -> bool:
    """Whether a Slice takes these of the last axis, and does no more."""
    given = [_numbers(value) for value in node.inputs[1:]]
    if len(given) < 3 or any(each is None or len(each) != 1 for each in given):
        return False
    starts, ends, axes, *steps = (each[0] for each in given if each is not None)
    return (starts, min(ends, size)) == (begin, end) and axes in (3, -1) and steps in ([], [1])


def _numbers(value: ir.Value | None) -> list[int] | None:
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy().reshape(-1).tolist()


def _of_two_halves(table: ir.Value, size: int) -> bool:
    """Whether it is ``[B, T, 1, D]`` of angles, each of which is there twice.

    Between may be what treats all alike, such as the scale of a longer context.
    """
    shape = table.shape
    if shape is None or len(shape) != 4 or shape[2] != 1 or shape[3] != size:
        return False
    node = table.producer()
    while node is not None and node.op_type in ("Cos", "Sin", "Mul", "Cast"):
        others = [value for value in node.inputs[1:] if value is not None]
        if any(value.const_value is None or value.const_value.size != 1 for value in others):
            return False
        first = node.inputs[0]
        node = None if first is None else first.producer()
    return node is not None and node.op_type == "Concat" and node.inputs[0] is node.inputs[1]


def _half(
    model: ir.Model, halves: dict[ir.Value, ir.Value], table: ir.Value, size: int
) -> ir.Value:
    """``[B, T, D/2]`` of a table; made behind it once, for all that read it."""
    if table not in halves:
        made = Nodes()
        ends = [integers(model, [number]) for number in (0, size // 2, 3)]
        cut = made.add("Slice", table, *ends)
        halves[table] = made.add("Reshape", cut, integers(model, [0, 0, size // 2]))
        maker = table.producer()
        assert maker is not None
        model.graph.insert_after(maker, made)
    return halves[table]


def _hand_on(model: ir.Model, nodes: Nodes, match: _Rotation, rotated: ir.Value) -> None:
    """Give what read the heads what it wants: flat, or as heads."""
    heads, wide = match.add.outputs[0], match.heads * match.size
    for use in list(heads.uses()):
        node, result = use.node, use.node.outputs[0]
        flat = result.shape is not None and result.shape[2:] == (wide,)
        if node.op_type == "Reshape" and flat and not result.is_graph_output():
            ir.convenience.replace_all_uses_with(result, rotated)
            model.graph.remove(node, safe=True)
    if heads.uses() or heads.is_graph_output():
        back = nodes.add("Reshape", rotated, integers(model, [0, 0, match.heads, match.size]))
        take_place(heads, back)
