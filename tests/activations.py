"""Each activation of the kernels on one float64, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "gelu_tanh": lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    "relu": lambda v: max(v, 0.0),
    "identity": lambda v: v,
}
