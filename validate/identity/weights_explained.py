"""What explains weights in blocks that are not what they should be, in words.

Each way in which an export or a reader may go wrong is tried: the same bytes read so have little
error, where they have much as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ingot.validate.identity.weights_blocks import Rows
from ingot.validate.identity.weights_files import Floats, Reader
from ingot.validate.identity.weights_graph import Layout
from ingot.validate.identity.weights_piece import Numbers, Piece

# An explanation leaves at most this share of the squared error. Of what is as it should be no other
# reading has less error at all.
LEFT = 0.5
# Rows that are tried.
MOST_ROWS = 64
# Experts whose scales and numbers are tried.
MOST_EXPERTS = 256


class Where(NamedTuple):
    """Where the rows are from.

    Attributes:
        weight: that they are stored in.
        layout: of it.
        rows: of it.
        begin: number of its first expert.
    """

    weight: Numbers
    layout: Layout
    rows: Rows
    begin: int

    def expert(self, matrix: int) -> int:
        """The number of an expert, by that of the stored matrix."""
        backwards = self.layout.backwards
        return self.begin + (self.weight.matrices - 1 - matrix if backwards else matrix)


def explained(
    wanted: Floats,
    piece: Piece,
    wrong: npt.NDArray[np.bool_],
    where: Where,
    reader: Reader | None = None,
) -> str:
    """What explains that some blocks are wrong; empty where nothing does that is known here.

    Args:
        wanted: what rows should be, ``[rows, columns]``.
        piece: as they are stored.
        wrong: which blocks are, ``[rows, blocks]``.
        where: they are from.
        reader: reads other rows of the weight; None where these are not tried.
    """
    first = int(wrong.any(axis=1).argmax())
    some = slice(first, first + MOST_ROWS)
    count, blocks, size = piece.numbers[some].shape
    filled = np.zeros((count, blocks * size), np.float32)
    filled[:, : wanted.shape[1]] = wanted[some]
    right, counts = filled.reshape(count, blocks, size), wrong[some]
    held = Piece(piece.numbers[some], piece.scales[some], piece.zeros[some])
    rows = where.rows._replace(first=where.rows.first + first * where.rows.step, height=count)

    def left(decoded: Floats) -> float:
        errors = (right - decoded.reshape(right.shape))[counts].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.square(errors).sum())

    plain = held.decoded()
    best, reason = LEFT * left(plain), ""
    for text, other in _others(held, where._replace(rows=rows), reader):
        error = left(other.decoded())
        if error < best:
            best, reason = error, text
    factor = _factor(right[counts], plain.reshape(right.shape)[counts])
    if factor and left(plain / np.float32(factor)) < best:
        reason = f"all of it is {factor:.4g} times what it should be"
    return reason


def _factor(right: Floats, found: Floats) -> float:
    """By what numbers are multiplied, if they all are."""
    wide, is_wide = right.astype(np.float64), found.astype(np.float64)
    # What a fitted scale leaves is orthogonal to what is stored, and not to what should be.
    both = float((wide * is_wide).sum())
    factor = float((is_wide * is_wide).sum()) / both if both else 0.0
    return factor if np.isfinite(factor) else 0.0


def _others(held: Piece, where: Where, reader: Reader | None) -> Iterator[tuple[str, Piece]]:
    """Other ways to read the same bytes, and other bytes that may belong there."""
    weight, (numbers, scales, zeros) = where.weight, held
    has_zeros = weight.has_zero_points
    what = "zero points" if has_zeros else "numbers"
    for more, said in ((1, "high"), (-1, "low")):
        # What is right is one less of a zero point that is too high, and one more of a number's.
        moved = zeros + np.int16(-more if has_zeros else more)
        yield f"its {what} are one too {said}", held._replace(zeros=moved)
    if weight.bits == 4:
        yield "its nibbles are swapped", held._replace(numbers=_swapped(numbers, weight.apart))
        if has_zeros and weight.zeros_share and zeros.shape[1] % 2 == 0:
            swapped = held._replace(zeros=_swapped(zeros, 1))
            yield "the nibbles of its zero points are swapped", swapped
    if has_zeros:
        middle = np.full_like(zeros, 1 << (weight.bits - 1))
        yield "it was rounded without zero points", held._replace(zeros=middle)
    wide = numbers.astype(np.int16)
    signed = np.where(numbers > weight.most // 2, wide - weight.most - 1, wide)
    yield "its numbers are signed", Piece(signed, scales, np.zeros_like(zeros))
    for place, axis in (("block", 1), ("row", 0)):
        # What is right for a place lies behind it where each has what is before it.
        for by, side in ((-1, "before"), (1, "behind")):
            of = f"of the {place} {side}"
            yield f"its scales are {of}", held._replace(scales=np.roll(scales, by, axis))
            if has_zeros:
                yield f"its zero points are {of}", held._replace(zeros=np.roll(zeros, by, axis))
            yield f"its numbers are {of}", held._replace(numbers=np.roll(numbers, by, axis))
    if reader is not None:
        yield from _of_other_rows(held, where, reader)


def _swapped(numbers: npt.NDArray[np.uint8], apart: int) -> npt.NDArray[np.uint8]:
    """The last axis with each two numbers exchanged that are so far apart."""
    pairs = numbers.reshape(*numbers.shape[:-1], -1, 2, apart)
    return np.ascontiguousarray(pairs[..., ::-1, :]).reshape(numbers.shape)


def _of_other_rows(held: Piece, where: Where, reader: Reader) -> Iterator[tuple[str, Piece]]:
    """What other experts, or the other one of gate and up, have in the same places."""
    weight, rows = where.weight, where.rows
    if rows.step == 2:
        begin = rows.first ^ 1
        other = weight.piece(reader, rows.matrix, begin, rows.height, rows.step)
        yield "gate and up are exchanged", other
    for matrix in range(min(weight.matrices, MOST_EXPERTS)):
        if matrix == rows.matrix:
            continue
        other = weight.piece(reader, matrix, rows.first, rows.height, rows.step)
        place = f"where those of expert {where.expert(matrix)} should be"
        yield f"its rows are {place}", other
        yield f"its scales are {place}", held._replace(scales=other.scales)
        if weight.has_zero_points:
            yield f"its zero points are {place}", held._replace(zeros=other.zeros)
