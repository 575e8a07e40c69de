"""Error figures of one tensor against its reference. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Errors:
    """How far ``actual`` is from ``expected``.

    Attributes:
        max_abs: largest absolute difference.
        relative_rms: RMS of the difference over RMS of the reference. Unlike a cosine it sees a
            wrong scale, and unlike a largest relative error it is not ruled by values near zero.
        norm_ratio: RMS of ``actual`` over RMS of ``expected``.
    """

    max_abs: float
    relative_rms: float
    norm_ratio: float


def errors(expected: Array, actual: Array) -> Errors:
    """Figures of two arrays of one shape, computed in float64."""
    reference = expected.astype(np.float64)
    difference = actual.astype(np.float64) - reference
    scale = rms(reference)
    return Errors(float(np.abs(difference).max()), rms(difference) / scale, rms(actual) / scale)


def rms(array: Array) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(array.astype(np.float64)))))


def top1_disagreements(expected: Array, actual: Array, tie: float) -> tuple[float, int]:
    """How often the likeliest token differs, ``[n, V]`` each.

    Args:
        expected: reference logits.
        actual: the target's logits.
        tie: two reference logits closer than this are a tie that rounding may turn.

    Returns:
        The share of rows that agree, and the number that differ by more than a tie.
    """
    best, chosen = expected.argmax(-1), actual.argmax(-1)
    rows = np.arange(len(expected))
    gap = expected[rows, best] - expected[rows, chosen]
    return float((best == chosen).mean()), int((gap > tie).sum())
