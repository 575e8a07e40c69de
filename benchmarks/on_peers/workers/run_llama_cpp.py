"""A GGUF file by llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks.llama.model import Model, bindings, quiet
from benchmarks.on_peers.workers.measure import Floats, Ids, serve


class LlamaCpp(Model):
    """See ``measure.Program``."""

    def __init__(self, given: dict[str, Any]) -> None:
        api = bindings(Path(given["source"]))
        with quiet(api):
            room, threads, exact = given["room"], given["threads"], given["exact"]
            super().__init__(api, given["made"], room, threads, exact=exact)

    def step(self, ids: Ids) -> Floats:
        return super().step(ids, every=False)[0]


if __name__ == "__main__":
    serve(LlamaCpp)
