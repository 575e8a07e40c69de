"""A graph from memory is the one that a trace of its own would have given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from traces import Traces

from ingot.export.capture import Captured, capture
from ingot.graphs.checkpoint import Checkpoint, block_reader
from ingot.graphs.family import find_family
from ingot.graphs.preset import preset_config, write_checkpoint

FAMILY = find_family("olmoe")
CONFIG = preset_config(FAMILY, "tiny")


def captured(by: Any, checkpoint: Checkpoint, **options: Any) -> Captured:
    model = FAMILY.build(checkpoint.config, "generate")
    parts = FAMILY.weight_map(model, checkpoint, "generate")
    result: Captured = by(model, block_reader(checkpoint, parts, model), **options)
    return result


def weights(found: Captured) -> dict[str, np.ndarray]:
    values = found.model.graph.initializers.values()
    return {v.name or "": v.const_value.numpy() for v in values if v.const_value is not None}


def content(found: Captured) -> bytes:
    result: bytes = ir.to_proto(found.model).SerializeToString(deterministic=True)
    return result


@pytest.mark.slow
def test_is_the_graph_of_its_own_trace_with_the_weights_of_its_own_checkpoint(
    traces: Traces, tiny: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, FAMILY, CONFIG, dtype=torch.float32, seed=2)
    first, second, fresh = map(Checkpoint.open, (tiny, tmp_path, tmp_path))
    one, two = (captured(traces, each) for each in (first, second))
    own = captured(capture, fresh)
    assert (two.states, two.main_output) == (own.states, own.main_output)
    # In turns, since a copy may be read while another is.
    read, other, again, expected = map(weights, (two, one, two, own))
    assert read.keys() == other.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(read[name], array) and np.array_equal(again[name], array)
    assert not np.array_equal(other["model.embed_tokens.weight"], read["model.embed_tokens.weight"])
    # What is read decides the checkpoint's hash.
    assert second.digest() == fresh.digest() != first.digest()
    assert content(two) == content(own)
    # A change of one copy is none of another.
    two.model.graph.remove(two.model.graph[-1], safe=False)
    assert content(captured(traces, second)) == content(own)


def test_traces_what_differs_in_more_than_weights(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []

    def counted(_model: Any, _read: Any, **options: Any) -> Captured:
        traced.append(tuple(options.values()))
        return Captured(ir.Model(ir.Graph([], [], nodes=[], name=""), ir_version=10), "logits", ())

    monkeypatch.setattr("traces.capture", counted)
    memory, checkpoint = Traces(), Checkpoint.open(tiny)
    for _ in range(2):
        captured(memory, checkpoint)
        captured(memory, checkpoint, precision=torch.float16)
        captured(memory, checkpoint, extra_outputs=("hidden_states",))
        captured(memory, checkpoint, exact_matrices=True)
    assert traced == [
        (torch.float32, (), False),
        (torch.float16, (), False),
        (torch.float32, ("hidden_states",), False),
        (torch.float32, (), True),
    ]
    checkpoint.config["norm_topk_prob"] = not checkpoint.config.get("norm_topk_prob", False)
    captured(memory, checkpoint)
    assert len(traced) == 5
