"""Other orders of the same sums: what eager PyTorch's rounding would be, had it added otherwise.

The error of one eager run is one draw of what its precision costs, and in a call of few tokens it
may be small by luck. The same graph with its products cut in two along the inner dimension is as
right, and rounds otherwise from the first layer on; so is one that is cut elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ingot.plugins.registry import OPERATORS

# Where the inner dimension is cut, as a share of it; one draw each beside the eager run itself.
SHARES = (1 / 2, 1 / 3, 3 / 4)

LINEAR = torch.ops.aten.linear.default
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.matmul.default)
# Operators whose products are inside; a recurrence is one short sum a step, and stays as it is.
BODIES = {
    operator.overload: operator.eager
    for operator in OPERATORS.values()
    if not any(tensor.name == "state" for tensor in operator.inputs)
}


class Split(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which every product with weights is the sum of two.

    Args:
        share: of the inner dimension, that the first of the two has.
    """

    def __init__(self, share: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._share = share

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is LINEAR:
            x, weight, *bias = args
            cut = self._cut(x.shape[-1])
            if cut:
                first = function(x[..., :cut], weight[:, :cut], *bias)
                return first + function(x[..., cut:], weight[:, cut:])
        elif function in PRODUCTS and args[1].dim() == 2:
            one, other = args
            cut = self._cut(one.shape[-1])
            if cut:
                first = function(one[..., :cut], other[:cut])
                return first + function(one[..., cut:], other[cut:])
        elif function in BODIES:
            with self:
                return BODIES[function](*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _cut(self, size: int) -> int:
        """Where an inner dimension is cut; 0 where it cannot be."""
        return min(max(1, round(size * self._share)), size - 1)
