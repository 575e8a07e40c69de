"""A GGUF file by llama.cpp, with the options that llama.cpp itself chooses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks.on_peers.workers.measure import Floats, Ids, serve
from benchmarks.on_weights.llama_worker import Model, bindings, quiet


class LlamaCpp(Model):
    """See ``measure.Program``."""

    def __init__(self, given: dict[str, Any]) -> None:
        api = bindings(Path(given["source"]))
        with quiet(api):
            super().__init__(api, given["made"], given["room"], given["threads"], exact=False)

    def step(self, ids: Ids) -> Floats:
        return super().step(ids, every=False)[0]


if __name__ == "__main__":
    serve(LlamaCpp)
