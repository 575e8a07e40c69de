"""onnxruntime-genai, with its own model builder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.on_peers.environments import Installed
from benchmarks.on_peers.models import Model
from benchmarks.on_peers.program import Format, Made, run_logged
from ingot.plugins.whole import staged

WORKER = "run_genai.py"


@dataclass
class Genai(Installed):
    """``Program`` of onnxruntime-genai's own builder."""

    name: str = "onnxruntime-genai"
    formats: tuple[Format, ...] = (
        Format("fp32", exact=True),
        # Its own choices: blocks of 32, and products that round activations to int8.
        Format("int4"),
    )
    told: ClassVar = ("onnxruntime-genai", "onnxruntime")

    def make(self, model: Model, chosen: Format) -> Made:
        out = self.work / self.name / model.family / chosen.folder
        if not out.is_dir():
            log = self.work / "logs" / f"{self.name}-{model.family}-{chosen.folder}.txt"
            with staged(out, replace=False) as made:
                builder = [self.python, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
                cache = self.work / self.name / "cache"
                where = ["-i", model.checkpoint, "-o", made, "-c", cache]
                run_logged([*builder, "-p", chosen.name, *where], log)
        return Made(out, tuple(out.glob("*.onnx.data")), WORKER, self.python)
