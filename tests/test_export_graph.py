"""The recipe: what is captured, and which passes follow for a target."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from traces import Traces

from ingot.export import graph
from ingot.export.capture import Captured
from ingot.export.graph import LOWERINGS, Lowering, Recipe
from ingot.export.ingot import TARGETS
from ingot.export.passes.graph_pass import Applied
from ingot.export.passes.weights import Weight
from ingot.export.progress import Stages
from ingot.export.request import PRECISIONS, ExportError
from ingot.graphs.checkpoint import Checkpoint


class Tracer:
    """Notes what it is to capture, and returns an empty graph."""

    def __init__(self) -> None:
        self.asked: list[tuple[nn.Module, dict[str, Any]]] = []

    def __call__(self, model: nn.Module, _read: object, **options: Any) -> Captured:
        self.asked.append((model, options))
        one = ir.Graph([], [], nodes=[], opset_imports={"": 23})
        return Captured(ir.Model(one, ir_version=10), "logits", ())


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_is_lowered_by_its_own_passes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    lowered: list[str] = []

    def note_target(name: str, _model: ir.Model) -> tuple[Applied, ...]:
        lowered.append(name)
        return (Applied(name),)

    for key, lowering in LOWERINGS.items():
        if lowering is not None:
            note = partial(note_target, key[0])
            monkeypatch.setitem(LOWERINGS, key, Lowering(lowering.runtime, note))
    recipe, stages = Recipe(target, "generate", "float32"), Stages()
    captured = recipe.graph(recipe.open(Checkpoint.open(tiny)), stages, Tracer())
    assert isinstance(captured, Captured)
    assert lowered == ([] if target == "onnx" else [target])
    assert [each.name for each in captured.lowering] == lowered
    names = {"ort": ["lower to ONNX Runtime"], "onnx": []}.get(target, ["lower to TensorRT"])
    assert [stage.name for stage in stages.finished] == ["capture graph", *names]


@pytest.mark.parametrize("precision", PRECISIONS.values())
def test_captures_in_the_precision_that_is_asked_for(tiny: Path, precision: str) -> None:
    tracer, dtype = Tracer(), getattr(torch, precision)
    recipe = Recipe("onnx", "features", precision, ("router_logits",))
    opened = recipe.open(Checkpoint.open(tiny))
    recipe.graph(opened, capture=tracer)
    ((model, options),) = tracer.asked
    assert model is opened.model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    asked = {"precision": dtype, "extra_outputs": ("router_logits",)}
    assert options == {**asked, "exact_matrices": False}
    assert opened.read("layers.0.self_attn.q_proj.weight", 0).dtype == dtype


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_matrices_that_are_stored_otherwise_are_left_as_they_are(
    make_checkpoint: Any, traces: Traces, target: str
) -> None:
    """By all that comes before, factors of the config included; the last pass stores them."""
    recipe = Recipe(target, "generate", "float32", weights="bfloat16")
    checkpoint = Checkpoint.open(make_checkpoint("granite"))
    opened = recipe.open(checkpoint)
    captured = recipe.graph(opened, capture=traces)
    applied = captured.lowering if target == "ort" else captured.passes
    assert [each.name for each in applied][-2] == "StoreNarrow"
    name = "model.layers.1.mlp.down_proj.weight"
    stored = captured.model.graph.initializers[name].const_value
    assert isinstance(stored, Weight)
    want = checkpoint.read(name).T.to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(stored.read_block(0).astype(np.float32), want)


def test_traces_where_nothing_else_is_given(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer, recipe = Tracer(), Recipe("onnx", "generate", "float32")
    monkeypatch.setattr(graph, "trace", tracer)
    recipe.graph(recipe.open(Checkpoint.open(tiny)))
    assert len(tracer.asked) == 1


def test_refuses_an_output_that_the_architecture_lacks(make_checkpoint: Any) -> None:
    recipe = Recipe("onnx", "generate", "float32", ("router_logits",))
    with pytest.raises(ExportError, match="mamba2 has no router_logits; it has: hidden_states"):
        recipe.open(Checkpoint.open(make_checkpoint("mamba2")))
