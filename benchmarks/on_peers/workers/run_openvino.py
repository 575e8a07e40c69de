"""OpenVINO's runtime over a model that optimum-intel exported, with its state inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import openvino as ov

from benchmarks.on_peers.workers.measure import Floats, Ids, serve


class OpenVino:
    """See ``measure.Program``."""

    def __init__(self, given: dict[str, Any]) -> None:
        core = ov.Core()
        options = {"INFERENCE_NUM_THREADS": given["threads"], "PERFORMANCE_HINT": "LATENCY"}
        # Where it is not told otherwise it computes float32 in bfloat16, if the processor can.
        compiled = core.compile_model(given["made"], "CPU", {**options, **given["options"]})
        self.request = compiled.create_infer_request()
        self.inputs = {name for port in compiled.inputs for name in port.names}
        self.seen = 0

    def reset(self) -> None:
        self.request.reset_state()
        self.seen = 0

    def step(self, ids: Ids) -> Floats:
        begin, self.seen = self.seen, self.seen + len(ids)
        given = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, self.seen), np.int64),
            "position_ids": np.arange(begin, self.seen)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: given[name] for name in self.inputs})
        return self.request.get_tensor("logits").data[0, -1]


if __name__ == "__main__":
    serve(OpenVino)
