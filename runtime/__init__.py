"""Running an ingot: sessions, generation, serving. Nothing here imports PyTorch.

``ingot.load(folder)`` opens a session, and ``ingot.generate(session, prompts)`` yields its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingot.runtime.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # At its first use, since a session needs numpy and `--help` does not.
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ingot.runtime.loading import load

    return load


def __dir__() -> list[str]:
    # Completion offers what was not asked for yet, too.
    return sorted({*globals(), *__all__})
