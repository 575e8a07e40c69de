"""Scales, and zero points, with which blocks of weights lose the least when they are rounded.

The error of a block that is rounded to ``r`` and scaled by ``s`` is ``sum(w * (x - s * r)**2)``.
For the best ``s`` of given ``r``, ``sum(w x r) / sum(w r r)``, it is ``sum(w x x)`` less
``sum(w x r)**2 / sum(w r r)``. So the search tries a few ranges for each block, rounds with each,
and keeps the one with the most of that last term; the numbers are then rounded once more with the
scale of that fit, and the scale is fitted to them, neither of which can lose. Beginning with ranges
narrower than the block's own is from llama.cpp's ``make_qx_quants``.

Blocks lie in columns here, ``[size, n]``: each step is then one pass of numpy over whole rows, and
what is held of a few hundred blocks stays in a processor's cache. Every column is computed by
itself and in the same order, so the result does not depend on which blocks are searched together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# By how many steps the range of a block is cut (or widened) to begin with: first where all columns
# count alike, then where they do not, so that the best range may leave out a large number.
RANGES = (0.0, 0.5, -0.5, 1.0, 1.7, 2.5)
WEIGHTED_RANGES = (
    -1.0,
    -0.5,
    0.0,
    0.35,
    0.7,
    1.0,
    1.4,
    1.8,
    2.2,
    2.6,
    3.0,
    3.5,
    4.0,
    4.6,
    5.3,
    6.0,
)
# The same where both ends have a number, and none more on one side.
EVEN_RANGES = (0.0,)
WEIGHTED_EVEN_RANGES = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
# And with a zero point of its own, with where zero lies beside the middle of what is cut.
FREE_RANGES = (0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 2.0, 3.0)
WEIGHTED_FREE_RANGES = tuple(i / 2 for i in range(-2, 14))
MOVES = (-0.5, 0.5)
WEIGHTED_MOVES = (-1.5, -0.5, 0.5, 1.5)


@dataclass(frozen=True)
class Found:
    """What is found of n blocks.

    Attributes:
        numbers: ``[size, n]`` whole numbers from 0 to the largest.
        scales: ``[n]``.
        zeros: ``[n]`` whole numbers; None where all are the middle.
    """

    numbers: Floats
    scales: Floats
    zeros: Floats | None


def search(blocks: Floats, bits: int, symmetric: bool, counts: Floats | None = None) -> Found:
    """The numbers, scales and zero points of the least error.

    Args:
        blocks: ``[size, n]`` finite weights, one block a column; overwritten.
        bits: of a number.
        symmetric: whether the zero point is the middle, ``2**(bits - 1)``.
        counts: ``[size, n]``, not negative and near 1: how much each one's squared error counts;
            None where all count alike.
    """
    # Of size 1, so that no square is beyond float32, or below it.
    size = np.maximum(blocks.max(axis=0), -blocks.min(axis=0))
    np.divide(blocks, np.where(size > 0, size, 1), out=blocks)
    trial = _Trial(blocks, symmetric, counts)
    candidates = _of_a_middle if symmetric else _of_any_zero
    for inverse, zero in candidates(blocks, bits, counts is not None):
        trial.attempt(inverse, zero, bits)
    numbers, zeros = trial.rounded(_inverse(trial.scales), trial.zeros, bits), trial.zeros
    _, scales = trial.fitted(numbers)
    numbers += zeros
    with np.errstate(under="ignore"):
        return Found(numbers, scales * size, None if symmetric else zeros)


class _Trial:
    """The best scale of each block so far."""

    def __init__(self, blocks: Floats, symmetric: bool, counts: Floats | None) -> None:
        self.blocks, self.symmetric, self.counts = blocks, symmetric, counts
        self.counted = blocks if counts is None else blocks * counts
        self.gain = np.zeros(blocks.shape[1], np.float32)
        self.scales = np.zeros(blocks.shape[1], np.float32)
        self.zeros = np.zeros(blocks.shape[1], np.float32)
        # Space for what is thrown away, asked for once.
        self.steps, self.products = np.empty_like(blocks), np.empty_like(blocks)

    def attempt(self, inverse: Floats, zeros: Floats, bits: int) -> None:
        gain, scales = self.fitted(self.rounded(inverse, zeros, bits))
        better = gain > self.gain
        np.copyto(self.gain, gain, where=better)
        np.copyto(self.scales, scales, where=better)
        np.copyto(self.zeros, zeros, where=better)

    def rounded(self, inverse: Floats, zeros: Floats, bits: int) -> Floats:
        """How many steps each is from zero, ``[size, n]``."""
        np.multiply(self.blocks, inverse, out=self.steps)
        np.rint(self.steps, out=self.steps)
        if self.symmetric:
            middle = 1 << (bits - 1)
            np.clip(self.steps, np.float32(-middle), np.float32(middle - 1), out=self.steps)
        else:
            # A clip to an array is several times as slow as these two.
            np.maximum(self.steps, -zeros, out=self.steps)
            np.minimum(self.steps, np.float32((1 << bits) - 1) - zeros, out=self.steps)
        return self.steps

    def fitted(self, steps: Floats) -> tuple[Floats, Floats]:
        """How much less the error is than that of zeros, and the scale, each ``[n]``."""
        np.multiply(self.counted, steps, out=self.products)
        above: Floats = np.add.reduce(self.products, axis=0)
        np.square(steps, out=self.products)
        if self.counts is not None:
            np.multiply(self.products, self.counts, out=self.products)
        below: Floats = np.add.reduce(self.products, axis=0)
        scales = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        return above * scales, scales


def _inverse(scales: Floats) -> Floats:
    result: Floats = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    return result


def _of_a_middle(blocks: Floats, bits: int, weighted: bool) -> Iterator[tuple[Floats, Floats]]:
    """What to multiply by before rounding, with the zero point in the middle."""
    low, high = blocks.min(axis=0), blocks.max(axis=0)
    # The number of largest size is at the end that has one step more.
    largest = np.where(-low > high, low, high)
    inverse = _inverse(largest)
    middle = np.full_like(low, 1 << (bits - 1))
    for steps in WEIGHTED_RANGES if weighted else RANGES:
        yield inverse * -(middle + np.float32(steps)), middle
    # And both ends alike, which is better where two are as large.
    for steps in WEIGHTED_EVEN_RANGES if weighted else EVEN_RANGES:
        yield inverse * (middle - np.float32(1 - steps)), middle


def _of_any_zero(blocks: Floats, bits: int, weighted: bool) -> Iterator[tuple[Floats, Floats]]:
    # Zero is always one of the numbers, as kernels ask for.
    low = np.minimum(blocks.min(axis=0), np.float32(0))
    high = np.maximum(blocks.max(axis=0), np.float32(0))
    inverse = _inverse(high - low)
    most = np.float32((1 << bits) - 1)
    for steps in WEIGHTED_FREE_RANGES if weighted else FREE_RANGES:
        by = inverse * np.float32(most + steps)
        # What is cut is cut from both ends, or a step more from one of them.
        middle = -low * by - np.float32(steps / 2)
        for move in WEIGHTED_MOVES if weighted else MOVES:
            yield by, np.clip(np.rint(middle + np.float32(move)), 0, most)
