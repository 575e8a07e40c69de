"""What one export is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TARGETS = ("onnx", "ort")
EXTRA_OUTPUTS = ("router_logits", "hidden_states")
TASKS = ("generate", "features", "classify")
PRESETS = ("tiny", "small", "full")


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
        model: a family name, a checkpoint folder, or ``org/name`` on the hub.
        target: one of ``TARGETS``.
        out: the ingot folder to make.
        task: one of ``TASKS``.
        preset: with a family name, the shape of a seeded random checkpoint made first.
        revision: branch, tag or commit on the hub.
        seed: of a preset's weights.
        extra_outputs: of ``EXTRA_OUTPUTS``, each layer's tensor as a further output.
        overwrite: replace an ingot that is at ``out``.
    """

    model: str
    target: str
    out: Path
    task: str = "generate"
    preset: str | None = None
    revision: str | None = None
    seed: int = 0
    extra_outputs: tuple[str, ...] = ()
    overwrite: bool = False
