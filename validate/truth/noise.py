"""How far several eager runs are from the truth: the floor of any tokens of any tensor.

A run is kept as one number a token: the mean square of its error there. So a sample takes next to
no memory, and the floor of any part of a call, or of several calls together, follows from the same
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.validate.truth.cache import Recording

Array = npt.NDArray[Any]


def squared_errors(truth: Array, found: Array) -> Array:
    """The mean square of an error over all axes but the first, ``[n, ...]`` -> ``[n]`` float64."""
    if truth.shape != found.shape or not truth.size:
        return np.zeros(len(truth))
    difference = (found.astype(np.float64, copy=False) - truth).reshape(len(truth), -1)
    result: Array = np.einsum("ij,ij->i", difference, difference) / difference.shape[1]
    return result


def together(samples: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The squared errors ``[n]`` of one call of several runs -> ``[n, runs]`` by name."""
    names = samples[0]
    return {name: np.stack([sample[name] for sample in samples], axis=1) for name in names}


def all_squared_errors(truth: Recording, found: Recording) -> Recording:
    """The squared errors of every tensor of every call of one run."""
    return [
        {name: squared_errors(want[name], got[name]) for name in want}
        for want, got in zip(truth, found, strict=True)
    ]


def noise_of(truth: Recording, eager: Recording) -> Recording:
    """The noise ``[n, 1]`` of one run alone."""
    return [together([call]) for call in all_squared_errors(truth, eager)]


def relative_errors(noise: Array, truth: Array) -> Array:
    """The relative RMS error ``[runs]`` of each run, of some tokens of one tensor.

    Args:
        noise: of them, ``[n, runs]``.
        truth: of them, ``[n, ...]``.
    """
    flat = truth.astype(np.float64, copy=False).reshape(-1)
    scale = np.sqrt(np.float64(flat @ flat) / flat.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Array = np.sqrt(noise.mean(axis=0)) / scale
    return result
