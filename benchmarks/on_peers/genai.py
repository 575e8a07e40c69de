"""onnxruntime-genai, with its own model builder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.on_peers import environments
from benchmarks.on_peers.models import Model
from benchmarks.on_peers.program import Format, Made, run_logged
from ingot.plugins.whole import staged

WORKER = "run_genai.py"


@dataclass
class Genai:
    """``Program`` of onnxruntime-genai's own builder.

    Attributes:
        work: where its environment and its files are kept.
    """

    work: Path
    name: str = "onnxruntime-genai"
    formats: tuple[Format, ...] = (
        Format("fp32", exact=True),
        # Its own choices: blocks of 32, and products that round activations to int8.
        Format("int4"),
    )
    python: Path = Path()

    def prepare(self) -> None:
        self.python = environments.prepare(
            self.name, self.work, self.work / "logs" / f"{self.name}-install.txt"
        )

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

    def versions(self) -> dict[str, str]:
        found = environments.versions(self.name, self.work)
        return {name: found[name] for name in ("onnxruntime-genai", "onnxruntime") if name in found}
