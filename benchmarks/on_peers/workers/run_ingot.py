"""An ingot by its own session."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np

from benchmarks.on_peers.workers.measure import Floats, Ids, serve
from ingot.runtime.loading import load as load_ingot


class Ingot:
    """See ``measure.Program``."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.session: Any = load_ingot(given["made"], threads=given["threads"], verify=False)
        self.room = given["room"]
        # As a generation asks for them.
        self.asked = {"logits_to_keep": 1} if given["last"] else {}

    def reset(self) -> None:
        self.session.reset(1, self.room)

    def step(self, ids: Ids) -> Floats:
        return self.session.step(ids[None], np.ones_like(ids[None]), **self.asked)[0, -1]


if __name__ == "__main__":
    serve(Ingot)
