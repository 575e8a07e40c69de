"""The kernels on the CPU: the real host library, over Triton's interpreter in place of CUDA.

The C++ host layer plans and launches as on a GPU, and each launch runs the Triton function on the
same memory. So a test covers the launches, their arguments and the kernels' logic together. What it
cannot show is speed, and what only happens when blocks run at the same time.

``TRITON_INTERPRET=1`` must be set before Triton is imported; nothing can be compiled then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ingot.plugins.errors import IngotError
from ingot.plugins.kernels.build import plan_constants
from ingot.plugins.kernels.form import Form
from ingot.plugins.kernels.link import Compiled, argument_letters, link, run_compiler
from ingot.plugins.library import Library

FAKE_DRIVER = Path(__file__).with_name("fake_driver.cpp")
HOST = "libingot_kernels.so"

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass(frozen=True)
class Launched:
    """One launch that was made."""

    form: str
    grid: tuple[int, int, int]


class InterpretedLibrary(Library):
    """The kernel library of this source tree, run by the interpreter.

    Args:
        forms: that it has.
        folder: where it is built, or was before.
        ptxas: the version that it records as what made it.

    Attributes:
        launches: those of all calls since it was last cleared.
    """

    def __init__(self, forms: Mapping[str, Form], folder: Path, *, ptxas: str = "12.9.86") -> None:
        if not (folder / HOST).is_file():
            _build_host(forms, folder, ptxas)
        super().__init__(folder / HOST)
        self.forms = forms
        self.launches: list[Launched] = []
        self._error: BaseException | None = None
        driver = folder / "libfake_driver.so"
        # The fake driver, whose further functions say what it can be made to do.
        self.driver = ctypes.CDLL(str(driver))
        # Kept: C holds no reference to it.
        self._callback = _CALLBACK(self._launched)
        self.set_capability(90)
        self.use_driver(driver)

    def set_capability(self, capability: int) -> None:
        """Act as a device of this compute capability from now on."""
        self.driver.fake_driver_set(self._callback, capability)

    def fail_loads(self, result: int, cuda: int) -> None:
        """Answer each load of a kernel with this ``CUresult``, as a driver for this CUDA version.

        Args:
            result: 0 loads again.
            cuda: as ``cuDriverGetVersion`` has it, such as 12040 for 12.4.
        """
        self.driver.fake_driver_set_load(result, cuda)

    def run(
        self,
        parameters: ctypes.Structure,
        workspace: int | None,
        workspace_bytes: int,
        stream: int | None,
    ) -> None:
        self._error = None
        try:
            super().run(parameters, workspace, workspace_bytes, stream)
        except IngotError:
            if self._error is not None:
                raise self._error from None
            raise

    def _launched(
        self, name: bytes, x: int, y: int, z: int, arguments: Callable[[int], int]
    ) -> int:
        # No exception may cross C.
        try:
            form = self.forms[name.decode()]
            self.launches.append(Launched(form.name, (x, y, z)))
            self.launch(form, (x, y, z), arguments)
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def launch(self, form: Form, grid: tuple[int, int, int], arguments: Any) -> None:
        """What a launch does.

        Args:
            form: of the kernel.
            grid: blocks along each side.
            arguments: addresses of its arguments, in the order of the signature.
        """
        form.function[grid](*_values(form, arguments), **form.constants)


def _values(form: Form, arguments: Any) -> list[Any]:
    """A launch's arguments, pointers as tensors that begin there."""
    values: list[Any] = []
    for index, (name, kind) in enumerate(form.signature.items()):
        address = arguments[index]
        if kind == "i32":
            value = ctypes.c_int32.from_address(address).value
            assert name not in form.multiples_of_16 or value % 16 == 0, (form.name, name, value)
            values.append(value)
        elif kind == "fp32":
            values.append(ctypes.c_float.from_address(address).value)
        else:
            pointer = ctypes.c_uint64.from_address(address).value
            assert pointer % 16 == 0, (form.name, name, pointer)
            values.append(_tensor_at(pointer, kind))
    return values


def _tensor_at(pointer: int, kind: str) -> torch.Tensor:
    """A tensor of no interesting length; the interpreter takes its address and dtype alone."""
    dtypes = {
        "*fp32": torch.float32,
        "*fp16": torch.float16,
        "*bf16": torch.bfloat16,
        "*i32": torch.int32,
        "*i64": torch.int64,
    }
    if pointer == 0:
        return torch.zeros(16, dtype=dtypes[kind])
    bytes_there = (ctypes.c_char * 16).from_address(pointer)
    return torch.frombuffer(bytes_there, dtype=dtypes[kind])


def _build_host(forms: Mapping[str, Form], folder: Path, ptxas: str) -> None:
    """The host layer with the names of the forms in place of their cubins."""
    folder.mkdir(parents=True, exist_ok=True)
    compiled = []
    for form in forms.values():
        image = folder / f"{form.name}.image"
        image.write_bytes(form.name.encode() + b"\0")
        letters = argument_letters(form.signature.values())
        compiled += [
            Compiled(
                form.name, form.name, capability, 32 * form.num_warps, 0, letters, image, ptxas
            )
            for capability in form.capabilities
        ]
    run_compiler(FAKE_DRIVER, out=folder / "libfake_driver.so")
    link(compiled, plan_constants(), folder / HOST, folder)
