"""Error figures of one tensor against its reference. Numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]

# An element that other padding moves by this share of the tensor's RMS belongs to padding.
UNSETTLED = 1e-3


@dataclass(frozen=True)
class Errors:
    """How far ``actual`` is from ``expected``.

    Attributes:
        relative_rms: RMS of the difference over RMS of the reference. Unlike a cosine it sees a
            wrong scale, and unlike a largest relative error it is not ruled by values near zero.
        norm_ratio: RMS of ``actual`` over RMS of ``expected``.
    """

    relative_rms: float
    norm_ratio: float


def errors(expected: Array, actual: Array) -> Errors:
    """Figures of two arrays of one shape, computed in float64; of zeros any error is infinite."""
    reference = expected.astype(np.float64, copy=False)
    difference = actual - reference
    scale = rms(reference)
    if not scale:
        wrong = math.inf if rms(difference) else 0.0
        return Errors(wrong, 1.0 + wrong)
    return Errors(rms(difference) / scale, rms(actual) / scale)


def rms(array: Array) -> float:
    """Root of the mean square."""
    flat = array.astype(np.float64, copy=False).reshape(-1)
    return math.sqrt(flat @ flat / flat.size) if flat.size else math.nan


def relative_error(
    expected: npt.NDArray[Any], found: npt.NDArray[Any], other: npt.NDArray[Any]
) -> float:
    """Relative RMS error of one tensor, over the elements that do not depend on padding.

    Args:
        expected: the reference's, of any dtype and shape.
        found: what is held against it.
        other: the reference's with other tokens in the padding; where there is none, ``expected``
            itself. Where it has another shape, as where rows are sorted by expert, it is unknown
            which elements count, and none does.

    Returns:
        0 where no element counts; infinity for another shape or dtype, and where one of the two is
        not finite and the other not the same.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if expected.shape != other.shape or not expected.size:
        return 0.0
    finite = np.isfinite(expected)
    if expected is other:
        settled = np.ones(expected.shape, dtype=np.bool_)
    else:
        settled = _settled(expected, other, finite)
    unequal = (finite != np.isfinite(found)) | (~finite & (expected != found))
    nan = np.isnan(expected) & np.isnan(found)
    if (unequal & ~nan & settled).any():
        return math.inf
    counted = settled & finite
    if not counted.any():
        return 0.0
    want = expected[counted].astype(np.float64)
    error = rms(found[counted].astype(np.float64) - want)
    return error / scale if (scale := rms(want)) else math.inf if error else 0.0


def _settled(
    expected: npt.NDArray[Any], other: npt.NDArray[Any], finite: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Which elements stay the same whatever the padding is."""
    with np.errstate(invalid="ignore", over="ignore"):
        moved = np.abs(expected.astype(np.float64) - other.astype(np.float64))
        scale = rms(expected[finite]) if finite.any() else 0.0
    return np.asarray((moved <= UNSETTLED * scale) | (expected == other))


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
