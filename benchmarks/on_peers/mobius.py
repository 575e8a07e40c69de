"""mobius, which builds ONNX graphs of its own, on plain ONNX Runtime.

onnxruntime-genai, for which it writes a configuration as well, refuses some of its models by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.on_peers.environments import Installed
from benchmarks.on_peers.models import Model
from benchmarks.on_peers.program import Format, Made, run_logged
from ingot.plugins.whole import staged


@dataclass
class Mobius(Installed):
    """``Program`` of mobius."""

    name: str = "mobius"
    # It quantises nothing itself.
    formats: tuple[Format, ...] = (Format("f32", exact=True),)
    told: ClassVar = ("mobius-onnx", "onnxruntime")

    def make(self, model: Model, chosen: Format) -> Made:
        out = self.work / self.name / model.family / chosen.folder
        if not out.is_dir():
            log = self.work / "logs" / f"{self.name}-{model.family}-{chosen.folder}.txt"
            with staged(out, replace=False) as made:
                build = [self.python, "-m", "mobius", "build", "--ep", "cpu"]
                # With --config, which is for folders, fields of a Mamba2 are not found.
                how = ["--dtype", chosen.name, "--model", model.checkpoint, made]
                run_logged([*build, *how], log, HF_HUB_OFFLINE="1")
        return Made(out / "model.onnx", tuple(out.glob("*.onnx.data")), "run_onnx.py", self.python)
