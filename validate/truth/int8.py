"""Eager PyTorch with the activations of some products rounded to int8, as fast kernels round them.

A kernel for weights in blocks may round what it multiplies them by: each block of a row has the
scale that its largest number asks for, and int8 numbers. What that costs is no fault of a kernel
that is told to do so. So the same rounding in the eager graph is the floor of such a kernel.

Source: MLAS, QuantizeARow_CompInt8 (onnxruntime/core/mlas/lib/sqnbitgemm*).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ingot.validate.truth.orders import BODIES, LINEAR, PRODUCTS

# The largest int8 number that a block uses.
MOST = 127


class Int8Activations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which what is multiplied by matrices is rounded to int8 first.

    Args:
        block: numbers of a row that share a scale.
        exact: the addresses of the storages of matrices whose products round nothing, such as
            routers.
    """

    def __init__(self, block: int, exact: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block = block
        self._exact = exact

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in BODIES:
            # Inside an expert's matrix may be a copy in another dtype, which nobody knows again.
            if any(isinstance(each, torch.Tensor) and self._leaves(each) for each in args):
                return function(*args, **(kwargs or {}))
            with self:
                return BODIES[function](*args, **(kwargs or {}))
        if function is LINEAR or (function in PRODUCTS and args[1].dim() == 2):
            x, weight, *others = args
            if not self._leaves(weight):
                return function(rounded_activations(x, self._block), weight, *others)
        return function(*args, **(kwargs or {}))

    def _leaves(self, weight: torch.Tensor) -> bool:
        """Whether what is multiplied by a matrix is left as it is."""
        return weight.untyped_storage().data_ptr() in self._exact


def rounded_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """``[..., K]`` with each number rounded to a whole multiple of its block's scale.

    The scale is the block's largest number over 127; a block that K ends in is filled up with
    zeros.
    """
    columns = x.shape[-1]
    wide = torch.nn.functional.pad(x, (0, -columns % block))
    blocks = wide.reshape(*wide.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / MOST
    numbers = (blocks / torch.where(scale > 0, scale, torch.ones_like(scale))).round()
    return (numbers * scale).reshape(wide.shape)[..., :columns]
