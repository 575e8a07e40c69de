"""How weights are stored in whole numbers; as ``ingot.json`` has it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# ``weights`` of ``ingot.json`` -> bits of a number.
BITS = {"int4": 4, "int8": 8}
BLOCKS = (32, 64, 128)
# What the scale of a block is stored in: for ONNX Runtime's kernels, and for Ingot's own.
SCALES = ("float32", "float16")
# Whether kernels may round the activations of a product to int8.
ACCURACIES = ("exact", "fast")
# How the numbers were chosen.
METHODS = ("nearest", "importance", "gptq", "given")
# Bits of a weight that stays as it was.
UNCHANGED = 32


@dataclass(frozen=True)
class Quantization:
    """What every weight in whole numbers has in common, and which have other bits or blocks.

    Attributes:
        block: how many weights of a row share a scale, where ``blocks`` has no other number.
        symmetric: whether there are no zero points.
        accuracy: of ``ACCURACIES``.
        method: of ``METHODS``.
        bits: by the name of a parameter, 4, 8, or ``UNCHANGED``, where ``weights`` is not so.
        calibration: the tokens that the numbers were chosen on, ``sha256`` of their file and
            ``tokens``; with a budget also that, and by parameter the ``effects``: the mean KL in
            nats that storing it in the fewest bits costs, of a mixture of experts both stacks
            together. Empty where none were given.
        blocks: by the name of a parameter, how many of its weights share a scale, where that is not
            ``block``.
        scales: of ``SCALES``; float16 is times a power of two of its row.
    """

    block: int = 32
    symmetric: bool = True
    accuracy: str = "fast"
    method: str = "nearest"
    bits: Mapping[str, int] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    scales: str = SCALES[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that blocks may have, the usual one and others."""
        return tuple(sorted({self.block, *self.blocks.values()}))

    def __str__(self) -> str:
        zero_points = "without" if self.symmetric else "with"
        kernels = {"exact": "float32", "fast": "int8"}[self.accuracy]
        blocks = f" ({len(self.blocks)} weights in others)" if self.blocks else ""
        bits = f" ({len(self.bits)} weights in other bits)" if self.bits else ""
        return (
            f"blocks of {self.block}{blocks} {zero_points} zero points, "
            f"numbers by {self.method}{bits}; activations of products in {kernels}"
        )
