"""Weights as the CPU kernels read them: in panels of sixteen rows.

``src/panels.h`` says how the bytes of a panel lie; this writes and reads them. NumPy alone.

A scale is stored in float16, times a factor of its row that is a power of two, so that the row's
largest scale uses float16's upper range and no scale of a usual size loses bits to its lower end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = Literal["float32", "bfloat16", "int8", "int4"]
# Number of a format in ingot_cpu.h.
NUMBERS: dict[Numbers, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
ROWS = 16
LINE = 64
# What products may round their activations to, as ``round_activations`` says it: nothing; int8, a
# block at a time, with whole numbers; bfloat16 with bfloat16.
EXACT, TO_INT8, TO_BFLOAT16 = 0, 1, 2

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
        numbers: a key of ``NUMBERS``.
        block: whole numbers of a row that share a scale, 32, 64 or 128; 0 of floats.
        zero_points: whether each block has one.
    """

    numbers: Numbers
    block: int = 0
    zero_points: bool = False

    @property
    def bits(self) -> int:
        return {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[self.numbers]

    @property
    def middle(self) -> int:
        """The zero point where none is stored."""
        return 1 << (self.bits - 1)

    def panel_bytes(self, columns: int) -> int:
        """Of sixteen rows."""
        if not self.block:
            return _up(columns, 32 // self.bits) * ROWS * self.bits // 8
        return self._parts(columns).bytes

    def nbytes(self, rows: int, columns: int) -> int:
        """Of a matrix ``[rows, columns]``."""
        return -(-rows // ROWS) * self.panel_bytes(columns)

    def _parts(self, columns: int) -> _Parts:
        blocks = -(-columns // self.block)
        scales = ROWS * 4
        zeros = scales + _up(blocks * ROWS * 2, LINE)
        numbers = zeros + (_up(blocks * ROWS, LINE) if self.zero_points else 0)
        return _Parts(
            blocks, scales, zeros, numbers, numbers + blocks * self.block * ROWS * self.bits // 8
        )


def rounding(asked: bool, *forms: Format) -> int:
    """``round_activations`` of an operator over weights of these formats.

    Args:
        asked: whether it may round where it can.
        forms: with whole numbers among them those alone are multiplied by what is rounded.
    """
    if not asked:
        return EXACT
    if any(form.block for form in forms):
        return TO_INT8
    return TO_BFLOAT16 if any(form.numbers == "bfloat16" for form in forms) else EXACT


class _Parts(NamedTuple):
    """Where the parts of a panel of whole numbers begin."""

    blocks: int
    scales: int
    zeros: int
    numbers: int
    bytes: int


class Whole(NamedTuple):
    """A matrix of whole numbers.

    Attributes:
        numbers: ``[N, blocks, block]`` uint8.
        scales: ``[N, blocks]`` float32, each of which ``scales_stored`` returns as it is.
        zeros: ``[N, blocks]`` uint8; None where they are the middle.
    """

    numbers: Bytes
    scales: Floats
    zeros: Bytes | None = None


def pack_floats(form: Format, matrix: Floats) -> Bytes:
    """``[panels, bytes]`` of a matrix ``[N, K]`` whose numbers the format has."""
    if form.numbers == "float32":
        return pack_float32(matrix)
    return pack_bfloat16((matrix.view(np.uint32) >> 16).astype(np.uint16))


def pack_float32(matrix: Floats) -> Bytes:
    """``[panels, bytes]`` of a matrix ``[N, K]``."""
    return _side_by_side(matrix.astype(np.float32, copy=False))


def pack_bfloat16(bits: npt.NDArray[np.uint16]) -> Bytes:
    """``[panels, bytes]`` of the bits of a matrix ``[N, K]``."""
    rows, columns = bits.shape
    if columns % 2 or not bits.flags.c_contiguous:
        pairs = np.zeros((rows, _up(columns, 2)), np.uint16)
        pairs[:, :columns] = bits
        bits = pairs
    return _side_by_side(bits.view(np.uint32))


def _side_by_side(matrix: npt.NDArray[Any]) -> Bytes:
    """``[panels, bytes]`` of rows of four bytes an element, of which sixteen lie side by side."""
    rows, columns = matrix.shape
    result = np.empty((-(-rows // ROWS), columns, ROWS), matrix.dtype)
    whole = rows // ROWS
    # What is copied stays in a processor's cache, row by row it would not.
    for panel in range(whole):
        result[panel] = matrix[panel * ROWS : (panel + 1) * ROWS].T
    if rows % ROWS:
        result[whole] = 0
        result[whole, :, : rows % ROWS] = matrix[whole * ROWS :].T
    return result.view(np.uint8).reshape(len(result), -1)


def unpack_floats(form: Format, data: Bytes, rows: int, columns: int) -> Floats:
    """The matrix ``[rows, columns]`` that ``pack_floats`` took."""
    count, wide = len(data), _up(columns, 32 // form.bits)
    if form.numbers == "float32":
        panels = data.view(np.float32).reshape(count, wide, ROWS).transpose(0, 2, 1)
    else:
        pairs = data.view(np.uint16).reshape(count, wide // 2, ROWS, 2).transpose(0, 2, 1, 3)
        high = pairs.reshape(count, ROWS, wide).astype(np.uint32) << 16
        panels = high.view(np.float32)
    return np.ascontiguousarray(panels.reshape(-1, wide)[:rows, :columns])


def pack_whole(form: Format, matrix: Whole) -> Bytes:
    """``[panels, bytes]`` of whole numbers.

    The scales are those of ``scales_stored``: of others what is stored is rounded.
    """
    rows, blocks, _ = matrix.numbers.shape
    parts = form._parts(blocks * form.block)
    count = -(-rows // ROWS)
    result = np.zeros((count, parts.bytes), np.uint8)
    halves, factors = _halves(matrix.scales)

    def panels(values: npt.NDArray[Any], fill: int) -> npt.NDArray[Any]:
        filled = np.full((count * ROWS, *values.shape[1:]), fill, values.dtype)
        filled[:rows] = values
        return filled.reshape(count, ROWS, *values.shape[1:])

    def put(at: int, values: npt.NDArray[Any]) -> None:
        flat = np.ascontiguousarray(values).view(np.uint8).reshape(count, -1)
        result[:, at : at + flat.shape[1]] = flat

    put(0, panels(factors, 0))
    put(parts.scales, panels(halves, 0).transpose(0, 2, 1))
    if form.zero_points:
        assert matrix.zeros is not None
        put(parts.zeros, panels(matrix.zeros, 0).transpose(0, 2, 1))
    numbers = panels(matrix.numbers, form.middle)
    if form.bits == 8:
        groups = numbers.reshape(count, ROWS, blocks, form.block // 4, 4)
    else:
        halved = numbers.reshape(count, ROWS, blocks, form.block // 8, 2, 4)
        groups = halved[..., 0, :] | np.left_shift(halved[..., 1, :], 4, dtype=np.uint8)
    put(parts.numbers, groups.transpose(0, 2, 3, 1, 4))
    return result


def unpack_whole(form: Format, data: Bytes, rows: int, columns: int) -> Whole:
    """What ``pack_whole`` stored."""
    parts = form._parts(columns)
    count, blocks = len(data), parts.blocks

    def part(at: int, size: int, dtype: type) -> npt.NDArray[Any]:
        return np.ascontiguousarray(data[:, at : at + size]).view(dtype)

    factors = part(0, ROWS * 4, np.float32).reshape(count, ROWS, 1)
    halves = part(parts.scales, blocks * ROWS * 2, np.float16).reshape(count, blocks, ROWS)
    scales = halves.transpose(0, 2, 1).astype(np.float32) * factors
    zeros = None
    if form.zero_points:
        found = part(parts.zeros, blocks * ROWS, np.uint8).reshape(count, blocks, ROWS)
        zeros = np.ascontiguousarray(found.transpose(0, 2, 1).reshape(-1, blocks)[:rows])
    packed = data[:, parts.numbers :]
    if form.bits == 8:
        groups = packed.reshape(count, blocks, form.block // 4, ROWS, 4)
    else:
        bytes_ = packed.reshape(count, blocks, form.block // 8, ROWS, 1, 4)
        groups = np.concatenate([bytes_ & 15, bytes_ >> 4], axis=-2)
    order = (0, 3, 1, 2, *range(4, groups.ndim))
    numbers = groups.transpose(order).reshape(-1, blocks, form.block)[:rows]
    return Whole(np.ascontiguousarray(numbers), scales.reshape(-1, blocks)[:rows], zeros)


def scales_stored(scales: Floats) -> Floats:
    """Scales ``[N, blocks]`` as a panel has them."""
    halves, factors = _halves(scales)
    result: Floats = halves.astype(np.float32) * factors[:, None]
    return result


def _halves(scales: Floats) -> tuple[npt.NDArray[np.float16], Floats]:
    """Scales as float16 and a factor for each row."""
    with np.errstate(over="ignore"):
        plain = scales.astype(np.float16)
    # Those of a checkpoint in half precision are kept to the bit.
    exact = (plain.astype(np.float32) == scales).all(axis=1)
    largest = np.abs(scales).max(axis=1, initial=0)
    _, exponents = np.frexp(np.where(largest > 0, largest, 1))
    powers = np.clip(exponents - 15, -126, 127)
    factors = np.where(exact, 0, powers)
    found = np.ldexp(np.float32(1), factors).astype(np.float32)
    return (scales / found[:, None]).astype(np.float16), found


def _up(value: int, to: int) -> int:
    return -(-value // to) * to
