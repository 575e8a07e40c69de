"""Tensors in files: read piece by piece, decoded to float32 and rounded, in numpy alone.

Written apart from what an export reads and writes weights with, so that a fault there cannot hide
here as well. Formats are https://github.com/huggingface/safetensors#format and IEEE 754; bfloat16
is the upper half of a float32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.plugins.errors import IngotError, named

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[Any]

# Bytes of an element, by safetensors' names. Weights are of the first four; the others are there
# for headers that say something else.
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8} | {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I64", "U64", "C64"), 8),
}
# What a header is refused beyond, as by the safetensors library.
MOST_HEADER_BYTES = 100_000_000


class FileFormatError(IngotError):
    """A file that is not what its name says."""


@dataclass(frozen=True)
class Tensor:
    """Where the elements of one tensor lie, one after the other in row-major order.

    Attributes:
        name: its own.
        dtype: by safetensors' name.
        shape: of the tensor.
        file: that it lies in; None where ``data`` holds it.
        begin: first byte in the file.
        data: the bytes of one that lies in no file of its own.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None
    begin: int = 0
    data: bytes = b""

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.size * ITEM_BYTES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype]

    def held(self) -> bytes:
        """The bytes of one that lies in no file of its own."""
        return self.data

    def part(self, begin: int, length: int) -> bytes:
        """Some bytes of such a one."""
        return self.held()[begin : begin + length]


class Reader:
    """Reads elements of tensors with ``pread``, so that no page of a file stays mapped.

    A context, at whose end the files are closed.
    """

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def elements(self, tensor: Tensor, first: int, count: int) -> Bits:
        """Some elements that follow each other, as unsigned integers of their bits, ``[count]``.

        Raises:
            FileFormatError: the file ends before them.
        """
        width = ITEM_BYTES[tensor.dtype]
        begin, length = tensor.begin + first * width, count * width
        data: bytes | bytearray
        if tensor.file is None:
            data = tensor.part(begin, length)
        else:
            if tensor.file not in self._open:
                self._open[tensor.file] = os.open(tensor.file, os.O_RDONLY)
            data = self._pread(self._open[tensor.file], begin, length)
        if len(data) < length:
            place = "the graph" if tensor.file is None else tensor.file.name
            raise FileFormatError(
                f"{place} ends before the last element of {named(tensor.name)}; export it again."
            )
        return np.frombuffer(data, dtype=f"<u{width}")

    @staticmethod
    def _pread(descriptor: int, begin: int, length: int) -> bytearray:
        data = bytearray(length)
        view, done = memoryview(data), 0
        # One call reads at most 2 GiB.
        while done < length:
            got = os.preadv(descriptor, [view[done:]], begin + done)
            if not got:
                return data[:done]
            done += got
        return data

    def window(
        self, tensor: Tensor, first: int, strides: tuple[int, int], rows: int, columns: int
    ) -> Bits:
        """Elements ``[rows, columns]``, of which ``(r, c)`` is element ``first + r*rs + c*cs``.

        Args:
            tensor: that they are of.
            first: element.
            strides: rs and cs, in elements, one of which is 1.
            rows: how many.
            columns: how many.
        """
        along, across = strides
        if across == 1:
            count = (rows - 1) * along + columns
            flat = self.elements(tensor, first, count)
            # The last row is no longer than its columns, so it goes by itself.
            whole = flat[: (rows - 1) * along].reshape(rows - 1, along)[:, :columns]
            last = flat[None, (rows - 1) * along :]
            return last if rows == 1 else np.concatenate((whole, last))
        assert along == 1, strides
        if rows == across:
            return self.elements(tensor, first, rows * columns).reshape(columns, rows).T
        turned = [self.elements(tensor, first + n * across, rows) for n in range(columns)]
        return np.stack(turned).T


def widen(bits: Bits, dtype: str) -> Floats:
    """Elements as float32: exact, but for those of float64, which are rounded to the nearest."""
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return bits.view(np.float16 if dtype == "F16" else np.float64).astype(np.float32)


def rounded(values: Floats, dtype: str) -> Bits:
    """Numbers rounded to the nearest of a dtype, halves to even, as the integers of their bits."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    assert dtype == "BF16", dtype
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)


def text(bits: Bits, dtype: str) -> str:
    """One element in as many digits as tell it from its neighbours."""
    number = widen(bits.reshape(1), dtype)[0]
    if dtype == "F32":
        return str(number)
    return str(np.float16(number)) if dtype == "F16" else f"{number:.4g}"


def read_header(file: Path) -> dict[str, Tensor]:
    """Where each tensor of a safetensors file lies, by name.

    Raises:
        FileFormatError: a header that is none.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MOST_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(stream.read(length))
        return {
            name: _entry(file, name, info, 8 + length)
            for name, info in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"{file.name} has no header of a safetensors file ({error}); export or download it "
            "again."
        ) from error


def _entry(file: Path, name: str, info: Mapping[str, Any], data: int) -> Tensor:
    begin, end = info["data_offsets"]
    tensor = Tensor(name, info["dtype"], tuple(info["shape"]), file, data + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{named(name)} has {end - begin} bytes for {tensor.nbytes}")
    return tensor


# How the weights of a checkpoint are called: whole, or an index and its shards.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint folder lies, by the names in its files.

    Raises:
        FileFormatError: files that are not what their names say.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    index = read_object(folder / INDEX)
    found: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        found.update(read_header(folder / shard))
    return found


def read_object(file: Path) -> dict[str, Any]:
    """A file of JSON that holds an object.

    Raises:
        FileFormatError: it does not.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{file} is no JSON ({error}); download or copy it again.") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{file} holds no JSON object; download or copy it again.")
    return value
