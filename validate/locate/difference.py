"""In words what is wrong with a tensor where no error says it."""

from __future__ import annotations

import numpy as np

from ingot.validate.locate.graph import Array


def difference(expected: Array, found: Array, other: Array) -> str:
    """Why two tensors are infinitely far apart.

    Args:
        expected: the reference's.
        found: the ingot's.
        other: the reference's with other tokens in the padding.
    """
    if expected.shape != found.shape:
        return f"of shape {list(found.shape)} and not {list(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"{found.dtype} and not {expected.dtype}"
    settled = np.ones(expected.shape, np.bool_)
    if other.shape == expected.shape:
        settled = (expected == other) | (np.isnan(expected) & np.isnan(other))
    held = held_of(found[settled])
    if held:
        return f"which holds {held}"
    return "which is finite and should not be" if held_of(expected[settled]) else ""


def held_of(array: Array) -> str:
    """``NaN``, ``infinity`` or both, as far as an array holds them; empty where it is finite."""
    if array.dtype.kind not in "fc":
        return ""
    held = {"NaN": np.isnan(array).any(), "infinity": np.isinf(array).any()}
    return " and ".join(name for name, there in held.items() if there)
