"""Rows of a weight in whole numbers, and what is asked of every way to store them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ingot.validate.identity.weights_files import Floats, Reader, Tensor


class Piece(NamedTuple):
    """Some rows as they are stored.

    Attributes:
        numbers: ``[rows, blocks, size]``.
        scales: ``[rows, blocks]``.
        zeros: ``[rows, blocks]``.
    """

    numbers: npt.NDArray[Any]
    scales: Floats
    zeros: npt.NDArray[Any]

    def decoded(self) -> Floats:
        """What they are, ``[rows, blocks * size]``; NaN or infinite where a scale is."""
        wide = self.numbers.astype(np.float32)
        wide -= self.zeros[..., None]
        with np.errstate(invalid="ignore", over="ignore"):
            wide *= self.scales[..., None]
        return wide.reshape(len(wide), -1)


class Numbers(Protocol):
    """A weight in blocks of whole numbers, however they lie: a matrix, or a stack of them."""

    @property
    def codes(self) -> Tensor:
        """What its numbers are in, whose name is the weight's."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is stored in."""
        ...

    @property
    def matrices(self) -> int:
        """How many there are."""
        ...

    @property
    def rows(self) -> int:
        """Of each matrix."""
        ...

    @property
    def columns(self) -> int:
        """How many of a row its reader multiplies by something."""
        ...

    @property
    def blocks(self) -> int:
        """Of each row."""
        ...

    @property
    def size(self) -> int:
        """Numbers of a block."""
        ...

    @property
    def bits(self) -> int:
        """Of a number."""
        ...

    @property
    def most(self) -> int:
        """The largest number."""
        ...

    @property
    def has_zero_points(self) -> bool:
        """Whether each block has one; else it is the middle, ``2**(bits - 1)``."""
        ...

    @property
    def apart(self) -> int:
        """By how many columns the two numbers of four bits that share a byte are apart."""
        ...

    @property
    def zeros_share(self) -> bool:
        """Whether the zero points of two blocks may share a byte."""
        ...

    @property
    def text(self) -> str:
        """Its format, in words."""
        ...

    def piece(self, reader: Reader, matrix: int, first: int, count: int, step: int = 1) -> Piece:
        """Rows ``first``, ``first + step`` and so on of one matrix, ``count`` of them.

        Raises:
            FileFormatError: a file that ends before them.
        """
        ...
