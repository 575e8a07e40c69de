"""Weights in blocks against the checkpoint's numbers: what rounding may do to a block, and no more.

What is stored is decoded and held against the checkpoint block by block. Rounding to nearest, with
the scale that a block's largest number gives, has a squared error that can be worked out from the
block alone; a search for better scales makes it less, so more is a fault: numbers, scales or zero
points of another place, or read in another way. An error of one number hides in that of a long
block, so each number has to be within little more than a step of what it stands for, too.

Calibrated methods trade the error of weights for that of outputs, some numbers by more than a step.
Of them the rows of a matrix together are held to a multiple of what rounding to nearest costs; and
where rows that are read in another way have half the error, that is how they are to be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ingot.export.progress import Advance
from ingot.validate.identity.weights_blocks import Rows, stored_rows
from ingot.validate.identity.weights_compare import BLOCK, Source
from ingot.validate.identity.weights_explained import Where, explained
from ingot.validate.identity.weights_files import Floats, Reader, Tensor
from ingot.validate.identity.weights_graph import Layout
from ingot.validate.identity.weights_names import Made, Part
from ingot.validate.identity.weights_piece import Numbers, Piece

Doubles = npt.NDArray[np.float64]

NEAREST = "nearest"
# Below and above these squares leave float32.
LEAST, MOST = 1e-15, 1e15
# Of float32: what decoding and the scale of a block are rounded by, in units of its largest number.
FLOAT_ERROR = 2.0**-21


@dataclass(frozen=True)
class Tolerance:
    """What a method may do to weights.

    Attributes:
        block: squared error of a block over that of plain rounding; None where it is not bounded.
        steps: how far one number may be from what it stands for; None where that is not bounded.
        matrix: squared error of the rows of one expert, or of one tensor, over what plain rounding
            costs on average; likewise.
        exact: numbers are the checkpoint's own, and weights as well.
    """

    block: float | None = None
    steps: float | None = None
    matrix: float | None = None
    exact: bool = False


# A search begins with plain rounding, so a block is never worse than that but for the last bits.
# A scale that is fitted to numbers after they were rounded moves some of them beyond half a step;
# over a normal block by 0.12 steps, one standard deviation, so that 1.25 is seven of them.
# What is weighed by activations, or makes up for the error of columns before, costs weights more.
# Measured, with inputs that are correlated, few, and of which two are a thousand times the others:
# 0.7 to 2.4 of importance and 0.7 to 4.4 of GPTQ; single rows 60 and single blocks beyond any
# bound. Numbers or scales of another place cost 14 to 200.
TOLERANCES = {
    NEAREST: Tolerance(block=1.05, steps=1.25),
    "importance": Tolerance(matrix=10.0),
    "gptq": Tolerance(matrix=10.0),
    "given": Tolerance(exact=True),
}
# By how much more few rows may cost: one row alone may be all of a matrix that is badly off.
OF_ONE_ROW = 8.0
# Rows of each expert that are read in other ways, where a method bounds no block.
SAMPLED = 16


@dataclass(frozen=True)
class Format:
    """How a weight should be stored.

    Attributes:
        bits: of a number.
        size: numbers of a block.
        symmetric: whether it has no zero points.
        method: by which it was rounded, of ``TOLERANCES``.
    """

    bits: int
    size: int
    symmetric: bool
    method: str = NEAREST

    @property
    def text(self) -> str:
        """It, in words."""
        zero_points = "" if self.symmetric else " with zero points"
        return f"int{self.bits} in blocks of {self.size}{zero_points}"


@dataclass
class Rounding:
    """How a weight in blocks differs from one tensor of the checkpoint.

    Attributes:
        tensor: of the checkpoint.
        format: of the weight.
        blocks: that were compared.
        wrong: blocks that are further off than rounding explains.
        far: numbers that are.
        index: of the first element of the first wrong block, in the tensor.
        square: sum of the squared errors of the wrong blocks.
        plain: what plain rounding of these costs, on average.
        filled: whether what rows are filled up with is not zero.
        infinite: whether a scale is not finite.
        reason: what explains it.
    """

    tensor: Tensor
    format: Format
    blocks: int = 0
    wrong: int = 0
    far: int = 0
    index: tuple[int, ...] = ()
    square: float = 0.0
    plain: float = 0.0
    filled: bool = False
    infinite: bool = False
    reason: str = ""

    @property
    def problem(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.wrong or self.filled)

    @property
    def ratio(self) -> float:
        """RMS of the errors of its wrong blocks over what plain rounding costs."""
        if not math.isfinite(self.square):
            return math.inf
        return math.sqrt(self.square / self.plain) if self.plain else math.inf

    def __str__(self) -> str:
        text = self._text()
        return f"{text}; {self.reason}" if self.reason else text

    def _text(self) -> str:
        if self.infinite:
            return f"a scale is not finite, the first of the block at {list(self.index)}"
        if not self.wrong:
            return "what its rows are filled up with is not zero"
        blocks = f"{self.wrong} of {self.blocks} block{'s' * (self.blocks != 1)}"
        are = "is" if self.wrong == 1 else "are"
        if TOLERANCES[self.format.method].exact:
            return f"{blocks} {are} not the checkpoint's, the first at {list(self.index)}"
        one = f", {self.far} numbers of them by more than a step" if self.far else ""
        return (
            f"{blocks} {are} further from the checkpoint than rounding to {self.format.text} "
            f"explains, the first at {list(self.index)}{one}"
        )


@dataclass(frozen=True)
class _Chunk:
    """Rows that are compared at a time: what they should be and what is stored."""

    wanted: Floats
    piece: Piece
    part: Part
    rows: Rows


def compare_blocks(
    weight: Numbers,
    made: Made,
    layout: Layout,
    given: Format,
    source: Source,
    reader: Reader,
    advance: Advance,
) -> list[Rounding]:
    """Where a weight in blocks is not what its checkpoint says, tensor by tensor.

    Args:
        weight: as it is stored, of the format that is ``given``.
        made: of what.
        layout: in which it is stored.
        given: its format, and how it was rounded.
        source: reads the checkpoint.
        reader: reads the weight.
        advance: told the bytes that were compared.
    """
    found: dict[str, Rounding] = {}
    tolerance = TOLERANCES[given.method]
    bounded = tolerance.block is not None or tolerance.exact
    for chunk in _chunks(weight, made, layout, source, reader):
        name = chunk.part.tensor.name
        rounding = found.setdefault(name, Rounding(chunk.part.tensor, given))
        first = not rounding.wrong
        wrong, square, average = _judge(rounding, chunk, made.matrices[2])
        where = Where(weight, layout, chunk.rows, made.begin)
        if not wrong.any() and not bounded:
            sample = np.zeros_like(wrong)
            sample[:SAMPLED] = True
            reason = explained(chunk.wanted, chunk.piece, sample, where)
            wrong |= bool(reason)
            rounding.reason = rounding.reason or reason
        elif first and wrong.any():
            rounding.reason = explained(chunk.wanted, chunk.piece, wrong, where, reader)
        _note(rounding, wrong, chunk, made.matrices[2])
        with np.errstate(invalid="ignore"):
            rounding.square += float(square[wrong].sum(dtype=np.float64))
            rounding.plain += float(average[wrong].sum())
        advance(chunk.piece.numbers.size * weight.bits // 8 + chunk.piece.scales.nbytes)
    return [each for each in found.values() if each.problem]


def filling_is_zero(weight: Numbers, made: Made, reader: Reader) -> bool:
    """Whether the rows of each matrix that the checkpoint does not have are zero."""
    height = made.matrices[1]
    for matrix in range(weight.matrices if weight.rows > height else 0):
        piece = weight.piece(reader, matrix, height, weight.rows - height)
        if piece.decoded().any():
            return False
    return True


def _chunks(
    weight: Numbers, made: Made, layout: Layout, source: Source, reader: Reader
) -> Iterator[_Chunk]:
    _, height, columns = made.matrices
    most = max(1, BLOCK // (weight.blocks * weight.size))
    for part in made.parts:
        number = part.matrix - made.begin
        for rows in stored_rows(layout, weight.matrices, height, number, part.row, part.rows):
            for done in range(0, rows.height, most):
                count = min(most, rows.height - done)
                begin = rows.begin + done
                first = rows.first + done * rows.step
                own = replace(
                    part,
                    first=part.first + begin * columns,
                    row=part.row + begin,
                    rows=count,
                )
                piece = weight.piece(reader, rows.matrix, first, count, rows.step)
                least, high = source.rows(made, own, 0, count, columns)
                wanted = least if least is high else (least + high) * np.float32(0.5)
                some = Rows(begin, count, rows.matrix, first, rows.step)
                yield _Chunk(wanted, piece, own, some)


class _Judged(NamedTuple):
    """What is known of some rows' blocks ``[rows, blocks]``: squared errors, and which is too much.

    Attributes:
        wrong: whether a block is further off than rounding explains.
        square: squared error of each.
        average: what plain rounding costs.
    """

    wrong: npt.NDArray[np.bool_]
    square: np.ndarray
    average: np.ndarray


def _judge(rounding: Rounding, chunk: _Chunk, columns: int) -> _Judged:
    """Hold some rows to what rounding explains; adds single numbers to what is known."""
    piece, given = chunk.piece, rounding.format
    tolerance = TOLERANCES[given.method]
    count, blocks, size = piece.numbers.shape
    wanted, decoded = _filled(chunk.wanted, blocks * size), piece.decoded()
    rounding.filled |= bool(decoded[:, columns:].any())
    decoded[:, columns:] = 0
    wanted, decoded = (each.reshape(count, blocks, size) for each in (wanted, decoded))
    largest = np.abs(wanted).max(axis=-1)
    extreme = float(largest.max(initial=0.0))
    if not LEAST < extreme < MOST:
        wanted = wanted.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = wanted - decoded
        square = np.einsum("rbs,rbs->rb", errors, errors)
        step = _step(wanted, largest, given)
        average = size / 12 * np.square(step, dtype=np.float64)
        infinite = ~np.isfinite(piece.scales)
        wrong = ~np.isfinite(square)
        if tolerance.exact:
            wrong |= errors.any(axis=-1)
        if tolerance.block is not None:
            # Most blocks are below the average of plain rounding, and need no more.
            suspects = np.nonzero(~(square <= average))
            some = wanted[suspects].astype(np.float64)
            float_error = size * np.square(FLOAT_ERROR * largest[suspects], dtype=np.float64)
            most = tolerance.block * _plain(some, given) + float_error
            wrong[suspects] |= ~(square[suspects] <= most)
        if tolerance.matrix is not None:
            most = tolerance.matrix * (1 + OF_ONE_ROW / count) * average.sum()
            float_error = size * np.square(FLOAT_ERROR * largest, dtype=np.float64).sum()
            wrong |= not square.sum() <= most + float_error
        if tolerance.steps is not None:
            rounding.far += _far(wrong, wanted, errors, piece, given, tolerance.steps)
    rounding.blocks += wrong.size
    rounding.infinite |= bool(infinite.any())
    return _Judged(np.asarray(wrong), square, average)


def _note(rounding: Rounding, wrong: npt.NDArray[np.bool_], chunk: _Chunk, columns: int) -> None:
    """Count the wrong blocks of some rows, and keep where the first of all is."""
    if wrong.any() and not rounding.wrong:
        row, block = np.unravel_index(int(wrong.reshape(-1).argmax()), wrong.shape)
        at = chunk.part.first + int(row) * columns + int(block) * rounding.format.size
        rounding.index = tuple(map(int, np.unravel_index(at, rounding.tensor.shape)))
    rounding.wrong += int(wrong.sum())


def _far(
    wrong: npt.NDArray[np.bool_],
    wanted: np.ndarray,
    errors: np.ndarray,
    piece: Piece,
    given: Format,
    steps: float,
) -> int:
    """How many numbers are ``steps`` or more from the nearest; their blocks are ``wrong``."""
    suspects = np.nonzero(np.abs(errors).max(axis=-1) > steps * np.abs(piece.scales))
    scales = piece.scales[suspects].astype(np.float64)[:, None]
    numbers = piece.numbers[suspects].astype(np.float64)
    # Beyond either end the end is the nearest.
    with np.errstate(divide="ignore"):
        exact = wanted[suspects] / scales + piece.zeros[suspects][:, None]
    moved = np.abs(numbers - np.clip(exact, 0, (1 << given.bits) - 1))
    # A scale of zero stands for zeros, and its error is seen as that of the block.
    far = (moved > steps) & (scales != 0)
    wrong[suspects] |= far.any(axis=-1)
    return int(far.sum())


def _step(wanted: np.ndarray, largest: np.ndarray, given: Format) -> np.ndarray:
    """The step of plain rounding, for each block."""
    if given.symmetric:
        return np.asarray(largest / ((1 << (given.bits - 1)) - 1))
    low, high = np.minimum(wanted.min(axis=-1), 0), np.maximum(wanted.max(axis=-1), 0)
    return np.asarray((high - low) / ((1 << given.bits) - 1))


def _plain(blocks: Doubles, given: Format) -> Doubles:
    """The squared error of each block ``[n, size]`` where it is plainly rounded to nearest."""
    step = _step(blocks, np.abs(blocks).max(axis=-1), given)[:, None]
    safe = np.where(step > 0, step, 1.0)
    middle, most = 1 << (given.bits - 1), (1 << given.bits) - 1
    zero = (
        middle if given.symmetric else np.rint(-np.minimum(blocks.min(axis=-1), 0)[:, None] / safe)
    )
    numbers = np.clip(np.rint(blocks / safe) + zero, 0, most)
    errors: Doubles = blocks - (numbers - zero) * step
    return np.asarray(np.square(errors).sum(axis=-1))


def _filled(rows: Floats, width: int) -> Floats:
    """Rows with zeros behind them."""
    if rows.shape[1] == width:
        return rows
    filled = np.zeros((len(rows), width), np.float32)
    filled[:, : rows.shape[1]] = rows
    return filled
