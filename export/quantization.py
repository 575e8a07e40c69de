"""How weights are stored in whole numbers; as ``ingot.json`` has it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# ``weights`` of ``ingot.json`` -> bits of a number.
BITS = {"int4": 4, "int8": 8}
BLOCKS = (32, 64, 128)
# Whether kernels may round the activations of a product to int8.
ACCURACIES = ("exact", "fast")
# How the numbers were chosen.
METHODS = ("nearest", "importance", "gptq", "given")
# Bits of a weight that stays as it was.
UNCHANGED = 32


@dataclass(frozen=True)
class Quantization:
    """What every weight in whole numbers has in common, and which have other numbers of bits.

    Attributes:
        block: how many weights of a row share a scale.
        symmetric: whether there are no zero points.
        accuracy: of ``ACCURACIES``.
        method: of ``METHODS``.
        bits: by the name of a parameter, 4, 8, or ``UNCHANGED``, where ``weights`` is not so.
        calibration: the tokens that the numbers were chosen on, ``sha256`` of their file and
            ``tokens``; with a budget also that, and by parameter the ``effects``: the mean KL in
            nats that storing it in fewer bits costs, of a mixture of experts both stacks together.
            Empty where none were given.
    """

    block: int = 32
    symmetric: bool = True
    accuracy: str = "fast"
    method: str = "nearest"
    bits: Mapping[str, int] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        zero_points = "without" if self.symmetric else "with"
        kernels = {"exact": "float32", "fast": "int8"}[self.accuracy]
        others = f", {len(self.bits)} otherwise" if self.bits else ""
        return (
            f"blocks of {self.block} {zero_points} zero points, numbers by {self.method}{others}; "
            f"activations of products in {kernels}"
        )
