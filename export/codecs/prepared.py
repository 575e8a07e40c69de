"""Numbers that were chosen before a graph is made, handed out when it is written."""

from __future__ import annotations

import hashlib
import tempfile
from typing import NamedTuple

import numpy as np

from ingot.export.codecs.blocks import Blocks, Encoded, Floats
from ingot.export.codecs.coder import Coder


class _Entry(NamedTuple):
    """Where the numbers of one matrix lie, and of which rows they are.

    Attributes:
        offset: in the file.
        encoded: the shapes of numbers, scales and zero points.
        rows: by the digest of a row, its number.
    """

    offset: int
    shapes: tuple[tuple[int, ...], ...]
    rows: dict[bytes, int]


class Prepared:
    """Hands out the numbers that were added; of any other weight those of another coder.

    They wait in a file that has no name, and not in memory. A matrix may be asked for with its rows
    in any order, as a graph wants the rows of gate and up in turn; so each row is known by what it
    holds.

    Args:
        formats: gives the format of each weight, and encodes what was not added.
    """

    def __init__(self, formats: Coder) -> None:
        self._formats = formats
        self._entries: dict[tuple[str, int], _Entry] = {}
        # Closed, and gone, with the coder.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def format(self, name: str) -> Blocks | None:
        """See ``Coder.format``."""
        return self._formats.format(name)

    def add(self, name: str, expert: int, rows: Floats, encoded: Encoded) -> None:
        """Keep the numbers of one matrix.

        Args:
            name: of the parameter.
            expert: its place in a stack, else 0.
            rows: ``[N, K]``, what was encoded.
            encoded: the numbers.
        """
        arrays = _arrays(encoded)
        offset = self._file.seek(0, 2)
        for array in arrays:
            self._file.write(array.tobytes())
        numbers = {digest: number for number, digest in enumerate(map(_digest, rows))}
        shapes = tuple(array.shape for array in arrays)
        self._entries[name, expert] = _Entry(offset, shapes, numbers)

    def encode(self, name: str, expert: int, rows: Floats) -> Encoded:
        """See ``Coder.encode``."""
        entry = self._entries.get((name, expert))
        if entry is None:
            return self._formats.encode(name, expert, rows)
        order = [entry.rows[_digest(row)] for row in rows]
        self._file.seek(entry.offset)
        arrays = []
        for shape, dtype in zip(entry.shapes, (np.uint8, np.float32, np.uint8), strict=False):
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            array = np.frombuffer(self._file.read(size), dtype).reshape(shape)
            arrays.append(array[order])
        return Encoded(*arrays)


def _arrays(encoded: Encoded) -> list[np.ndarray]:
    zeros = encoded.zero_points
    return [encoded.data, encoded.scales, *([] if zeros is None else [zeros])]


def _digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()
