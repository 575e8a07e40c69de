"""Which architectures a test runs on where every one would take minutes."""

from __future__ import annotations

from typing import Any

import pytest

from ingot.graphs.names import FAMILIES

# One of each kind of layer, state and layout of weights; the others are put together from the same.
KINDS = ("granite", "granitemoehybrid", "jetmoe", "mamba2", "olmoe")


def every_family(*more: str) -> list[Any]:
    """All of them and ``more``, of which those that are no ``KINDS`` are slow."""
    return [
        *(pytest.param(f, marks=[pytest.mark.slow] * (f not in KINDS)) for f in FAMILIES),
        *more,
    ]
