"""A weight of the graph as numbers, scales and zero points: three tensors in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from ingot.export.codecs.blocks import Blocks, Encoded, Floats
from ingot.export.codecs.coder import Coder
from ingot.export.passes.weights import Weight

SCALES = ".scales"
ZERO_POINTS = ".zero_points"


@dataclass(frozen=True)
class Stored:
    """The tensors of a weight.

    Attributes:
        numbers: uint8; of a matrix ``[N, blocks, size * bits / 8]``, of a stack
            ``[E, N, blocks * size * bits / 8]``.
        scales: float32 ``[N, blocks]``, of a stack ``[E, N, blocks]``.
        zero_points: uint8 ``[N, ceil(blocks * bits / 8)]``, of a stack with ``E`` before; None
            where they are the middle.
        blocks: the format.
    """

    numbers: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    blocks: Blocks

    @property
    def companions(self) -> tuple[ir.Value, ...]:
        """All but the numbers."""
        return (self.scales,) if self.zero_points is None else (self.scales, self.zero_points)


class _Blocks:
    """Encodes a weight as its numbers are read; the rest is kept until it is read as well.

    Args:
        encode: block -> that matrix.
    """

    def __init__(self, encode: Callable[[int], Encoded]) -> None:
        self._encode = encode
        self._kept: dict[tuple[str, int], np.ndarray] = {}

    def read(self, part: str, block: int) -> np.ndarray:
        """One block of the numbers, the scales or the zero points."""
        found = self._kept.pop((part, block), None)
        if found is not None:
            return found
        encoded = self._encode(block)
        for name in ("scales", "zero_points"):
            kept = getattr(encoded, name)
            if kept is not None and name != part:
                self._kept[name, block] = kept
        return np.ascontiguousarray(getattr(encoded, part))


def encode(
    model: ir.Model,
    value: ir.Value,
    coder: Coder,
    blocks: Blocks,
    *,
    turned: bool = False,
    rows: int | None = None,
) -> Stored:
    """Put a weight's numbers in its place, and its scales and zero points beside it.

    Nothing is read yet. A matrix is encoded once, when the numbers are written; its scales and
    zero points, an eighth of it at most, are kept until they are.

    Args:
        model: the graph.
        value: the weight, float32, ``[N, K]`` or ``[E, N, K]``; its readers are the caller's to
            change.
        coder: chooses the numbers.
        blocks: the format.
        turned: whether it is stored ``[K, N]``.
        rows: N, where zeros are to be added for more than there are.
    """
    weight = value.const_value
    assert isinstance(weight, Weight) and value.name is not None
    shape = tuple(weight.shape.numpy())
    count, columns = shape[-2:][::-1] if turned else shape[-2:]
    stack = shape[:-2]

    def encoded(block: int) -> Encoded:
        array = weight.read_block(block).reshape(shape[-2:])
        matrix: Floats = np.ascontiguousarray(array.T if turned else array)
        found = coder.encode(*weight.origins[block], matrix)
        return found if rows is None else _with_rows(found, rows)

    count, groups = rows or count, -(-columns // blocks.size)
    of_block = blocks.size * blocks.bits // 8
    flat = (*stack, count, groups * of_block) if stack else (count, groups, of_block)
    packed = -(-groups * blocks.bits // 8)
    store = _Blocks(encoded)
    name = value.name
    origins = weight.origins

    def tensor(part: str, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> Weight:
        return Weight(name, shape, dtype, partial(store.read, part), origins)

    def register(part: str, end: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        made = tensor(part, name + end, shape, dtype)
        result = ir.val(name + end, dtype, shape, const_value=made)
        model.graph.register_initializer(result)
        return result

    value.shape, value.type = ir.Shape(flat), ir.TensorType(ir.DataType.UINT8)
    value.const_value = tensor("data", name, flat, ir.DataType.UINT8)
    scales = register("scales", SCALES, (*stack, count, groups), ir.DataType.FLOAT)
    zeros = None
    if not blocks.symmetric:
        zeros = register("zero_points", ZERO_POINTS, (*stack, count, packed), ir.DataType.UINT8)
    return Stored(value, scales, zeros, blocks)


def side_by_side(model: ir.Model, stored: list[Stored]) -> None:
    """Store each weight's tensors one after the other, so that little is kept meanwhile."""
    after = {each.numbers: each.companions for each in stored}
    moved = {companion for each in stored for companion in each.companions}
    initializers = model.graph.initializers
    order = [value for value in initializers.values() if value not in moved]
    initializers.clear()
    for value in order:
        for each in (value, *after.get(value, ())):
            initializers.add(each)


def _with_rows(encoded: Encoded, rows: int) -> Encoded:
    """Rows of zeros behind the others: any number, by a scale of zero."""
    missing = rows - len(encoded.scales)
    zeros = encoded.zero_points

    def more(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])

    return Encoded(more(encoded.data), more(encoded.scales), None if zeros is None else more(zeros))
