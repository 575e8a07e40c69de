"""What every phase is given: the device, the kernels, and what earlier phases found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.devices import Device
from ingot.plugins.library import Library

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Bench:
    """The surroundings of a phase.

    Attributes:
        device: the card, or what stands for it in a rehearsal.
        rehearsal: whether sizes are tiny, and no card is there.
        computes: whether the kernels compute; a recorder only checks their launches.
        open_library: the kernel library of a path, or the default one.
        folder: of the results.
        deadline: of the phase that runs, a value of ``time.monotonic``.
        found: what phases found for later ones, such as the ceilings, by name.
    """

    device: Device
    rehearsal: bool
    computes: bool
    open_library: Callable[[Path | None], Library]
    folder: Path
    deadline: float = math.inf
    found: dict[str, Any] = field(default_factory=dict)

    def pick(self, real: Any, tiny: Any) -> Any:
        """The sizes to use: those of released models, or a rehearsal's."""
        return tiny if self.rehearsal else real

    def library(self, path: Path | None = None) -> Library:
        """The kernels of this path, by default those that ``load`` chose, loaded on the device."""
        chosen = path or self.found.get("library")
        library = self.open_library(Path(chosen) if chosen else None)
        self.device.start()
        library.prepare()
        return library

    def share(self, rate: float, ceiling: str) -> str:
        """A rate as a share of one of the card's ceilings, for a table."""
        most = self.found.get(ceiling)
        return f"{rate / most:.0%}" if most else "-"
