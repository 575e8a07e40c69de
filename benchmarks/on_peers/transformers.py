"""transformers, by which all others are measured and held to be the same model."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.on_peers.models import Model
from benchmarks.on_peers.program import Format, Made

NAME = "transformers"
# The yardstick of rates, and the truth of logits.
TRUTH = "float32"


class Transformers:
    """``Program`` of transformers in PyTorch's eager mode, in the environment of this project.

    Its versions are pinned by ``constraints.txt``, and it loads the checkpoint itself.
    """

    name = NAME
    formats = (Format(TRUTH, exact=True), Format("bfloat16"))

    def prepare(self) -> None:
        return None

    def make(self, model: Model, chosen: Format) -> Made:
        weights = tuple(sorted(model.checkpoint.glob("*.safetensors")))
        given = {"dtype": chosen.name}
        python = Path(sys.executable)
        return Made(model.checkpoint, weights, "run_transformers.py", python, given)

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "transformers")}
