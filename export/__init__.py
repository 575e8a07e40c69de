"""Capture of an eager graph into canonical ONNX, lowering to a target, and the ingot folder.

``ingot.export.export(...)`` does all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingot.export.api import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    # At its first use; a session needs only the manifest of this folder.
    if name != "export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ingot.export.api import export

    return export


def __dir__() -> list[str]:
    # Completion offers what was not asked for yet, too.
    return sorted({*globals(), *__all__})
