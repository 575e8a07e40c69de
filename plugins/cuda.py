"""The GPU kernels on PyTorch tensors: what the eager graph calls on a CUDA device.

``register`` makes them the CUDA implementation of the ``ingot`` operators. Shapes and meanings are
those of each operator's file.

A call runs on its tensors' device and on that device's current stream, and returns at once. What it
made for itself, copies and workspace, is freed before the kernels have run: the caching allocator
gives that memory out again on the same stream alone, behind them.
"""

# A, B, C, D: the letters of the state-space papers.
# ruff: noqa: N803, N806

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from ctypes import Structure
from functools import partial
from typing import Any

import torch

from ingot.plugins import library as c
from ingot.plugins.activations import ACTIVATIONS
from ingot.plugins.causal_conv import causal_conv as causal_conv_op
from ingot.plugins.library import Library, LibraryError
from ingot.plugins.mamba2_scan import mamba2_scan as mamba2_scan_op
from ingot.plugins.moe_dispatch import moe_dispatch as moe_dispatch_op
from ingot.plugins.moe_linear import moe_linear as moe_linear_op

# What ``register`` gives kernels to.
OPERATORS = (causal_conv_op, moe_dispatch_op, moe_linear_op, mamba2_scan_op)


def register(library: Library, device_type: str = "cuda") -> None:
    """Make the kernels what the operators run on tensors of a device.

    The eager graph then uses them. ``op.set_kernel_enabled(device_type, False)`` goes back to the
    reference for a while.

    The current device is prepared, so that even a first call may be captured into a CUDA graph; for
    another device call ``prepare``.

    Args:
        library: of the kernels.
        device_type: of the tensors.

    Raises:
        LibraryError: no driver, or a device that nothing was compiled for.
    """
    prepare(library, torch.device(device_type))

    def scan(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return mamba2_scan(library, *arguments[:9], *arguments[10:])

    causal_conv_op.register_kernel(device_type)(partial(causal_conv, library))
    moe_dispatch_op.register_kernel(device_type)(partial(moe_dispatch, library))
    moe_linear_op.register_kernel(device_type)(partial(moe_linear, library))
    mamba2_scan_op.register_kernel(device_type)(scan)


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


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device's context the current one, into which the library launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether it is as the kernels read it: row-major, from a multiple of 16 bytes."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _check_device(*tensors: torch.Tensor) -> None:
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise LibraryError(
            f"a call of a kernel got tensors on {' and '.join(devices)}; move all to one device."
        )


def _dense(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, or dense copies of them.

    Raises:
        LibraryError: they are on several devices.
    """
    _check_device(*tensors)
    # A view may begin between two multiples of 16 bytes; fresh memory does not.
    return [
        tensor if _is_dense(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    ]


def _dtype(x: torch.Tensor) -> int:
    return c.DTYPES[str(x.dtype).removeprefix("torch.")]


def _stream(x: torch.Tensor) -> int | None:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def _run(library: Library, parameters: Structure, x: torch.Tensor) -> None:
    with _on(x.device):
        # The caching allocator aligns to 512 bytes.
        size = library.workspace_bytes(parameters)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=x.device)
        library.run(parameters, workspace.data_ptr(), size, _stream(x))


def _output(wanted: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """Where the kernels write the new state: to the tensor that is wanted, if it is dense."""
    if wanted is None:
        return torch.empty_like(state)
    _check_device(state, wanted)
    return wanted if _is_dense(wanted) else torch.empty_like(state)


def _returned(wanted: torch.Tensor | None, written: torch.Tensor) -> torch.Tensor:
    if wanted is None or wanted is written:
        return written
    return wanted.copy_(written)


def moe_dispatch(
    library: Library,
    x: torch.Tensor,
    router_logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    normalize: bool,
    activation: str,
) -> torch.Tensor:
    """``ingot::MoeDispatch``; see ``plugins.moe_dispatch``."""
    x, router_logits, gate_up, down = _dense(x, router_logits.float(), gate_up, down)
    y = torch.empty_like(x)
    experts, hidden, intermediate = down.shape
    parameters = c.MoeDispatch(
        dtype=_dtype(x),
        activation=ACTIVATIONS[activation].number,
        normalize=int(normalize),
        top_k=top_k,
        experts=experts,
        tokens=x.shape[0],
        hidden=hidden,
        intermediate=intermediate,
        x=x.data_ptr(),
        router_logits=router_logits.data_ptr(),
        gate_up=gate_up.data_ptr(),
        down=down.data_ptr(),
        y=y.data_ptr(),
    )
    _run(library, parameters, x)
    return y


def moe_linear(
    library: Library, x: torch.Tensor, expert_ids: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """``ingot::MoeLinear``; see ``plugins.moe_linear``."""
    x, expert_ids, weight = _dense(x, expert_ids, weight)
    experts, out_features, in_features = weight.shape
    tokens, top_k = expert_ids.shape
    y = x.new_empty(tokens, top_k, out_features)
    parameters = c.MoeLinear(
        dtype=_dtype(x),
        per_choice=int(x.ndim == 3),
        top_k=top_k,
        experts=experts,
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        x=x.data_ptr(),
        expert_ids=expert_ids.data_ptr(),
        weight=weight.data_ptr(),
        y=y.data_ptr(),
    )
    _run(library, parameters, x)
    return y


def mamba2_scan(
    library: Library,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    mask: torch.Tensor,
    dt_min: float,
    dt_max: float,
    new_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ingot::Mamba2Scan``; see ``plugins.mamba2_scan``. ``new_state`` may be ``state``."""
    wanted = new_state
    x, dt, A, B, C, D, dt_bias, state, mask = _dense(x, dt, A, B, C, D, dt_bias, state, mask)
    batch, tokens, heads, head_size = x.shape
    y = torch.empty_like(x)
    new_state = _output(wanted, state)
    parameters = c.Mamba2Scan(
        dtype=_dtype(x),
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_size=head_size,
        groups=B.shape[2],
        states=B.shape[3],
        dt_min=dt_min,
        dt_max=dt_max,
        x=x.data_ptr(),
        dt=dt.data_ptr(),
        a=A.data_ptr(),
        b=B.data_ptr(),
        c=C.data_ptr(),
        d=D.data_ptr(),
        dt_bias=dt_bias.data_ptr(),
        state=state.data_ptr(),
        mask=mask.data_ptr(),
        y=y.data_ptr(),
        new_state=new_state.data_ptr(),
    )
    _run(library, parameters, x)
    return y, _returned(wanted, new_state)


def causal_conv(
    library: Library,
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    new_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ingot::CausalConv``; see ``plugins.causal_conv``.

    ``new_state`` may be ``state`` where T is 1.
    """
    wanted = new_state
    x, state, weight, *biases = _dense(x, state, weight, *([] if bias is None else [bias]))
    batch, tokens, channels = x.shape
    y = torch.empty_like(x)
    new_state = _output(wanted, state)
    parameters = c.CausalConv(
        dtype=_dtype(x),
        activation=ACTIVATIONS[activation].number,
        batch=batch,
        tokens=tokens,
        channels=channels,
        width=weight.shape[-1],
        x=x.data_ptr(),
        state=state.data_ptr(),
        weight=weight.data_ptr(),
        bias=biases[0].data_ptr() if biases else None,
        y=y.data_ptr(),
        new_state=new_state.data_ptr(),
    )
    _run(library, parameters, x)
    return y, _returned(wanted, new_state)
