"""Blocks of whole numbers with a scale each, as ``com.microsoft::MatMulNBits`` reads them.

A row of K weights is cut into blocks of ``size``; each block has one scale and, where it is
asymmetric, a zero point of as many bits as its numbers::

    w ~ (q - zero_point) * scale          0 <= q < 2**bits

Without a zero point it is the middle, ``2**(bits - 1)``. Numbers lie in the order of the row, two
of four bits in a byte, the first in its low half; a row that no whole number of blocks fills is
filled up with zeros, which a reader cuts off. Zero points lie in the same way, a row at a time.

Scales are those of the least squared error that ``search.py`` finds. They are float32, or what
Ingot's own kernels have of them: float16 times a power of two of the row.

Source: onnxruntime/docs/ContribOperators.md, MatMulNBits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ingot.export.codecs.search import Floats as Floats
from ingot.export.codecs.search import search
from ingot.export.codecs.threads import in_threads
from ingot.plugins.cpu.panels import Format, scales_stored

Bytes = npt.NDArray[np.uint8]
Bits = Literal[4, 8]
Size = Literal[32, 64, 128]
Scales = Literal["float32", "float16"]

# Weights that are searched at a time by one thread, a few times that in bytes are held of them.
AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Encoded:
    """A matrix in blocks.

    Attributes:
        data: the numbers, ``[N, blocks, size * bits / 8]``.
        scales: ``[N, blocks]``.
        zero_points: ``[N, ceil(blocks * bits / 8)]``; None where they are the middle.
    """

    data: Bytes
    scales: Floats
    zero_points: Bytes | None = None

    @property
    def nbytes(self) -> int:
        zero_points = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.data.nbytes + self.scales.nbytes + zero_points


@dataclass(frozen=True)
class Blocks:
    """One format of blocks.

    Attributes:
        bits: of a number.
        size: numbers of a block.
        symmetric: whether the zero point is always the middle.
        scales: what each block's is stored in; float16 is what panels of the CPU kernels have.
    """

    bits: Bits
    size: Size
    symmetric: bool = True
    scales: Scales = "float32"

    @property
    def most(self) -> int:
        """The largest number."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric block."""
        return 1 << (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """Of a row that whole blocks fill, less what it has once."""
        if self.in_panels:
            return self.bits + (16 + (0 if self.symmetric else 8)) / self.size
        return self.bits + (32 + (0 if self.symmetric else self.bits)) / self.size

    @property
    def in_panels(self) -> bool:
        """Whether Ingot's own kernels read it."""
        return self.scales == "float16"

    @property
    def form(self) -> Format:
        """How a panel has it."""
        return Format("int4" if self.bits == 4 else "int8", self.size, not self.symmetric)

    def nbytes(self, rows: int, columns: int) -> int:
        """What a matrix of any size takes."""
        if self.in_panels:
            return self.form.nbytes(rows, columns)
        blocks = -(-columns // self.size)
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (blocks * (self.size * self.bits // 8 + 4) + zero_points)

    def encode(self, weights: Floats, importance: Floats | None = None) -> Encoded:
        """Quantise a matrix.

        Args:
            weights: ``[N, K]``, finite.
            importance: ``[K]``, not negative: how much the squared error of each column counts.
        """
        rows, columns = weights.shape
        count = -(-columns // self.size)
        data = np.empty((rows, count, self.size * self.bits // 8), np.uint8)
        scales = np.empty((rows, count), np.float32)
        zeros = None if self.symmetric else np.empty((rows, count), np.uint8)
        counts = None if importance is None else self._counts(importance)

        def search_in(first: int) -> None:
            some = slice(first, first + step)
            found = search(self._columns(weights[some]), self.bits, self.symmetric, repeated(some))
            shape = (-1, count)
            numbers = self._packed_down(found.numbers.astype(np.uint8))
            data[some] = numbers.T.reshape(*data[some].shape)
            scales[some] = self._stored(found.scales.reshape(shape))
            if zeros is not None and found.zeros is not None:
                zeros[some] = found.zeros.astype(np.uint8).reshape(shape)

        def repeated(some: slice) -> Floats | None:
            if counts is None:
                return None
            result: Floats = np.tile(counts, len(scales[some]))
            return result

        step = max(1, AT_ONCE // (count * self.size))
        in_threads(search_in, range(0, rows, step))
        return Encoded(data, scales, None if zeros is None else self._packed(zeros))

    def pack(self, numbers: Bytes, scales: Floats, zeros: Bytes | None) -> Encoded:
        """A matrix whose numbers are known.

        Args:
            numbers: ``[N, blocks, size]``.
            scales: ``[N, blocks]``.
            zeros: ``[N, blocks]``; None where they are the middle. A format that is not symmetric
                has them all the same.
        """
        if not self.symmetric and zeros is None:
            zeros = np.full(scales.shape, self.middle, np.uint8)
        return Encoded(
            self._packed(numbers),
            self._stored(scales),
            None if self.symmetric or zeros is None else self._packed(zeros),
        )

    def unpack(self, encoded: Encoded) -> tuple[Bytes, Bytes | None]:
        """Numbers ``[N, blocks, size]`` and zero points ``[N, blocks]``, a byte each."""
        points = encoded.zero_points
        zeros = None if points is None else self._unpacked(points, encoded.scales.shape[1])
        return self._unpacked(encoded.data, self.size), zeros

    def decode(self, encoded: Encoded, columns: int) -> Floats:
        """The matrix ``[N, columns]`` that a kernel computes with."""
        rows, count, _ = encoded.data.shape
        numbers, points = self.unpack(encoded)
        zeros: npt.NDArray[Any] = (
            np.full((rows, count), self.middle, np.uint8) if points is None else points
        )
        steps = numbers.astype(np.int16) - zeros[..., None].astype(np.int16)
        wide = steps.astype(np.float32) * encoded.scales[..., None]
        result: Floats = wide.reshape(rows, -1)[:, :columns]
        return result

    def _stored(self, scales: Floats) -> Floats:
        """Scales ``[N, blocks]`` as they are stored.

        Half a unit of float16 moves the largest of 256 numbers by a sixteenth of a step, so numbers
        that were chosen before stay as they are.
        """
        return scales_stored(scales) if self.in_panels else scales

    def _columns(self, rows: Floats) -> Floats:
        """The blocks of some rows, one a column, the last of each row filled up with zeros."""
        count, columns = len(rows), rows.shape[1]
        blocks = -(-columns // self.size)
        result = np.zeros((self.size, count, blocks), np.float32)
        whole = columns // self.size
        cut = whole * self.size
        result[:, :, :whole] = rows[:, :cut].reshape(count, whole, self.size).transpose(2, 0, 1)
        if whole < blocks:
            result[: columns - cut, :, whole] = rows[:, cut:].T
        return result.reshape(self.size, -1)

    def _counts(self, importance: Floats) -> Floats:
        """What counts in each block of a row, one a column, of mean 1; filled up with zeros."""
        counts = self._columns(np.asarray(importance, np.float32)[None])
        mean = counts.mean(axis=0)
        # Where nothing counts, all counts alike.
        counts[:, mean == 0], mean[mean == 0] = 1, 1
        result: Floats = counts / mean
        return result

    def _packed_down(self, numbers: Bytes) -> Bytes:
        """Numbers along the first axis, in bytes."""
        if self.bits == 8:
            return numbers
        packed: Bytes = numbers[::2] | np.left_shift(numbers[1::2], 4, dtype=np.uint8)
        return packed

    def _packed(self, numbers: Bytes) -> Bytes:
        """Numbers along the last axis, in bytes."""
        if self.bits == 8:
            return np.ascontiguousarray(numbers)
        if numbers.shape[-1] % 2:
            numbers = np.concatenate([numbers, np.zeros_like(numbers[..., :1])], axis=-1)
        packed: Bytes = numbers[..., ::2] | np.left_shift(numbers[..., 1::2], 4, dtype=np.uint8)
        return packed

    def _unpacked(self, data: Bytes, count: int) -> Bytes:
        if self.bits == 8:
            return data
        pairs = np.stack([data & 15, data >> 4], axis=-1)
        unpacked: Bytes = pairs.reshape(*data.shape[:-1], -1)[..., :count]
        return unpacked
