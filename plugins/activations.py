"""The activations of the operators: by each one's name, all that there is to say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Activation:
    """An activation.

    Attributes:
        number: its ``ingot_activation`` in ``ingot_kernels.h``.
        body: standard ONNX operators that make ``activated`` of ``VALUE``.
        function: of ``torch.nn.functional``; empty for the identity.
        options: of that function.
    """

    number: int
    body: str
    function: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


ACTIVATIONS = {
    "silu": Activation(
        0, "sigmoid = Sigmoid (VALUE)\n            activated = Mul (VALUE, sigmoid)", "silu"
    ),
    "gelu": Activation(1, "activated = Gelu (VALUE)", "gelu"),
    "gelu_tanh": Activation(
        2, 'activated = Gelu <approximate = "tanh"> (VALUE)', "gelu", {"approximate": "tanh"}
    ),
    "relu": Activation(3, "activated = Relu (VALUE)", "relu"),
    "identity": Activation(4, "activated = Identity (VALUE)"),
}


def activate(activation: str, value: torch.Tensor) -> torch.Tensor:
    """The activation of a tensor of any shape and floating dtype, in PyTorch."""
    # Runtimes read the table too, where there may be no PyTorch.
    import torch.nn.functional as F

    row = ACTIVATIONS[activation]
    if not row.function:
        return value
    result: torch.Tensor = getattr(F, row.function)(value, **row.options)
    return result


def activation_body(activation: str, value: str) -> str:
    """Standard-operator text of an activation, from ``value`` to ``activated``."""
    return ACTIVATIONS[activation].body.replace("VALUE", value)
