"""The library of GPU kernels, ``libingot_kernels.so``, found, version-checked and called by ctypes.

An operator's call is given its ``Operator.structure``, which mirrors that of
``plugins/csrc/ingot_kernels.h``; there it says what the members mean.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
)
from pathlib import Path

from ingot.plugins.errors import IngotError
from ingot.plugins.operator import Operator
from ingot.plugins.registry import OPERATORS

VERSION = 2
PATH = Path(__file__).resolve().parent / "lib" / "libingot_kernels.so"
# TensorRT's plugins, which hold these kernels too; an engine that needs them has it beside it.
PLUGINS = PATH.with_name("libingot_trt.so")

# The structure of a call -> its operator.
CALLS: dict[type[Structure], Operator] = {each.structure: each for each in OPERATORS.values()}


class LibraryError(IngotError):
    """The kernels are not built, do not fit this machine, or refuse a call."""


class Tuning(Structure):
    _fields_ = (
        ("tile_rows", c_int32),
        ("tile_columns", c_int32),
        ("tile_variant", c_char_p),
        ("chunk", c_int32),
        ("scan_variant", c_char_p),
        ("slice_tokens", c_int32),
        ("scan_bytes", c_int64),
    )


class Library:
    """A loaded kernel library.

    Args:
        path: of the shared library.

    Raises:
        LibraryError: missing, not a kernel library, or of another version.
    """

    def __init__(self, path: Path = PATH) -> None:
        self.path = path
        if not path.is_file():
            raise LibraryError(f"{path} is missing; build the GPU kernels with: make plugins")
        try:
            self._library = ctypes.CDLL(str(path))
            version = self._library.ingot_kernels_version()
        except (OSError, AttributeError) as error:
            raise LibraryError(f"{path} is not a library of Ingot's kernels: {error}") from error
        if version != VERSION:
            raise LibraryError(
                f"{path} has interface version {version} and this Ingot needs {VERSION}; rebuild "
                "it with: make plugins"
            )
        self._library.ingot_last_error.restype = c_char_p
        self._library.ingot_use_driver.argtypes = [c_char_p]
        self._library.ingot_tune.argtypes = [POINTER(Tuning)]
        for structure, operator in CALLS.items():
            between = [c_void_p, c_size_t] if operator.workspace else []
            call = getattr(self._library, operator.c_call)
            call.argtypes = [POINTER(structure), *between, c_void_p]
            if operator.workspace:
                size = getattr(self._library, f"{operator.c_call}_workspace")
                size.argtypes = [POINTER(structure), POINTER(c_size_t)]

    def _check(self, status: int) -> None:
        if status:
            raise LibraryError(self._library.ingot_last_error().decode())

    def use_driver(self, path: Path) -> None:
        """Take another library for CUDA's driver; before any other call."""
        self._check(self._library.ingot_use_driver(str(path).encode()))

    def prepare(self) -> None:
        """Load the kernels into the current CUDA context; again costs nothing.

        A thread without a context gets the primary one of device 0.

        Raises:
            LibraryError: no driver, or a device that nothing was compiled for.
        """
        self._check(self._library.ingot_prepare())

    @property
    def build_line(self) -> str:
        """What compiled the kernels, and the first driver that loads them; needs no driver."""
        call = self._library.ingot_kernels_build
        call.restype = c_char_p
        return str(call().decode())

    def tune(
        self,
        *,
        tile: tuple[int, int] | None = None,
        tile_variant: str = "",
        chunk: int = 0,
        scan_variant: str = "",
        slice_tokens: int = 0,
        scan_bytes: int = 0,
    ) -> None:
        """Take candidates in place of the built-in choices, for benchmarks and tests.

        They count for ``workspace_bytes`` too. Not while calls are made. A tile or a variant that
        has no form is refused by the call that needs it.

        Args:
            tile: rows and columns of the grouped products in 16 bits; None is the table's.
            tile_variant: ``_`` and this end the names of their forms.
            chunk: tokens of a scan's chunk in 16 bits, a multiple of 64; 0 is the table's.
            scan_variant: the same as ``tile_variant`` for the forms of states and outputs.
            slice_tokens: the most that MoeDispatch takes at once, a multiple of 16; 0 is 8192.
            scan_bytes: workspace from which a scan is cut, a multiple of 256; 0 is 512 MiB.

        Raises:
            LibraryError: a number that no kernel takes; the choices are as they were.
        """
        rows, columns = tile or (0, 0)
        tuning = Tuning(
            rows,
            columns,
            tile_variant.encode(),
            chunk,
            scan_variant.encode(),
            slice_tokens,
            scan_bytes,
        )
        self._check(self._library.ingot_tune(byref(tuning)))

    def workspace_bytes(self, parameters: Structure) -> int:
        """Bytes that are enough for ``run`` with these sizes, or with fewer tokens or rows.

        They are so on any device. Pointers may be null.

        Raises:
            LibraryError: what the library refuses about the sizes.
        """
        operator = CALLS[type(parameters)]
        size = c_size_t()
        if operator.workspace:
            call = getattr(self._library, f"{operator.c_call}_workspace")
            self._check(call(byref(parameters), byref(size)))
        return size.value

    def run(
        self,
        parameters: Structure,
        workspace: int | None,
        workspace_bytes: int,
        stream: int | None,
    ) -> None:
        """Enqueue an operator; returns at once.

        Args:
            parameters: sizes and device addresses.
            workspace: address of the workspace, aligned to 256 bytes; None where it has none.
            workspace_bytes: its size.
            stream: a ``CUstream``; None is the default stream.

        Raises:
            LibraryError: what the library refused, in a sentence.
        """
        operator = CALLS[type(parameters)]
        between = [workspace, workspace_bytes] if operator.workspace else []
        call = getattr(self._library, operator.c_call)
        self._check(call(byref(parameters), *between, stream))
