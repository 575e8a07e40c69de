"""The GPU kernels on PyTorch tensors: what the eager graph calls on a CUDA device.

``register`` makes them the CUDA implementation of the ``ingot`` operators. Shapes and meanings are
those of each operator's file.

A call runs on its tensors' device and on that device's current stream, and returns at once. What it
made for itself, copies and workspace, is freed before the kernels have run: the caching allocator
gives that memory out again on the same stream alone, behind them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from ctypes import Structure
from functools import lru_cache, partial
from typing import Any

import torch

from ingot.plugins.library import Library, LibraryError
from ingot.plugins.operator import AttributeValue, Operator, size_of
from ingot.plugins.registry import OPERATORS


def register(library: Library, device_type: str = "cuda") -> None:
    """Make the kernels what the operators run on tensors of a device.

    The eager graph then uses them. ``operator.custom_op.set_kernel_enabled(device_type, False)``
    goes back to the reference for a while.

    The current device is prepared, so that even a first call may be captured into a CUDA graph; for
    another device call ``prepare``.

    Args:
        library: of the kernels.
        device_type: of the tensors.

    Raises:
        LibraryError: no driver, or a device that nothing was compiled for.
    """
    prepare(library, torch.device(device_type))
    for operator in OPERATORS.values():
        operator.custom_op.register_kernel(device_type)(partial(call, operator, library))


def prepare(library: Library, device: torch.device) -> None:
    """Load the kernels for a device; again costs nothing.

    Calls do it at need, but cannot while a stream is being captured into a CUDA graph.

    Args:
        library: of the kernels.
        device: without an index, the current one of its type.

    Raises:
        LibraryError: no driver, or a device that nothing was compiled for.
    """
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
    with _on(device):
        library.prepare()


def call(
    operator: Operator, library: Library, *arguments: Any, new_state: torch.Tensor | None = None
) -> Any:
    """An operator on its kernels.

    Args:
        operator: which.
        library: of the kernels.
        arguments: those of the eager operator, in its order.
        new_state: where the last output is written, of an operator that has a state; it may be the
            state itself where ``ingot_kernels.h`` says so.

    Returns:
        The outputs: a tensor, or a tuple of several.

    Raises:
        LibraryError: tensors on several devices, or what the kernels refuse.
        OperatorError: shapes that disagree.
    """
    count = len(operator.inputs)
    inputs = _dense(operator, arguments[:count])
    x = inputs[0]
    assert x is not None
    shapes = tuple(None if each is None else each.shape for each in inputs)
    sized, output_shapes = _sized(operator, x.dtype, shapes, arguments[count:])
    outputs = [
        torch.empty(
            shape,
            dtype=x.dtype if output.dtype == "T" else torch.float32,
            device=x.device,
        )
        for output, shape in zip(operator.outputs, output_shapes, strict=True)
    ]
    if new_state is not None:
        _check_device(x, new_state)
        if _is_dense(new_state):
            outputs[-1] = new_state
    # Another thread may make a call of these sizes, hence the copy.
    parameters = operator.structure.from_buffer_copy(sized)
    operator.point(
        parameters, [None if each is None else each.data_ptr() for each in (*inputs, *outputs)]
    )
    _run(library, parameters, x)
    if new_state is not None and new_state is not outputs[-1]:
        outputs[-1] = new_state.copy_(outputs[-1])
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


# A generation repeats few sizes many times. Those of many prompts need not stay.
@lru_cache(maxsize=1024)
def _sized(
    operator: Operator,
    dtype: torch.dtype,
    shapes: tuple[torch.Size | None, ...],
    attributes: tuple[AttributeValue, ...],
) -> tuple[Structure, list[list[int]]]:
    """The structure of a call, but for the addresses, and the outputs' shapes; both to be read.

    Raises:
        OperatorError: shapes that disagree.
    """
    sizes = operator.bind(shapes)
    first = shapes[0]
    assert first is not None
    by_name = dict(zip((each.name for each in operator.attributes), attributes, strict=True))
    name = str(dtype).removeprefix("torch.")
    return operator.parameters(name, sizes, len(first), by_name), [
        [size_of(dim, sizes) for dim in output.shapes[0]] for output in operator.outputs
    ]


def _run(library: Library, parameters: Structure, x: torch.Tensor) -> None:
    with _on(x.device):
        # The caching allocator aligns to 512 bytes.
        size = library.workspace_bytes(parameters)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=x.device)
        library.run(parameters, workspace.data_ptr(), size, _stream(x))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device's context the current one, into which the library launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(x: torch.Tensor) -> int | None:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether it is as the kernels read it: row-major, from a multiple of 16 bytes."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _check_device(*tensors: torch.Tensor) -> None:
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise LibraryError(
            f"a call of a kernel got tensors on {' and '.join(devices)}; move all to one device."
        )


def _dense(operator: Operator, tensors: tuple[Any, ...]) -> list[torch.Tensor | None]:
    """The inputs, or dense copies of them; None where one is left out.

    Raises:
        LibraryError: they are on several devices.
    """
    _check_device(*(tensor for tensor in tensors if tensor is not None))
    result: list[torch.Tensor | None] = []
    for declared, tensor in zip(operator.inputs, tensors, strict=True):
        if tensor is not None:
            if declared.dtype == "float32":
                tensor = tensor.float()
            # A view may begin between two multiples of 16 bytes; fresh memory does not.
            if not _is_dense(tensor):
                tensor = tensor.clone(memory_format=torch.contiguous_format)
        result.append(tensor)
    return result
