"""Plain rounding to blocks of whole numbers: the least that a format costs a model.

Each block's scale is the one that its largest number asks for, so nothing is chosen and nothing can
be chosen wrongly. It shares no code with what an export encodes by, nor with what decodes an ingot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.truth.other_weights import OtherWeights

# Numbers that are rounded at a time: few enough for what comes on the way to stay in a cache.
AT_ONCE = 1 << 15


@dataclass(frozen=True)
class BlockFormat:
    """Blocks of whole numbers along the input features of a matrix.

    Attributes:
        bits: of a number.
        block: numbers that share a scale.
        symmetric: whether zero is the middle of what the bits hold.
    """

    bits: int
    block: int
    symmetric: bool


@dataclass
class PlainCheckpoint(OtherWeights):
    """A checkpoint whose matrices are read as plain rounding leaves them.

    Attributes:
        formats: of each tensor that is rounded.
    """

    formats: Mapping[str, BlockFormat] = field(kw_only=True)

    def dtype(self, name: str) -> torch.dtype:
        """float32 of what is rounded."""
        return torch.float32 if name in self.formats else self.base.dtype(name)

    @property
    def key(self) -> str:
        """See ``OtherWeights.key``."""
        found = {name: asdict(each) for name, each in self.formats.items()}
        return json.dumps({"plain": found}, sort_keys=True)

    def _read(self, name: str, row: int | None) -> torch.Tensor:
        tensor, found = self._of_base(name, row), self.formats.get(name)
        return tensor if found is None else plainly_rounded(tensor, found)


def plain_checkpoint(base: Checkpoint, formats: Mapping[str, BlockFormat]) -> PlainCheckpoint:
    """A checkpoint with some of its tensors plainly rounded."""
    return PlainCheckpoint.over(base, formats=formats)


def plainly_rounded(weights: torch.Tensor, form: BlockFormat) -> torch.Tensor:
    """Matrices with each number rounded to the nearest step of its block.

    Args:
        weights: ``[..., K]`` of any float dtype; a block is filled up with zeros where K ends in
            it.
        form: the blocks.

    Returns:
        float32 of the same shape.
    """
    columns = weights.shape[-1]
    rows = weights.reshape(-1, columns)
    result = torch.empty(rows.shape, dtype=torch.float32)
    count = max(1, AT_ONCE // max(1, columns))
    for first in range(0, len(rows), count):
        result[first : first + count] = _rounded(rows[first : first + count], form)
    return result.reshape(weights.shape)


def _rounded(rows: torch.Tensor, form: BlockFormat) -> torch.Tensor:
    """Some rows ``[n, K]``."""
    columns = rows.shape[-1]
    wide = torch.nn.functional.pad(rows.float(), (0, -columns % form.block))
    blocks = wide.reshape(-1, form.block)
    most = (1 << form.bits) - 1
    if form.symmetric:
        middle = float(1 << (form.bits - 1))
        scale = blocks.abs().amax(1, keepdim=True) / (middle - 1)
        zero = torch.full_like(scale, middle)
    else:
        # Zero is always within the range of a block.
        low = blocks.amin(1, keepdim=True).clamp(max=0)
        high = blocks.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / most
        zero = (-low / _divisor(scale)).round()
    numbers = ((blocks / _divisor(scale)).round() + zero).clamp(0, most)
    return ((numbers - zero) * scale).reshape(wide.shape)[:, :columns]


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """A scale to divide by: that of a block of zeros is zero."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
