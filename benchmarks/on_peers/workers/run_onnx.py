"""A graph with its states as inputs and outputs, on plain ONNX Runtime."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import onnxruntime as ort

from benchmarks.on_peers.workers.measure import Floats, Ids, serve

TOKENS = ("input_ids", "attention_mask", "position_ids")
LOGITS = "logits"


class Onnx:
    """See ``measure.Program``."""

    def __init__(self, given: dict[str, Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = given["threads"]
        options.log_severity_level = 4
        self.session = ort.InferenceSession(given["made"], options, ["CPUExecutionProvider"])
        shapes = {each.name: each.shape for each in self.session.get_inputs()}
        self.tokens = [name for name in shapes if name in TOKENS]
        self.empty = {name: empty(shape) for name, shape in shapes.items() if name not in TOKENS}
        self.states: dict[str, Any] = {}
        self.seen = 0

    def reset(self) -> None:
        self.states = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for name, shape in self.empty.items()
        }
        self.seen = 0

    def step(self, ids: Ids) -> Floats:
        begin, self.seen = self.seen, self.seen + len(ids)
        given = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, self.seen), np.int64),
            "position_ids": np.arange(begin, self.seen)[None],
        }
        binding = self.session.io_binding()
        for name in self.tokens:
            binding.bind_cpu_input(name, given[name])
        for name, value in self.states.items():
            binding.bind_ortvalue_input(name, value)
        names = [each.name for each in self.session.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        found = dict(zip(names, binding.get_outputs(), strict=True))
        # What came out goes in again where it lies.
        self.states = {name: found[present(name)] for name in self.states}
        return found[LOGITS].numpy()[0, -1]


def empty(shape: list[int | str]) -> list[int]:
    """The shape of a state before the first token.

    Args:
        shape: with names for the batch, which comes first, and for the past of a cache.
    """
    return [size if isinstance(size, int) else int(at == 0) for at, size in enumerate(shape)]


def present(past: str) -> str:
    """The output that a state becomes."""
    return re.sub(r"^past_\w+?\.", "present.", past)


if __name__ == "__main__":
    serve(Onnx)
