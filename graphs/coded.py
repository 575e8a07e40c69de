"""A matrix as a quantised checkpoint has it: whole numbers, and what makes weights of them.

All formats that are read here say the same of a row of weights, each packed in its own way: it is
cut into groups of columns, and each group has a scale and a zero point::

    w = (q - zero_point) * scale          0 <= q < 2**bits

The scales are half precision mostly, and so the product of one and a difference of two numbers of
eight bits is exact in float32: the weights here are what the checkpoint says, before any rounding.
The formats' own readers compute in the precision of the scales, and so give these numbers rounded
once to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Form:
    """What is known of a matrix without reading its numbers.

    Attributes:
        bits: of a number.
        group: columns of a group.
        columns: of the matrix.
        symmetric: whether all zero points are the middle.
        in_order: whether columns follow each other in their groups.
    """

    bits: int
    group: int
    columns: int
    symmetric: bool
    in_order: bool


@dataclass(frozen=True)
class Coded:
    """One matrix of a quantised checkpoint.

    Attributes:
        codes: q, ``[N, K]`` uint8.
        scales: ``[N, groups]`` float32.
        zero_points: ``[N, groups]`` uint8; None where all are the middle, ``2**(bits - 1)``.
        bits: of a number.
        group: columns of a group, of which the last may have fewer.
        order: the group of each column, ``[K]`` int64; None where columns follow each other in
            their groups.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    bits: int
    group: int
    order: torch.Tensor | None = None

    def weights(self) -> torch.Tensor:
        """The matrix ``[N, K]`` float32."""
        middle = float(1 << (self.bits - 1))
        zeros = middle if self.zero_points is None else self.zero_points.float()
        wide = self.codes.float()
        columns = wide.shape[1]
        if self.order is None and columns % self.group == 0:
            # In place, and without a scale for each number.
            grouped = wide.view(len(wide), -1, self.group)
            grouped -= zeros if isinstance(zeros, float) else zeros[..., None]
            grouped *= self.scales[..., None]
            return wide
        order = torch.arange(columns) // self.group if self.order is None else self.order
        wide -= zeros if isinstance(zeros, float) else zeros[:, order]
        wide *= self.scales[:, order]
        return wide


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of each word, the lowest bits first.

    Args:
        words: ``[..., n]`` int32.
        bits: of a number, 4 or 8.

    Returns:
        ``[..., n, 32 / bits]`` uint8.
    """
    # Of the word as it lies in a little-endian file.
    four = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    if bits == 8:
        return four
    return torch.stack((four & 15, four >> 4), dim=-1).flatten(-2)
