"""What the checks of an ingot share: the ingot, its checkpoint, and one fresh capture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ingot.export.capture import Captured
from ingot.export.graph import Capture, Opened, Recipe
from ingot.export.ingot import Manifest
from ingot.export.ingot_schema import ORT
from ingot.export.progress import Stages
from ingot.export.request import EXTRA_OUTPUTS
from ingot.graphs.checkpoint import Checkpoint


@dataclass
class Subject:
    """What is checked, and what it is held against.

    Attributes:
        folder: the ingot.
        manifest: the ingot's.
        checkpoint: what it was made from.
        stages: shows the steps.
        capture: traces the eager graph, ``export.capture.capture`` by default.
    """

    folder: Path
    manifest: Manifest
    checkpoint: Checkpoint
    stages: Stages
    capture: Capture | None = None

    @cached_property
    def recipe(self) -> Recipe:
        """What the ingot's manifest says it was made by."""
        # A factor is folded over a hidden state only where that is no output, so the graph depends
        # on the outputs that were asked for.
        named = {output.name.partition(".")[0] for output in self.manifest.outputs}
        extra = tuple(name for name in EXTRA_OUTPUTS if name in named)
        manifest = self.manifest
        return Recipe(
            manifest.target,
            manifest.task,
            manifest.precision,
            extra,
            manifest.weights,
            manifest.quantization,
            manifest.kernels or ORT,
            manifest.activations,
        )

    @cached_property
    def opened(self) -> Opened:
        """The model that is captured.

        Raises:
            IngotError: the checkpoint gives no model of the manifest's task.
        """
        return self.recipe.open(self.checkpoint)

    @cached_property
    def captured(self) -> Captured:
        """The graph as an export makes it now, lowered for the ingot's target; weights unread."""
        return self.recipe.graph(self.opened, self.stages, self.capture, again=True)
