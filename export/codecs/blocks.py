"""Blocks of whole numbers with a scale each, as ``com.microsoft::MatMulNBits`` reads them.

A row of K weights is cut into blocks of ``size``; each block has one float32 scale and, where it is
asymmetric, a zero point of as many bits as its numbers::

    w ~ (q - zero_point) * scale          0 <= q < 2**bits

Without a zero point it is the middle, ``2**(bits - 1)``. Numbers lie in the order of the row, two
of four bits in a byte, the first in its low half; a row that no whole number of blocks fills is
filled up with zeros, which a reader cuts off. Zero points lie in the same way, a row at a time.

Scales are those of the least squared error: for each block several ways to cut its range are tried,
and after rounding with each the scale is fitted to the numbers found (the search of llama.cpp's
``make_qx_quants``, with the least squares of each candidate).

Source: onnxruntime/docs/ContribOperators.md, MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Bits = Literal[4, 8]
Size = Literal[32, 64, 128]

# Blocks that are searched at a time: what the search holds of them is a few megabytes.
AT_ONCE = 1 << 14
# By how many of the numbers' steps the range of a block is made narrower or wider.
NARROWER = (0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 2.0, 3.0)


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
    """

    bits: Bits
    size: Size
    symmetric: bool = True

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
        """Of a row that whole blocks fill."""
        return self.bits + (32 + (0 if self.symmetric else self.bits)) / self.size

    def encode(self, weights: Floats, importance: Floats | None = None) -> Encoded:
        """Quantise a matrix.

        Args:
            weights: ``[N, K]``, finite.
            importance: ``[K]``, not negative: how much the squared error of each column counts.
        """
        rows, columns = weights.shape
        count = -(-columns // self.size)
        filled = np.zeros((rows, count * self.size), np.float32)
        filled[:, :columns] = weights
        counts = np.ones(count * self.size, np.float32)
        if importance is not None:
            counts[:columns] = importance
        blocks, by_block = filled.reshape(-1, self.size), counts.reshape(count, self.size)
        numbers: Bytes = np.empty(blocks.shape, np.uint8)
        scales = np.empty(len(blocks), np.float32)
        zeros = np.full(len(blocks), self.middle, np.uint8)
        for first in range(0, len(blocks), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            places = np.arange(first, min(first + AT_ONCE, len(blocks))) % count
            numbers[some], scales[some], zeros[some] = self._searched(
                blocks[some], by_block[places]
            )
        numbers = numbers.reshape(rows, count, self.size)
        return Encoded(
            self._packed(numbers),
            scales.reshape(rows, count),
            None if self.symmetric else self._packed(zeros.reshape(rows, count)),
        )

    def decode(self, encoded: Encoded, columns: int) -> Floats:
        """The matrix ``[N, columns]`` that a kernel computes with."""
        rows, count, _ = encoded.data.shape
        numbers = self._unpacked(encoded.data, self.size)
        if encoded.zero_points is None:
            zeros: npt.NDArray[Any] = np.full((rows, count), self.middle, np.uint8)
        else:
            zeros = self._unpacked(encoded.zero_points, count)
        steps = numbers.astype(np.int16) - zeros[..., None].astype(np.int16)
        wide = steps.astype(np.float32) * encoded.scales[..., None]
        result: Floats = wide.reshape(rows, -1)[:, :columns]
        return result

    def _searched(self, blocks: Floats, counts: Floats) -> tuple[Bytes, Floats, Bytes]:
        """Numbers ``[n, size]``, scales and zero points ``[n]`` of the least error."""
        # Of size 1, so that no square is beyond float32, or below it.
        size = np.abs(blocks).max(axis=1)
        blocks = np.divide(
            blocks, size[:, None], out=np.zeros_like(blocks), where=size[:, None] > 0
        )
        best = np.full(len(blocks), np.inf)
        numbers = np.full(blocks.shape, self.middle, np.int16)
        scales = np.zeros(len(blocks), np.float32)
        zeros = np.full(len(blocks), self.middle, np.int16)
        for scale, zero in self._candidates(blocks):
            with np.errstate(divide="ignore", invalid="ignore"):
                steps = np.nan_to_num(blocks / scale[:, None], posinf=0.0, neginf=0.0)
            found = np.clip(np.rint(steps) + zero[:, None], 0, self.most).astype(np.int16)
            moved = (found - zero[:, None]).astype(np.float32)
            fitted = _least_squares(blocks, moved, counts)
            error = (counts * (blocks - moved * fitted[:, None]) ** 2).sum(axis=1)
            better = error < best
            best[better], scales[better] = error[better], fitted[better]
            numbers[better], zeros[better] = found[better], zero[better]
        return numbers.astype(np.uint8), scales * size, zeros.astype(np.uint8)

    def _candidates(self, blocks: Floats) -> Iterator[tuple[Floats, npt.NDArray[np.int16]]]:
        """Scales, and zero points, to begin with."""
        if self.symmetric:
            # The number of largest size is at the end that has one step more.
            at = np.abs(blocks).argmax(axis=1)
            largest: Floats = np.take_along_axis(blocks, at[:, None], axis=1)[:, 0]
            middle = np.full(len(blocks), self.middle, np.int16)
            for steps in NARROWER:
                yield np.asarray(largest / -(self.middle + steps), np.float32), middle
            # And both ends alike, which is better where two are as large.
            yield np.asarray(np.abs(largest) / (self.middle - 1), np.float32), middle
            return
        # Zero is always one of the numbers, as kernels ask for.
        low: Floats = np.minimum(blocks.min(axis=1), np.float32(0))
        high: Floats = np.maximum(blocks.max(axis=1), np.float32(0))
        for steps in NARROWER:
            scale: Floats = (high - low) / np.float32(self.most + steps)
            with np.errstate(divide="ignore", invalid="ignore"):
                exact = np.nan_to_num(-low / scale)
            nearest = np.rint(exact)
            for moved in (0, 1, -1):
                yield scale, np.clip(nearest + moved, 0, self.most).astype(np.int16)

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


def _least_squares(blocks: Floats, moved: Floats, counts: Floats) -> Floats:
    """The scale of each block that fits what it is to what it is counted in."""
    above = (counts * blocks * moved).sum(axis=1)
    below = (counts * moved * moved).sum(axis=1)
    result: Floats = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return result
