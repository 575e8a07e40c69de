"""OpenVINO, of a model that optimum-intel exports and quantises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.on_peers.environments import Installed
from benchmarks.on_peers.models import Model
from benchmarks.on_peers.program import WORKERS, Format, Made, run_logged
from ingot.plugins.whole import staged

# Without these it computes in bfloat16 where the processor can, and keeps its cache in int8.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


@dataclass
class OpenVino(Installed):
    """``Program`` of OpenVINO."""

    name: str = "openvino"
    formats: tuple[Format, ...] = (
        # Both store the checkpoint's bfloat16.
        Format("float32", {"bits": None, "run": EXACT}, exact=True),
        Format("bfloat16", {"bits": None, "run": {}}),
        Format("int8", {"bits": 8, "run": {}}),
        Format("int4", {"bits": 4, "run": {}}),
    )
    told: ClassVar = ("openvino", "optimum-intel")

    def make(self, model: Model, chosen: Format) -> Made:
        bits = chosen.options["bits"]
        stored = "whole" if bits is None else f"int{bits}"
        out = self.work / self.name / model.family / stored
        if not out.is_dir():
            log = self.work / "logs" / f"{self.name}-{model.family}-{stored}.txt"
            with staged(out, replace=False) as made:
                asked = {"checkpoint": str(model.checkpoint), "out": str(made), "bits": bits}
                run_logged([self.python, WORKERS / "export_openvino.py", json.dumps(asked)], log)
        given = {"options": chosen.options["run"]}
        graph, weights = (out / f"openvino_model.{end}" for end in ("xml", "bin"))
        return Made(graph, (weights,), "run_openvino.py", self.python, given)
