"""Weights in blocks of whole numbers: where a graph has them, and what they are in float32.

An operator over such a weight reads three tensors and says by its attributes how they make one
matrix: a row is cut into blocks of ``size`` numbers, and each block has a scale and a zero point::

    weight = (number - zero_point) * scale

Numbers of four bits lie two in a byte, the first in its low half; so do zero points, a row at a
time. Where there is none it is the middle, ``2**(bits - 1)``.

Source: onnxruntime/docs/ContribOperators.md, MatMulNBits, QMoE and GatherBlockQuantized. Written
apart from what an export makes blocks with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from ingot.plugins.errors import named
from ingot.validate.identity.weights_files import Bits, Reader, Tensor
from ingot.validate.identity.weights_graph import Graph, Layout, LayoutError, Use, attribute
from ingot.validate.identity.weights_panels import panels, use_of
from ingot.validate.identity.weights_piece import Numbers, Piece

Bytes = npt.NDArray[np.uint8]

MICROSOFT = "com.microsoft"


class Places(NamedTuple):
    """Which inputs of an operator are one weight, and which attributes say how."""

    codes: int
    scales: int
    zero_points: int
    # The first that a node has counts.
    bits: tuple[str, ...]
    # What an operator takes where a node says nothing.
    size: int = 0


PLACES: dict[str, tuple[Places, ...]] = {
    "MatMulNBits": (Places(1, 2, 3, ("bits",)),),
    "GatherBlockQuantized": (Places(0, 2, 3, ("bits",), 128),),
    "QMoE": (
        Places(2, 3, 11, ("fc1_expert_weight_bits", "expert_weight_bits")),
        Places(5, 6, 12, ("fc2_expert_weight_bits", "expert_weight_bits")),
    ),
}
DEFAULT_BITS = 4


@dataclass(frozen=True)
class Blocked:
    """A weight in blocks with tensors of their own for scales; see ``weights_piece.Numbers``.

    Attributes:
        codes: its numbers, ``[rows, blocks, size * bits / 8]`` or ``[E, rows, bytes]``.
        scales: ``[rows, blocks]`` or ``[E, rows, blocks]``.
        zero_points: ``[rows, ceil(blocks * bits / 8)]`` or with E; None where they are the middle.
        bits: of a number.
        size: numbers of a block.
        columns: how many of a row its reader multiplies by something.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    size: int
    columns: int

    @property
    def matrices(self) -> int:
        """How many there are."""
        return self.scales.shape[0] if len(self.scales.shape) == 3 else 1

    @property
    def rows(self) -> int:
        """Of each matrix."""
        return self.scales.shape[-2]

    @property
    def blocks(self) -> int:
        """Of each row."""
        return self.scales.shape[-1]

    @property
    def most(self) -> int:
        """The largest number."""
        return (1 << self.bits) - 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is stored in."""
        found = (self.codes, self.scales, self.zero_points)
        return tuple(each for each in found if each is not None)

    @property
    def has_zero_points(self) -> bool:
        """Whether each block has one."""
        return self.zero_points is not None

    apart = 1
    zeros_share = True

    @property
    def text(self) -> str:
        """Its format, in words."""
        zero_points = " with zero points" if self.has_zero_points else ""
        return f"int{self.bits} in blocks of {self.size}{zero_points}"

    def piece(self, reader: Reader, matrix: int, first: int, count: int, step: int = 1) -> Piece:
        """See ``weights_piece.Numbers``."""
        span = (count - 1) * step + 1 if count else 0
        row = matrix * self.rows + first

        def rows_of(tensor: Tensor, width: int) -> Bits:
            flat = reader.elements(tensor, row * width, span * width)
            return flat.reshape(span, width)[::step]

        width = self.blocks * self.size * self.bits // 8
        numbers = unpacked(rows_of(self.codes, width), self.bits, self.blocks * self.size)
        scales = rows_of(self.scales, self.blocks).view(np.float32)
        if self.zero_points is None:
            zeros: Bytes = np.full(scales.shape, 1 << (self.bits - 1), np.uint8)
        else:
            packed = rows_of(self.zero_points, -(-self.blocks * self.bits // 8))
            zeros = unpacked(packed, self.bits, self.blocks)
        return Piece(numbers.reshape(count, self.blocks, self.size), scales, zeros)


def unpacked(data: Bits, bits: int, count: int) -> Bytes:
    """The first ``count`` numbers of each row of bytes ``[rows, bytes]``."""
    if bits == 8:
        return data[:, :count]
    numbers = np.empty((len(data), data.shape[1], 2), np.uint8)
    np.bitwise_and(data, 15, out=numbers[..., 0])
    np.right_shift(data, 4, out=numbers[..., 1])
    return numbers.reshape(len(data), -1)[:, :count]


class Rows(NamedTuple):
    """Rows of a parameter that are stored at even distances in one matrix of a weight.

    Attributes:
        begin: the first of them, counted from the first that was asked for.
        height: how many.
        matrix: of the weight.
        first: row of that matrix.
        step: from one to the next.
    """

    begin: int
    height: int
    matrix: int
    first: int
    step: int


def stored_rows(
    layout: Layout, matrices: int, height: int, matrix: int, row: int, count: int
) -> Iterator[Rows]:
    """Where rows of one matrix of a parameter are stored.

    Args:
        layout: of the weight.
        matrices: E of the stored weight.
        height: rows of each matrix, as Hugging Face has them.
        matrix: number of the matrix in the stored weight, if it were not backwards.
        row: the first.
        count: how many.
    """
    at = matrices - 1 - matrix if layout.backwards else matrix
    if not layout.interleaved:
        yield Rows(0, count, at, row, 1)
        return
    half = height // 2
    for which, (low, high) in enumerate(((0, half), (half, height))):
        first, last = max(row, low), min(row + count, high)
        if first < last:
            yield Rows(first - row, last - first, at, 2 * (first - low) + which, 2)


def uses_of(graph: Graph, name: str) -> list[tuple[onnx.NodeProto, Places]]:
    """Who reads a tensor as the numbers of a weight in blocks."""
    found = []
    for use in graph.readers(name):
        places = _places(use)
        if places is not None and places.codes == use.index:
            found.append((use.node, places))
    return found


def _places(use: Use) -> Places | None:
    if use.node.domain != MICROSOFT:
        return None
    of_node = PLACES.get(use.node.op_type, ())
    return next((each for each in of_node if use.index in each[:3]), None)


def is_side(graph: Graph, name: str) -> bool:
    """Whether a tensor is read as the scales or zero points of a weight, and as nothing else."""
    uses = graph.readers(name)
    found = [_places(use) for use in uses]
    return bool(uses) and all(
        each is not None and use.index != each.codes for each, use in zip(found, uses, strict=True)
    )


def is_packed(graph: Graph, name: str) -> bool:
    """Whether a tensor is read as the numbers of a weight that is in blocks, or in panels."""
    return bool(uses_of(graph, name) or use_of(graph, name))


def blocked(graph: Graph, name: str) -> Numbers | None:
    """A weight in blocks by the name of its numbers; None where nothing reads it as such.

    Raises:
        LayoutError: it is read in two ways, or its tensors do not fit each other.
    """
    uses = uses_of(graph, name)
    if not uses:
        found = panels(graph, name)
        return found if found is not None and found.whole else None
    if len(uses) < len(graph.readers(name)):
        raise LayoutError("it is read as numbers in blocks, and as something else")
    every = [_blocked(graph, name, node, places) for node, places in uses]
    # What looks rows up hands out what fills their last block as well.
    columns = min(each.columns for each in every)
    same = {
        replace(each, columns=columns) if each.columns == each.blocks * each.size else each
        for each in every
    }
    if len(same) > 1:
        texts = sorted({f"{each.text} ({named(each.scales.name)})" for each in same})
        if len(texts) > 1:
            raise LayoutError(f"its readers take it for {' and for '.join(texts)}")
        raise LayoutError("its readers take other zero points, or another number of columns")
    return same.pop()


def _blocked(graph: Graph, name: str, node: onnx.NodeProto, places: Places) -> Blocked:
    bits = next((n for each in places.bits if (n := attribute(node, each, 0))), DEFAULT_BITS)
    size = attribute(node, "block_size", places.size)
    codes, scales = graph.weights[name].tensor, _side(graph, node, places.scales, "F32")
    zero_points = _side(graph, node, places.zero_points, "U8")
    if bits not in (4, 8) or size < 2 or scales is None:
        what = f"{node.op_type} with numbers of {bits} bits in blocks of {size}"
        raise LayoutError(f"it is read by {what}{'' if scales else ', without scales'}")
    shape = scales.shape
    if len(shape) != (3 if node.op_type == "QMoE" else 2):
        raise LayoutError(f"its scales are {list(shape)}")
    blocks = shape[-1]
    columns = attribute(node, "K", 0) or blocks * size
    apart = (*shape, size * bits // 8)
    packed = apart if len(shape) == 2 else (*shape[:-1], blocks * apart[-1])
    if codes.shape != packed or not (blocks - 1) * size < columns <= blocks * size:
        raise LayoutError(
            f"its numbers are {list(codes.shape)} and its scales {list(shape)}, which are not "
            f"{columns} columns of {bits} bits in blocks of {size}"
        )
    wanted = (*shape[:-1], -(-blocks * bits // 8))
    if zero_points is not None and zero_points.shape != wanted:
        raise LayoutError(
            f"its zero points are {list(zero_points.shape)} and should be {list(wanted)}"
        )
    return Blocked(codes, scales, zero_points, bits, size, columns)


def _side(graph: Graph, node: onnx.NodeProto, place: int, dtype: str) -> Tensor | None:
    """The tensor that a node has in a place; None where it has none."""
    name = node.input[place] if place < len(node.input) else ""
    if not name:
        return None
    weight = graph.weights.get(name)
    if weight is None:
        raise LayoutError(f"its {named(name)} is no tensor of the graph")
    if weight.tensor.dtype != dtype:
        raise LayoutError(f"its {named(name)} is {weight.tensor.dtype} and should be {dtype}")
    return weight.tensor
