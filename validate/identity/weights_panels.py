"""Weights in panels: where a graph has them, and what they are.

An operator of ``ingot.cpu`` reads a weight as bytes and says by its attributes what they are. Rows
lie in panels of sixteen, side by side, so that each panel has the same columns of sixteen rows one
behind the other; rows that are missing in the last panel are zero:

- ``float32``: ``[columns][16]``;
- ``bfloat16``: ``[pairs of columns][16][2]``;
- ``int8`` and ``int4``: for each row a power of two, float32; for each block and row a scale,
  float16, and where the format has them a zero point, a byte; then the numbers, four columns of
  each row at a time. Of four bits they are eight columns, the first four in the low halves of four
  bytes and the last four in the high ones. Each of the four parts begins at a multiple of 64 bytes.

Source: plugins/cpu/src/panels.h. Written apart from what an export makes panels with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from ingot.plugins.cpu.operators import DOMAIN
from ingot.validate.identity.weights_files import Bits, Reader, Tensor
from ingot.validate.identity.weights_graph import Graph, LayoutError, Use, attribute
from ingot.validate.identity.weights_piece import Piece

ROWS = 16
LINE = 64
# Bits of whole numbers, and of floats the dtype of an element and how many of a row lie together.
WHOLE = {"int8": 8, "int4": 4}
FLOATS = {"float32": ("F32", 1), "bfloat16": ("BF16", 2)}


class Place(NamedTuple):
    """Which input of an operator is a weight, and how the attributes say what it is.

    Attributes:
        input: its number.
        prefix: of the attributes that say how it is stored.
        stack: the attribute with the number of matrices; empty of a single one.
        rows: the attribute with the rows of each, and how many times as many there are.
        columns: the attribute with the columns.
    """

    input: int
    prefix: str
    stack: str
    rows: tuple[str, int]
    columns: str
    # Whether there is one such weight for each of that attribute's numbers, one behind the other.
    each: bool = False


PLACES: dict[str, tuple[Place, ...]] = {
    "Linear": (Place(1, "", "", ("out_features", 1), "in_features"),),
    "Linears": (Place(1, "", "", ("out_features", 1), "in_features", each=True),),
    "Mlp": (
        Place(1, "gate_up_", "", ("intermediate", 1), "hidden"),
        Place(2, "gate_up_", "", ("intermediate", 1), "hidden"),
        Place(3, "down_", "", ("hidden", 1), "intermediate"),
    ),
    "Embedding": (Place(1, "", "", ("out_features", 1), "in_features"),),
    "MoeLinear": (Place(2, "", "experts", ("out_features", 1), "in_features"),),
    "MoeDispatch": (
        Place(2, "gate_up_", "experts", ("intermediate", 2), "hidden"),
        Place(3, "down_", "experts", ("hidden", 1), "intermediate"),
    ),
}


@dataclass(frozen=True)
class Panels:
    """A weight in panels: a matrix, or a stack of them; see ``weights_piece.Numbers``.

    Attributes:
        codes: its bytes.
        numbers: of ``WHOLE`` or ``FLOATS``.
        size: whole numbers of a block; 0 of floats.
        zeros: whether blocks have zero points.
        matrices: how many there are.
        rows: of each matrix.
        columns: of each row.
        stacked: whether it is a stack.
    """

    codes: Tensor
    numbers: str
    size: int
    zeros: bool
    matrices: int
    rows: int
    columns: int
    stacked: bool

    @property
    def whole(self) -> bool:
        """Whether it is of whole numbers."""
        return self.numbers in WHOLE

    @property
    def bits(self) -> int:
        return WHOLE[self.numbers]

    @property
    def most(self) -> int:
        return (1 << self.bits) - 1

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.size)

    @property
    def has_zero_points(self) -> bool:
        return self.zeros

    apart = 4
    zeros_share = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes,)

    @property
    def text(self) -> str:
        if not self.whole:
            return f"{self.numbers} in panels"
        zero_points = " with zero points" if self.zeros else ""
        return f"{self.numbers} in blocks of {self.size}{zero_points}"

    @property
    def panels(self) -> int:
        """Of each matrix."""
        return -(-self.rows // ROWS)

    @property
    def panel_bytes(self) -> int:
        """Of each panel."""
        if not self.whole:
            _, together = FLOATS[self.numbers]
            return -(-self.columns // together) * 4 * ROWS
        return self._begins[-1]

    @property
    def _begins(self) -> tuple[int, int, int, int]:
        """Where a panel's scales, zero points and numbers begin, and where it ends."""
        scales = 4 * ROWS
        zeros = scales + _lines(2 * ROWS * self.blocks)
        numbers = zeros + (_lines(ROWS * self.blocks) if self.zeros else 0)
        return scales, zeros, numbers, numbers + ROWS * self.blocks * self.size * self.bits // 8

    def piece(self, reader: Reader, matrix: int, first: int, count: int, step: int = 1) -> Piece:
        """See ``weights_piece.Numbers``."""
        data, at = self._panels_of(reader, matrix, first, (count - 1) * step + 1 if count else 0)
        scales_at, zeros_at, numbers_at, end = self._begins
        panels, blocks, size = len(data), self.blocks, self.size

        def rows(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
            """``[panels, blocks, 16, ...]`` -> what is wanted, ``[count, blocks, ...]``."""
            by_row = np.moveaxis(array, 2, 1)
            return by_row.reshape(panels * ROWS, *by_row.shape[2:])[at:][::step][:count]

        def part(begin: int, width: int) -> Bits:
            return np.ascontiguousarray(data[:, begin : begin + width])

        powers = part(0, 4 * ROWS).view(np.float32).reshape(panels, 1, ROWS)
        halves = part(scales_at, 2 * ROWS * blocks).view(np.float16).reshape(panels, blocks, ROWS)
        with np.errstate(invalid="ignore", over="ignore"):
            scales = rows(halves.astype(np.float32) * powers)
        if self.zeros:
            zeros = rows(part(zeros_at, ROWS * blocks).reshape(panels, blocks, ROWS))
        else:
            zeros = np.full((count, blocks), 1 << (self.bits - 1), np.uint8)
        packed = data[:, numbers_at:end].reshape(panels, blocks, -1, ROWS, 4)
        if self.bits == 4:
            low_and_high = np.stack([packed & 15, packed >> 4], axis=4)
            fours = low_and_high.reshape(panels, blocks, -1, ROWS, 8)
        else:
            fours = packed
        numbers = rows(np.moveaxis(fours, 3, 2)).reshape(count, blocks, size)
        return Piece(numbers, np.asarray(scales, np.float32), zeros)

    def floats(self) -> Tensor:
        """The same as a tensor ``[rows, columns]`` or ``[E, rows, columns]``."""
        shape = (self.rows, self.columns)
        dtype, _ = FLOATS[self.numbers]
        stacked = (self.matrices, *shape) if self.stacked else shape
        return Unpacked(self.codes.name, dtype, stacked, None, panels=self)

    def bits_of(self, reader: Reader, matrix: int, first: int, count: int) -> Bits:
        """Rows of floats as the integers of their bits ``[count, columns]``."""
        data, at = self._panels_of(reader, matrix, first, count)
        return np.ascontiguousarray(self._elements(data)[at : at + count, : self.columns])

    def ends_in_zeros(self, reader: Reader) -> bool:
        """Whether what fills each matrix up is zero: rows of its last panel, and columns of floats.

        What fills the last block of a row is what ``piece`` gives behind it.
        """
        missing = self.panels * ROWS - self.rows
        for matrix in range(self.matrices):
            if self.whole:
                nothing = (
                    not missing
                    or not self.piece(reader, matrix, self.rows, missing).decoded().any()
                )
            else:
                last = self.rows - 1
                data, at = self._panels_of(reader, matrix, last, 1)
                nothing = not self._elements(data)[at + 1 :].any()
                _, together = FLOATS[self.numbers]
                if self.columns % together:
                    data, _ = self._panels_of(reader, matrix, 0, self.rows)
                    nothing &= not self._elements(data)[:, self.columns :].any()
            if not nothing:
                return False
        return True

    def _elements(self, data: Bits) -> Bits:
        """Panels of floats ``[panels, bytes]`` as rows, with what they are filled up with."""
        dtype, together = FLOATS[self.numbers]
        elements = data.view(np.uint32 if dtype == "F32" else np.uint16)
        by_row = elements.reshape(len(data), -1, ROWS, together).swapaxes(1, 2)
        return by_row.reshape(len(data) * ROWS, -1)

    def _panels_of(self, reader: Reader, matrix: int, first: int, span: int) -> tuple[Bits, int]:
        """Whole panels ``[panels, bytes]`` with some rows, and where in them the first is."""
        begin, end = first // ROWS, -(-(first + span) // ROWS)
        width = self.panel_bytes
        offset = (matrix * self.panels + begin) * width
        flat = reader.elements(self.codes, offset, (end - begin) * width)
        return flat.reshape(end - begin, width), first - begin * ROWS


@dataclass(frozen=True)
class Unpacked(Tensor):
    """Floats of panels, row by row as they are asked for.

    Attributes:
        panels: in which they are.
    """

    panels: Panels | None = None

    def part(self, begin: int, length: int) -> bytes:
        """See ``Tensor.part``."""
        of = self.panels
        assert of is not None
        width = of.columns * self.itemsize
        first, last = begin // width, -(-(begin + length) // width)
        pieces = []
        with Reader() as reader:
            while first < last:
                matrix, row = divmod(first, of.rows)
                count = min(of.rows - row, last - first)
                pieces.append(of.bits_of(reader, matrix, row, count).tobytes())
                first += count
        skipped = begin % width
        return b"".join(pieces)[skipped : skipped + length]


def use_of(graph: Graph, name: str) -> list[tuple[onnx.NodeProto, Place]]:
    """Who reads a tensor as panels."""
    found = [(use.node, _place(use)) for use in graph.readers(name)]
    return [(node, place) for node, place in found if place is not None]


def _place(use: Use) -> Place | None:
    if use.node.domain != DOMAIN:
        return None
    places = PLACES.get(use.node.op_type, ())
    for place in places:
        if place.each and use.index >= place.input:
            return place._replace(input=use.index)
        if place.input == use.index:
            return place
    return None


def panels(graph: Graph, name: str) -> Panels | None:
    """A weight in panels by its name; None where nothing reads it as such.

    Raises:
        LayoutError: it is read in two ways, or has another size than its readers say.
    """
    uses = use_of(graph, name)
    if not uses:
        return None
    if len(uses) < len(graph.readers(name)):
        raise LayoutError("it is read as panels, and as something else")
    found = {_panels(graph.weights[name].tensor, node, place) for node, place in uses}
    if len(found) > 1:
        texts = sorted({f"{e.numbers} {e.size} {[e.matrices, e.rows, e.columns]}" for e in found})
        raise LayoutError(f"its readers take it for {' and for '.join(texts)}")
    return found.pop()


def _panels(codes: Tensor, node: onnx.NodeProto, place: Place) -> Panels:
    numbers = _text(node, f"{place.prefix}numbers")
    size = attribute(node, f"{place.prefix}block", 0)
    zeros = attribute(node, f"{place.prefix}zero_points", 0)
    matrices = attribute(node, place.stack, 0) if place.stack else 1
    name, times = place.rows
    rows = attribute(node, name, 0) * times
    if place.each:
        every = next((list(each.ints) for each in node.attribute if each.name == name), [])
        rows = every[place.input - 1] if place.input <= len(every) else 0
    columns = attribute(node, place.columns, 0)
    whole = numbers in WHOLE
    fits = size >= 8 and size % 8 == 0 if whole else numbers in FLOATS and not size and not zeros
    if not fits or min(matrices, rows, columns) < 1 or codes.dtype != "U8":
        what = f"{numbers} in blocks of {size}, {[matrices, rows, columns]}"
        raise LayoutError(f"it is {codes.dtype} and read by {node.op_type} as {what}")
    stacked = bool(place.stack)
    found = Panels(codes, numbers, size, bool(zeros), matrices, rows, columns, stacked)
    shape = (found.panels, found.panel_bytes)
    wanted = (matrices, *shape) if stacked else shape
    if codes.shape != wanted:
        raise LayoutError(
            f"its bytes are {list(codes.shape)}, and {matrices} of {rows} rows and {columns} "
            f"columns in {numbers} are {list(wanted)}"
        )
    return found


def _text(node: onnx.NodeProto, name: str) -> str:
    found = (each.s.decode(errors="replace") for each in node.attribute if each.name == name)
    return next(found, "")


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE
