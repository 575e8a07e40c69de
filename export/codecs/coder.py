"""Who chooses the numbers that weights are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

from ingot.export.codecs.blocks import Bits, Blocks, Encoded, Floats, Scales, Size
from ingot.export.quantization import Quantization


class Coder(Protocol):
    """Encodes weights, a matrix at a time.

    A weight is called as the eager model's parameter is. Of a stack of experts each is encoded by
    itself, under its own number, whatever order the graph wants them in; its rows may come in any
    order, so each is encoded without regard to the others.
    """

    def format(self, name: str) -> Blocks | None:
        """The format of a weight; None for one that is stored as it is.

        Args:
            name: of the parameter; of an expert that is a weight of its own, its stack's.
        """
        ...

    def encode(self, name: str, expert: int, rows: Floats) -> Encoded:
        """The numbers of one matrix, in the format of its weight.

        Args:
            name: of the parameter.
            expert: its place in a stack, else 0.
            rows: ``[outputs, inputs]``.
        """
        ...


@dataclass(frozen=True)
class Nearest:
    """Rounds each weight to the nearest number, with the scales of least squared error.

    Attributes:
        blocks: the format.
        others: of weights that have another, by name.
    """

    blocks: Blocks | None
    others: Mapping[str, Blocks | None] = field(default_factory=dict)

    def format(self, name: str) -> Blocks | None:
        """See ``Coder.format``."""
        return self.others.get(name, self.blocks)

    def encode(self, name: str, _expert: int, rows: Floats) -> Encoded:
        """See ``Coder.encode``."""
        blocks = self.format(name)
        assert blocks is not None, f"{name} is stored as it is"
        return blocks.encode(rows)


def blocks_of(chosen: Quantization, bits: int, size: int | None = None) -> Blocks:
    """The format of weights of so many bits, as ``ingot.json`` has the rest of it.

    Args:
        chosen: the rest.
        bits: of a number.
        size: of a block, where it is not the usual one.
    """
    return Blocks(
        cast(Bits, bits),
        cast(Size, size or chosen.block),
        chosen.symmetric,
        cast(Scales, chosen.scales),
    )
