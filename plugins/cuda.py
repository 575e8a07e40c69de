"""The GPU kernels on PyTorch tensors: what the eager graph calls on a CUDA device.

``register`` makes them the CUDA implementation of the ``ingot`` operators. Shapes and meanings are
those of each operator's file.
"""

# A, B, C, D: the letters of the state-space papers.
# ruff: noqa: N803, N806

from __future__ import annotations

from ctypes import Structure
from functools import partial
from typing import Any

import torch

from plugins import library as c
from plugins.causal_conv import causal_conv as causal_conv_op
from plugins.library import Library
from plugins.mamba2_scan import mamba2_scan as mamba2_scan_op
from plugins.moe_dispatch import moe_dispatch as moe_dispatch_op
from plugins.moe_linear import moe_linear as moe_linear_op


def register(library: Library, device_type: str = "cuda") -> None:
    """Make the kernels what the operators run on tensors of a device.

    The eager graph then uses them. ``op.set_kernel_enabled(device_type, False)`` goes back to the
    reference for a while.

    Args:
        library: of the kernels.
        device_type: of the tensors.
    """

    def scan(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return mamba2_scan(library, *arguments[:9], *arguments[10:])

    causal_conv_op.register_kernel(device_type)(partial(causal_conv, library))
    moe_dispatch_op.register_kernel(device_type)(partial(moe_dispatch, library))
    moe_linear_op.register_kernel(device_type)(partial(moe_linear, library))
    mamba2_scan_op.register_kernel(device_type)(scan)


def _dtype(x: torch.Tensor) -> int:
    return c.DTYPES[str(x.dtype).removeprefix("torch.")]


def _stream(x: torch.Tensor) -> int | None:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def _run(library: Library, parameters: Structure, x: torch.Tensor) -> None:
    # The caching allocator aligns to 512 bytes, and keeps the memory until the stream is past it.
    size = library.workspace_bytes(parameters)
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=x.device)
    library.run(parameters, workspace.data_ptr(), _stream(x))


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
    x, router_logits = x.contiguous(), router_logits.float().contiguous()
    gate_up, down = gate_up.contiguous(), down.contiguous()
    y = torch.empty_like(x)
    experts, hidden, intermediate = down.shape
    parameters = c.MoeDispatch(
        dtype=_dtype(x),
        activation=c.ACTIVATIONS[activation],
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
    x, expert_ids, weight = x.contiguous(), expert_ids.contiguous(), weight.contiguous()
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
    x, dt, B, C, mask = (each.contiguous() for each in (x, dt, B, C, mask))
    A, D, dt_bias, state = (each.contiguous() for each in (A, D, dt_bias, state))
    batch, tokens, heads, head_size = x.shape
    y = torch.empty_like(x)
    new_state = torch.empty_like(state) if new_state is None else new_state
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
    return y, new_state


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
    x, state, weight = x.contiguous(), state.contiguous(), weight.contiguous()
    # A copy has to live until the launch.
    bias = None if bias is None else bias.contiguous()
    batch, tokens, channels = x.shape
    y = torch.empty_like(x)
    new_state = torch.empty_like(state) if new_state is None else new_state
    parameters = c.CausalConv(
        dtype=_dtype(x),
        activation=c.ACTIVATIONS[activation],
        batch=batch,
        tokens=tokens,
        channels=channels,
        width=weight.shape[-1],
        x=x.data_ptr(),
        state=state.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        new_state=new_state.data_ptr(),
    )
    _run(library, parameters, x)
    return y, new_state
