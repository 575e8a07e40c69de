"""Numerical validation of an ingot against the eager PyTorch graph.

``ingot.validate.validate(...)`` does all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingot.validate.api import validate

__all__ = ["validate"]


def __getattr__(name: str) -> Any:
    # At its first use, since it imports PyTorch.
    if name != "validate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ingot.validate.api import validate

    return validate


def __dir__() -> list[str]:
    # Completion offers what was not asked for yet, too.
    return sorted({*globals(), *__all__})
