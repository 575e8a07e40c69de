"""Ahead-of-time export of sparse and state-space language models, with proof of the numbers.

``ingot.export.export(...)`` makes an ingot of a checkpoint, and ``ingot.validate.validate(...)``
compares it with eager PyTorch again. ``ingot.load(...)`` opens one, and ``ingot.generate(...)``
yields its tokens; these two import no PyTorch, and ``import ingot`` alone imports nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingot.version import __version__

if TYPE_CHECKING:
    from ingot import export as export
    from ingot import validate as validate
    from ingot.plugins.errors import IngotError
    from ingot.runtime.generate import Sampling, generate
    from ingot.runtime.loading import load
    from ingot.runtime.session import Session

__all__ = [
    "IngotError",
    "Sampling",
    "Session",
    "__version__",
    "export",
    "generate",
    "load",
    "validate",
]

# In a checkout the parts are links to the folders beside this one. A copy that lost its links, as
# an unpacked zip file may, finds the folders themselves.
if not (Path(__file__).parent / "export").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))

_HOMES = {
    "IngotError": "ingot.plugins.errors",
    "Sampling": "ingot.runtime.generate",
    "Session": "ingot.runtime.session",
    "generate": "ingot.runtime.generate",
    "load": "ingot.runtime.loading",
}


def __getattr__(name: str) -> Any:
    # At its first use: an export needs seconds of imports, and a session none of them.
    if name in ("export", "validate"):
        return import_module(f"ingot.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # Completion offers what was not asked for yet, too.
    return sorted({*globals(), *__all__})
