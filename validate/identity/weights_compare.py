"""Stored weights against what they are to be, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ingot.export.progress import Advance
from ingot.validate.identity.weights_files import Bits, Floats, Reader, Tensor, rounded, text, widen
from ingot.validate.identity.weights_graph import Layout
from ingot.validate.identity.weights_names import Made, Part

# Elements that are compared at a time.
BLOCK = 1 << 21
# Half a unit in the last place of 1, by dtype: what one rounding may change.
HALF_UNIT = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8, "F64": 2.0**-53}


class Source(Protocol):
    """Reads what a checkpoint says that a weight is."""

    def rows(
        self, made: Made, part: Part, first: int, count: int, columns: int
    ) -> tuple[Floats, Floats]:
        """Rows of a part, float32 ``[count, columns]``: the least and the most that they may be.

        Both are one array where there is no choice.
        """
        ...


@dataclass(frozen=True)
class Plain:
    """A checkpoint as it lies in its files."""

    reader: Reader

    def rows(
        self, _made: Made, part: Part, first: int, count: int, columns: int
    ) -> tuple[Floats, Floats]:
        """See ``Source.rows``; there is never a choice."""
        bits = self.reader.elements(part.tensor, part.first + first * columns, count * columns)
        values = widen(bits, part.tensor.dtype).reshape(count, columns)
        return values, values


@dataclass
class Difference:
    """How a weight differs from one tensor of the checkpoint.

    Attributes:
        tensor: of the checkpoint.
        dtype: of the weight that is stored.
        count: of elements that differ.
        compared: elements.
        index: of the first that differs, in the tensor.
        found: that one, in the ingot.
        wanted: what it should be.
        square: sum of the squares of the differences.
        power: sum of the squares of what should be.
        ratios: least and most of found over wanted.
    """

    tensor: Tensor
    dtype: str
    count: int = 0
    compared: int = 0
    index: tuple[int, ...] = ()
    found: str = ""
    wanted: str = ""
    square: float = 0.0
    power: float = 0.0
    ratios: tuple[float, float] = (math.inf, -math.inf)

    def __str__(self) -> str:
        elements = f"element{'s' * (self.compared != 1)} differ{'s' * (self.count == 1)}"
        return (
            f"{self.count} of {self.compared} {elements}, the first at {list(self.index)} is "
            f"{self.found} and should be {self.wanted}"
        )

    @property
    def error(self) -> float:
        """RMS of the differences over the RMS of what should be."""
        if not math.isfinite(self.square):
            return math.inf
        return math.sqrt(self.square / self.power) if self.power else math.inf

    @property
    def factor(self) -> float | None:
        """What all of the tensor is multiplied by, if that is all that is wrong."""
        least, most = self.ratios
        middle, spread = (least + most) / 2, most - least
        # What is rounded twice is no product, and what is rounded otherwise is next to 1.
        product = spread <= 8 * HALF_UNIT[self.dtype] * abs(middle) and abs(middle - 1) > 4 * spread
        return middle if product else None


@dataclass(frozen=True)
class Piece:
    """Where the rows of a part are stored.

    Attributes:
        part: of the checkpoint; element ``(r, c)`` of its rows is
        first: plus ``r * strides[0] + c * strides[1]`` of the stored weight.
        strides: in elements.
    """

    part: Part
    first: int
    strides: tuple[int, int]


def pieces(made: Made, layout: Layout) -> Iterator[Piece]:
    """Every part of a weight, and where its elements are in a layout."""
    count, rows, columns = made.matrices
    for part in made.parts:
        number = part.matrix - made.begin
        matrix = (count - 1 - number if layout.backwards else number) * rows
        if layout.turned:
            yield Piece(part, part.row, (1, rows))
        elif not layout.interleaved:
            yield Piece(part, (matrix + part.row) * columns, (columns, 1))
        else:
            for half in _halves(part, rows // 2, columns):
                which, row = divmod(half.row, rows // 2)
                yield Piece(half, (matrix + 2 * row + which) * columns, (2 * columns, 1))


def _halves(part: Part, height: int, columns: int) -> Iterator[Part]:
    """The rows of gate and those of up, each by itself."""
    begin, end = part.row, part.row + part.rows
    for low, high in ((0, height), (height, 2 * height)):
        first, last = max(begin, low), min(end, high)
        if first < last:
            at = part.first + (first - begin) * columns
            yield Part(part.tensor, at, part.matrix, first, last - first)


def shape_in(layout: Layout, made: Made) -> tuple[int, ...]:
    """The shape that a weight is stored in."""
    return made.shape[::-1] if layout.turned else made.shape


def compare(
    stored: Tensor,
    made: Made,
    layout: Layout,
    factors: tuple[np.float32, ...],
    source: Source,
    reader: Reader,
    advance: Advance,
) -> list[Difference]:
    """Where a stored weight is not what its checkpoint says, tensor by tensor.

    Args:
        stored: the weight.
        made: of what.
        layout: in which it is stored.
        factors: that it is multiplied by, one after the other, each product rounded.
        source: reads the checkpoint.
        reader: reads the weight.
        advance: told the bytes that were compared.
    """
    columns = made.matrices[2]
    height = max(1, BLOCK // max(columns, 1))
    found: dict[str, Difference] = {}
    for piece in pieces(made, layout):
        part = piece.part
        difference = found.setdefault(part.tensor.name, Difference(part.tensor, stored.dtype))
        for first in range(0, part.rows, height):
            count = min(height, part.rows - first)
            begin = piece.first + first * piece.strides[0]
            is_bits = reader.window(stored, begin, piece.strides, count, columns)
            least, most = source.rows(made, part, first, count, columns)
            low = _product(least, factors, stored.dtype)
            difference.compared += low.size
            advance(low.nbytes)
            if least is most:
                wrong = is_bits != low
            else:
                high = _product(most, factors, stored.dtype)
                wrong = _outside(is_bits, low, high, stored.dtype)
                middle = (widen(low, stored.dtype) + widen(high, stored.dtype)) * np.float32(0.5)
                low = rounded(middle, stored.dtype)
            if wrong.any():
                at = part.first + first * columns
                _note(difference, is_bits, low, wrong, at, stored.dtype)
    return [each for each in found.values() if each.count]


def _product(values: Floats, factors: tuple[np.float32, ...], dtype: str) -> Bits:
    bits = rounded(values, dtype)
    for factor in factors:
        with np.errstate(over="ignore"):
            bits = rounded(widen(bits, dtype) * factor, dtype)
    return bits


def _outside(found: Bits, one: Bits, other: Bits, dtype: str) -> np.ndarray:
    """Whether elements are not between two bounds; NaN never is."""
    value, first, second = (widen(np.ascontiguousarray(b), dtype) for b in (found, one, other))
    inside = (value >= np.minimum(first, second)) & (value <= np.maximum(first, second))
    return np.asarray(~inside)


def _note(
    difference: Difference, found: Bits, wanted: Bits, wrong: np.ndarray, at: int, dtype: str
) -> None:
    """Add a block with elements that differ.

    Args:
        difference: that they are added to.
        found: what is stored.
        wanted: what should be.
        wrong: which of them differ.
        at: element of the tensor that the block begins with.
        dtype: of both.
    """
    flat = int(wrong.reshape(-1).argmax())
    if not difference.count:
        row, column = np.unravel_index(flat, wrong.shape)
        place = np.unravel_index(at + flat, difference.tensor.shape)
        difference.index = tuple(map(int, place))
        difference.found = text(found[row, column], dtype)
        difference.wanted = text(wanted[row, column], dtype)
    difference.count += int(wrong.sum())
    is_wide, wide = (
        widen(np.ascontiguousarray(bits), dtype).astype(np.float64) for bits in (found, wanted)
    )
    with np.errstate(all="ignore"):
        difference.square += float(((is_wide - wide) ** 2).sum())
        difference.power += float((wide**2).sum())
        ratio = (is_wide / wide)[np.abs(wide) > 1e-6]
    if ratio.size:
        least, most = difference.ratios
        difference.ratios = min(least, float(ratio.min())), max(most, float(ratio.max()))
