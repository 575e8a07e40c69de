"""A folder of onnxruntime-genai's, whoever made it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import onnxruntime_genai as og

from benchmarks.on_peers.workers.measure import Floats, Ids, serve


class Genai:
    """See ``measure.Program``."""

    def __init__(self, given: dict[str, Any]) -> None:
        config = og.Config(given["made"])
        options = {"intra_op_num_threads": given["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.room = given["room"]
        self.generator: Any = None

    def reset(self) -> None:
        options = og.GeneratorParams(self.model)
        options.set_search_options(max_length=self.room + 1, batch_size=1, do_sample=False)
        self.generator = og.Generator(self.model, options)

    def step(self, ids: Ids) -> Floats:
        self.generator.append_tokens(ids[None].astype(np.int32))
        return self.generator.get_logits()[0, -1]


if __name__ == "__main__":
    serve(Genai)
