"""Eager PyTorch with the activations of some products rounded, as fast kernels round them.

A kernel for weights in blocks may round what it multiplies them by: each block of a row has the
scale that its largest number asks for, and int8 numbers. What that costs is no fault of a kernel
that is told to do so. So the same rounding in the eager graph is the floor of such a kernel. One
for bfloat16 may round them to bfloat16, each number by itself.

Source: MLAS, QuantizeARow_CompInt8 (onnxruntime/core/mlas/lib/sqnbitgemm*).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ingot.validate.truth.orders import BODIES, LINEAR, PRODUCTS

# The largest int8 number that a block uses.
MOST = 127
# In place of the numbers of a block: each has an exponent of its own.
TO_BFLOAT16 = 1


class RoundedActivations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which what is multiplied by matrices is rounded first.

    Args:
        blocks: by the address of a matrix's storage, how many numbers of a row share a scale, or
            ``TO_BFLOAT16``; 0 where its products round nothing, such as a router's.
    """

    def __init__(self, blocks: Mapping[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._blocks = blocks
        # Of a matrix that nobody knows again: inside of an operator it may be a copy.
        self._otherwise = max(blocks.values(), default=0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in BODIES:
            tensors = (each for each in args if isinstance(each, torch.Tensor))
            blocks = [block for each in tensors if (block := self._of(each)) is not None]
            if 0 in blocks:
                return function(*args, **(kwargs or {}))
            # A kernel of experts has one block for all of them.
            before, self._otherwise = self._otherwise, max(blocks, default=self._otherwise)
            try:
                with self:
                    return BODIES[function](*args, **(kwargs or {}))
            finally:
                self._otherwise = before
        if function is LINEAR or (function in PRODUCTS and args[1].dim() == 2):
            x, weight, *others = args
            known = self._of(weight)
            block = self._otherwise if known is None else known
            if block:
                return function(rounded_activations(x, block), weight, *others)
        return function(*args, **(kwargs or {}))

    def _of(self, weight: torch.Tensor) -> int | None:
        """The block of what is multiplied by a matrix; None of one that is not known."""
        return self._blocks.get(weight.untyped_storage().data_ptr())


def rounded_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """``[..., K]`` with each number rounded to a whole multiple of its block's scale.

    The scale is the block's largest number over 127; a block that K ends in is filled up with
    zeros. Of ``TO_BFLOAT16`` it is the nearest bfloat16.
    """
    if block == TO_BFLOAT16:
        return x.to(torch.bfloat16).to(x.dtype)
    columns = x.shape[-1]
    wide = torch.nn.functional.pad(x, (0, -columns % block))
    blocks = wide.reshape(*wide.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / MOST
    numbers = (blocks / torch.where(scale > 0, scale, torch.ones_like(scale))).round()
    return (numbers * scale).reshape(wide.shape)[..., :columns]
