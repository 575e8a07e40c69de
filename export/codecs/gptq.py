"""Numbers that make up for each other's errors, given what the weights are multiplied with.

The error of a row of weights ``w`` that is stored as ``v`` is, over inputs ``x`` of second moment
``H = mean(x x^T)``, ``(w - v)^T H (w - v)``. Rounding each weight to the nearest number only makes
its diagonal small. Here

1. columns are rounded one after the other, and what is not rounded yet is moved by what makes up
   best for the error so far (Frantar et al. 2022, arXiv:2210.17323, with the Cholesky form of its
   section 3). Each block gets its scale when it is reached, from the moved weights, by the search
   of ``search.py`` with the diagonal of H as what counts. Blocks of larger inputs come first, and
   in a block the columns of larger inputs, which needs no order of columns in the file;
2. then each block's scale, and each number given all others, is set to its own best in turn
   (coordinate descent on the same error; Behdin et al. 2023, arXiv:2309.01885), which can only make
   the error smaller.

Rows are independent of each other.
"""

from __future__ import annotations

import numpy as np
import torch

from ingot.export.codecs.blocks import Blocks, Encoded, Floats
from ingot.export.codecs.search import search

# What is added to the diagonal of H, as a share of its mean: inputs that the calibration did not
# see are not free to be anything.
DAMPING = 0.01
# How often each scale and each number is set to its best.
SWEEPS = 2
# Rows that are worked on together, so that what is held of them stays small.
AT_ONCE = 4096


def encode(blocks: Blocks, rows: Floats, moments: torch.Tensor) -> Encoded:
    """Quantise a matrix for inputs of known second moments.

    Args:
        blocks: the format.
        rows: ``[N, K]``, finite.
        moments: H ``[K, K]``, symmetric and positive semidefinite, of any size.
    """
    count, columns = rows.shape
    whole = -(-columns // blocks.size) * blocks.size
    damped = _damped(moments, whole)
    order = _order(damped, blocks.size)
    factor = _factor(damped, order)
    parts = []
    for first in range(0, count, AT_ONCE):
        some = np.ascontiguousarray(rows[first : first + AT_ONCE].T)
        weights = torch.zeros(whole, some.shape[1])
        weights[:columns] = torch.from_numpy(some)
        part = _Rows(blocks, weights, damped)
        part.feed_back(factor, order)
        for _ in range(SWEEPS):
            part.descend()
        parts.append(part)
    steps, scales, zeros = (
        torch.cat([getattr(part, name) for part in parts], dim=1)
        for name in ("steps", "scales", "zeros")
    )
    numbers = steps.view(-1, blocks.size, count) + zeros[:, None]
    return blocks.pack(
        numbers.permute(2, 0, 1).to(torch.uint8).contiguous().numpy(),
        scales.T.contiguous().numpy(),
        zeros.T.to(torch.uint8).contiguous().numpy(),
    )


def _damped(moments: torch.Tensor, whole: int) -> torch.Tensor:
    """H of mean 1 on its diagonal, damped, and filled up with inputs that nothing depends on."""
    size = len(moments)
    mean = float(moments.diagonal().mean())
    result = torch.eye(whole) * DAMPING
    result[:size, :size] += moments.float() / mean if mean > 0 else torch.eye(size)
    return result


def _order(damped: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The columns of each block in the order of rounding, the blocks in theirs."""
    by_block = damped.diagonal().view(-1, size)
    inside = by_block.argsort(dim=1, descending=True, stable=True)
    blocks = by_block.sum(dim=1).argsort(descending=True, stable=True)
    return [block * size + inside[block] for block in blocks]


def _factor(damped: torch.Tensor, order: list[torch.Tensor]) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of H, in the order of rounding."""
    at = torch.cat(order)
    # In float64, since the inverse of a matrix of which little is damped loses half of the digits.
    wide = damped[at][:, at].double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()


class _Rows:
    """Some rows on their way, which are columns here.

    Args:
        blocks: the format.
        weights: ``[K, N]``, K a whole number of blocks.
        moments: H ``[K, K]``, damped.

    Attributes:
        steps: ``[K, N]`` whole numbers, how many steps each weight is from zero.
        scales: ``[blocks, N]``.
        zeros: ``[blocks, N]`` whole numbers, the zero points.
    """

    def __init__(self, blocks: Blocks, weights: torch.Tensor, moments: torch.Tensor) -> None:
        self.blocks, self.weights, self.moments = blocks, weights, moments
        shape = (len(weights) // blocks.size, weights.shape[1])
        self.steps = torch.zeros_like(weights)
        self.scales, self.zeros = torch.zeros(shape), torch.full(shape, float(blocks.middle))

    def feed_back(self, factor: torch.Tensor, order: list[torch.Tensor]) -> None:
        """Round column after column, and move those that are left by what makes up best for it."""
        at, size = torch.cat(order), self.blocks.size
        moved, counts = self.weights[at], self.moments.diagonal()[at]
        for place, columns in enumerate(order):
            here = slice(place * size, (place + 1) * size)
            some, square, number = moved[here], factor[here, here], int(columns[0]) // size
            self._search(number, some, counts[here])
            scale, inverse = self.scales[number], self._inverse(number)
            errors = torch.empty_like(some)
            for column in range(size):
                steps = self._rounded(number, some[column] * inverse)
                self.steps[columns[column]] = steps
                torch.sub(some[column], steps * scale, out=errors[column])
                errors[column] /= square[column, column]
                left = slice(column + 1, size)
                some[left].addr_(square[column, left], errors[column], alpha=-1)
            moved[here.stop :].addmm_(factor[here, here.stop :].T, errors, alpha=-1)

    def descend(self) -> None:
        """Set every scale, and every number, to its best given all others."""
        size = self.blocks.size
        wide = self.steps.view(-1, size, self.steps.shape[1]) * self.scales[:, None]
        errors = self.weights - wide.view_as(self.weights)
        # Half of what the squared error loses with each weight that grows.
        slopes = self.moments @ errors
        for number in range(len(self.scales)):
            here = slice(number * size, (number + 1) * size)
            before = errors[here].clone()
            self._descend_scale(number, errors[here], slopes[here])
            self._descend_numbers(number, errors[here], slopes[here])
            change = errors[here] - before
            # Inside of the block they are up to date.
            slopes[: here.start].addmm_(self.moments[: here.start, here], change)
            slopes[here.stop :].addmm_(self.moments[here.stop :, here], change)

    def _descend_scale(self, number: int, errors: torch.Tensor, slopes: torch.Tensor) -> None:
        here = slice(number * self.blocks.size, (number + 1) * self.blocks.size)
        steps, square = self.steps[here], self.moments[here, here]
        bent = (steps * (square @ steps)).sum(0)
        by = (steps * slopes).sum(0) / torch.where(bent > 0, bent, torch.inf)
        self.scales[number] += by
        errors -= steps * by
        slopes -= square @ (steps * by)

    def _descend_numbers(self, number: int, errors: torch.Tensor, slopes: torch.Tensor) -> None:
        here = slice(number * self.blocks.size, (number + 1) * self.blocks.size)
        steps, square = self.steps[here], self.moments[here, here]
        weights, scale, inverse = self.weights[here], self.scales[number], self._inverse(number)
        for column in range(self.blocks.size):
            bent = square[column, column]
            wanted = weights[column] - errors[column] + slopes[column] / bent
            new = self._rounded(number, wanted * inverse)
            change = (steps[column] - new) * scale
            errors[column] += change
            slopes.addr_(square[:, column], change)
            steps[column] = new

    def _rounded(self, number: int, steps: torch.Tensor) -> torch.Tensor:
        zeros = self.zeros[number]
        return torch.clamp(torch.round(steps), -zeros, self.blocks.most - zeros)

    def _inverse(self, number: int) -> torch.Tensor:
        scales = self.scales[number]
        return torch.where(scales != 0, 1 / scales, torch.zeros(()))

    def _search(self, number: int, weights: torch.Tensor, counts: torch.Tensor) -> None:
        """Scale and zero point of one block of columns ``[size, N]``."""
        counted = (counts / counts.mean())[:, None].expand_as(weights).contiguous().numpy()
        blocks = self.blocks
        found = search(weights.clone().numpy(), blocks.bits, blocks.symmetric, counted)
        self.scales[number] = torch.from_numpy(found.scales)
        if found.zeros is not None:
            self.zeros[number] = torch.from_numpy(found.zeros)
