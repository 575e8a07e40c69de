"""The library of GPU kernels, ``libingot_kernels.so``, found, version-checked and called by ctypes.

Each structure mirrors one of ``plugins/csrc/ingot_kernels.h``, which says what the fields mean.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
)
from pathlib import Path

from ingot.plugins.errors import IngotError

VERSION = 2
PATH = Path(__file__).resolve().parent / "lib" / "libingot_kernels.so"

# ONNX's and PyTorch's name of an element type -> the interface's number.
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}


class LibraryError(IngotError):
    """The kernels are not built, do not fit this machine, or refuse a call."""


class MoeDispatch(Structure):
    _fields_ = (
        ("dtype", c_int),
        ("activation", c_int),
        ("normalize", c_int32),
        ("top_k", c_int32),
        ("experts", c_int32),
        ("tokens", c_int32),
        ("hidden", c_int32),
        ("intermediate", c_int32),
        ("x", c_void_p),
        ("router_logits", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("y", c_void_p),
    )


class MoeLinear(Structure):
    _fields_ = (
        ("dtype", c_int),
        ("per_choice", c_int32),
        ("top_k", c_int32),
        ("experts", c_int32),
        ("tokens", c_int32),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("x", c_void_p),
        ("expert_ids", c_void_p),
        ("weight", c_void_p),
        ("y", c_void_p),
    )


class Mamba2Scan(Structure):
    _fields_ = (
        ("dtype", c_int),
        ("batch", c_int32),
        ("tokens", c_int32),
        ("heads", c_int32),
        ("head_size", c_int32),
        ("groups", c_int32),
        ("states", c_int32),
        ("dt_min", c_float),
        ("dt_max", c_float),
        ("x", c_void_p),
        ("dt", c_void_p),
        ("a", c_void_p),
        ("b", c_void_p),
        ("c", c_void_p),
        ("d", c_void_p),
        ("dt_bias", c_void_p),
        ("state", c_void_p),
        ("mask", c_void_p),
        ("y", c_void_p),
        ("new_state", c_void_p),
    )


class CausalConv(Structure):
    _fields_ = (
        ("dtype", c_int),
        ("activation", c_int),
        ("batch", c_int32),
        ("tokens", c_int32),
        ("channels", c_int32),
        ("width", c_int32),
        ("x", c_void_p),
        ("state", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("new_state", c_void_p),
    )


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


# Structure -> its call in the library, and whether that call takes a workspace.
CALLS: dict[type[Structure], tuple[str, bool]] = {
    MoeDispatch: ("ingot_moe_dispatch", True),
    MoeLinear: ("ingot_moe_linear", True),
    Mamba2Scan: ("ingot_mamba2_scan", True),
    CausalConv: ("ingot_causal_conv", False),
}


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
        for structure, (call, workspace) in CALLS.items():
            between = [c_void_p, c_size_t] if workspace else []
            getattr(self._library, call).argtypes = [POINTER(structure), *between, c_void_p]
            if workspace:
                size = getattr(self._library, f"{call}_workspace")
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
        call, workspace = CALLS[type(parameters)]
        size = c_size_t()
        if workspace:
            status = getattr(self._library, f"{call}_workspace")(byref(parameters), byref(size))
            self._check(status)
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
        call, takes_workspace = CALLS[type(parameters)]
        between = [workspace, workspace_bytes] if takes_workspace else []
        self._check(getattr(self._library, call)(byref(parameters), *between, stream))
