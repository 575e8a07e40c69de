"""The host layer without anything that computes: every launch is recorded and checked.

For machines whose NumPy Triton's interpreter does not run with. Each launch's grid is compared with
what its kernel's docstring says it is, worked out from the call's sizes, and each of its pointers
must lie in a tensor of the call or in its workspace. Outputs stay as they were.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ingot.plugins.errors import IngotError
from ingot.plugins.kernels.form import Form
from ingot.plugins.kernels.interpret import InterpretedLibrary
from ingot.plugins.library import CALLS
from ingot.plugins.operator import DTYPES, Operator, size_of

Grid = tuple[int, int, int]


class RecordError(IngotError):
    """A launch that the kernels cannot have meant."""


@dataclass(frozen=True)
class Launch:
    """One launch, with the call that it belongs to.

    Attributes:
        sizes: of the call, by the structure's names.
        constants: of the form.
        values: the arguments that are numbers, by name.
        pointers: the others.
    """

    form: Form
    grid: Grid
    sizes: dict[str, int]
    constants: dict[str, Any]
    values: dict[str, int]
    pointers: dict[str, int]


class RecordingLibrary(InterpretedLibrary):
    """The kernel library of this source tree, whose launches are checked and do nothing.

    Calls must be small enough not to be cut into slices.
    """

    def run(
        self,
        parameters: ctypes.Structure,
        workspace: int | None,
        workspace_bytes: int,
        stream: int | None,
    ) -> None:
        self._operator = CALLS[type(parameters)]
        self._parameters = parameters
        self._workspace = (workspace or 0, workspace_bytes)
        super().run(parameters, workspace, workspace_bytes, stream)

    def launch(self, form: Form, grid: Grid, arguments: Any) -> None:
        values, pointers = read_arguments(form, arguments)
        fields = [name for name, *_ in self._parameters._fields_]
        numbers = {name: getattr(self._parameters, name) for name in fields}
        sizes = {name: value for name, value in numbers.items() if isinstance(value, int)}
        launch = Launch(form, grid, sizes, dict(form.constants), values, pointers)
        check_grid(launch)
        check_pointers(launch, [*_tensors(self._operator, self._parameters), self._workspace])


def read_arguments(form: Form, arguments: Any) -> tuple[dict[str, int], dict[str, int]]:
    """A launch's numbers and pointers by name; real numbers are left out.

    Raises:
        RecordError: a number or address that is no multiple of 16 where the form was compiled for
            one.
    """
    values: dict[str, int] = {}
    pointers: dict[str, int] = {}
    for index, (name, kind) in enumerate(form.signature.items()):
        address = arguments[index]
        if kind == "i32":
            values[name] = ctypes.c_int32.from_address(address).value
        elif kind != "fp32":
            pointers[name] = ctypes.c_uint64.from_address(address).value
    promised = {name: values[name] for name in form.multiples_of_16} | pointers
    for name, value in promised.items():
        if value % 16:
            raise RecordError(f"{form.name} got {value} for {name}, no multiple of 16.")
    return values, pointers


def check_grid(launch: Launch) -> None:
    """Raise RecordError where a launch has another grid than its kernel is written for."""
    use = launch.form.function.__name__
    expected = GRIDS[use](launch)
    expected += (1,) * (3 - len(expected))
    if launch.grid != expected:
        raise RecordError(
            f"{launch.form.name} was launched on {launch.grid}; for {launch.sizes} its grid is "
            f"{expected}."
        )


def check_pointers(launch: Launch, regions: list[tuple[int, int]]) -> None:
    """Raise RecordError where a pointer is in none of these addresses and sizes.

    A null pointer stands for what a form does not read: the tiles of a scanned product, the bias of
    a convolution without one, and an empty tensor.
    """
    for name, pointer in launch.pointers.items():
        empty = pointer == 0 and (
            (name == "tiles" and launch.constants.get("SCANNED"))
            or (name == "bias" and not launch.values["has_bias"])
            or (name in ("state", "new_state") and launch.values.get("width") == 1)
            or not launch.sizes.get("tokens")
        )
        if not empty and not any(start <= pointer < start + size for start, size in regions):
            raise RecordError(f"{launch.form.name} got {pointer:#x} for {name}, outside its call.")


def _tensors(operator: Operator, parameters: ctypes.Structure) -> Iterator[tuple[int, int]]:
    """Address and bytes of every tensor of a call, as the operator declares its shape."""
    letters = {dim: getattr(parameters, member) for member, dim in operator.sizes.items()}
    per_choice = getattr(parameters, "per_choice", 0)
    item = 4 if parameters.dtype == DTYPES["float32"] else 2
    widths = {"T": item, "float32": 4, "int64": 8}
    for tensor in operator.tensors:
        shape = tensor.shapes[-1 if per_choice else 0]
        count = math.prod(size_of(dim, letters) for dim in shape)
        yield getattr(parameters, tensor.name.lower()) or 0, count * widths[tensor.dtype]


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _tiled(launch: Launch, features: str) -> tuple[int, ...]:
    """Programs of a grouped product: tiles of choices times tiles of output features."""
    values, constants = launch.values, launch.constants
    choices, experts, rows = values["choices"], values["experts"], constants["ROWS"]
    if constants["SCANNED"]:
        # A token names an expert once in MoeDispatch; MoeLinear's ids may repeat.
        repeats = "in_features" in launch.sizes
        tiles = min(choices, experts + 1) * (_tiles(choices, rows) if repeats else 1)
    else:
        tiles = choices // rows + experts + 1
    return (tiles * _tiles(values[features] * constants["GRAIN"], constants["COLUMNS"]),)


def _rows(launch: Launch) -> int:
    return launch.sizes["batch"] * launch.sizes["heads"]


def _token_tiles(launch: Launch, block: str) -> int:
    return _tiles(launch.sizes["tokens"], launch.constants[block])


def _chunks(launch: Launch) -> int:
    return _tiles(launch.sizes["tokens"], launch.values["chunk"])


def _columns(launch: Launch, size: int) -> int:
    return _tiles(size, launch.constants["COLUMNS"])


# The kernels' functions -> the grid that each is written for.
GRIDS: dict[str, Callable[[Launch], tuple[int, ...]]] = {
    "route": lambda c: (c.sizes["tokens"],),
    "group": lambda c: (c.sizes["experts"] + 1,),
    "gate_up": lambda c: _tiled(c, "intermediate_grains"),
    "linear": lambda c: _tiled(c, "out_grains"),
    "combine": lambda c: (c.sizes["tokens"] * _tiles(c.sizes["hidden"], c.constants["BLOCK"]),),
    "gate_up_one": lambda c: (c.sizes["top_k"] * _columns(c, c.sizes["intermediate"]),),
    "down_one": lambda c: (_columns(c, c.sizes["hidden"]),),
    "linear_one": lambda c: (c.sizes["top_k"] * _columns(c, c.sizes["out_features"]),),
    "_scan_step": lambda c: (_rows(c), _tiles(c.sizes["head_size"], c.constants["BLOCK_P"])),
    "_scan_times": lambda c: (
        _tiles(c.sizes["heads"], c.constants["BLOCK_H"]),
        _chunks(c),
        c.sizes["batch"],
    ),
    "_scan_states": lambda c: (
        _rows(c),
        _tiles(c.sizes["head_size"], c.constants["BLOCK_P"])
        * _tiles(c.sizes["states"], c.constants["BLOCK_N"]),
        _chunks(c),
    ),
    "_scan_carry": lambda c: (
        _rows(c),
        _tiles(c.sizes["head_size"] * c.sizes["states"], c.constants["BLOCK"]),
    ),
    "_scan_products": lambda c: (
        c.sizes["batch"] * c.sizes["groups"],
        _token_tiles(c, "BLOCK_T"),
        c.values["chunk"] // c.constants["BLOCK_T"],
    ),
    "_scan_outputs": lambda c: (
        _rows(c),
        _tiles(c.sizes["head_size"], c.constants["BLOCK_P"]),
        _token_tiles(c, "BLOCK_T"),
    ),
    "_conv": lambda c: (
        _tiles(c.sizes["channels"], c.constants["BLOCK_C"]) * max(1, _token_tiles(c, "BLOCK_T")),
        c.sizes["batch"],
    ),
}
