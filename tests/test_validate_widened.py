"""Half-precision graphs in float32: right ones are at a few floors, small faults at hundreds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from kinds import every_family
from safetensors.torch import load_file

from ingot.export.ingot import GRAPH, WEIGHTS, Manifest
from ingot.export.progress import Stages
from ingot.graphs.checkpoint import Checkpoint
from ingot.validate.judge.widened import judge_widened
from ingot.validate.result import TensorResult
from ingot.validate.truth.reference import Reference
from ingot.validate.truth.rounded import rounded

# Exports in half precision; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow

DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16"}


def judged(ingot: Path, checkpoint: Path, precision: str, task: str = "generate") -> float:
    """The worst score; the results have problems where it is beyond the limit."""
    reference = Reference(Checkpoint.open(checkpoint), task, precision)
    results = judge_widened(ingot, Manifest.read(ingot), reference, 0, Stages())
    worst = max(result.score or 0.0 for result in results)
    assert any(result.problem for result in results) == (worst > 8), problems(results)
    return worst


def problems(results: list[TensorResult]) -> list[str]:
    return [f"{each.stage}, {each.name}: {each.problem}" for each in results if each.problem]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", every_family())
def test_a_right_graph_is_at_a_few_floors(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, family: str, precision: str
) -> None:
    checkpoint = make_checkpoint(family)
    ingot = make_ingot(checkpoint, "trt", precision=precision, builder="none")
    assert 0.3 < judged(ingot, checkpoint, PRECISIONS[precision]) < 5


def test_a_right_classifier_is_too(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> None:
    checkpoint = make_checkpoint("jetmoe")
    features = make_ingot(checkpoint, "trt", precision="fp16", builder="none", task="features")
    assert 0.3 < judged(features, checkpoint, "float16", "features") < 5


def epsilon(model: onnx.ModelProto) -> None:
    """One norm with 1e-3 in place of 1e-5."""
    node = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    (attribute,) = (each for each in node.attribute if each.name == "epsilon")
    attribute.f = 1e-3


def louder(model: onnx.ModelProto) -> None:
    """Logits that are 0.3 % too large."""
    node = next(node for node in model.graph.node if "logits" in node.output)
    node.output[list(node.output).index("logits")] = "logits.before"
    factor = onnx.numpy_helper.from_array(np.array(1.003, dtype=np.float16), "factor")
    model.graph.initializer.append(factor)
    model.graph.node.append(onnx.helper.make_node("Mul", ["logits.before", "factor"], ["logits"]))


def narrow(model: onnx.ModelProto) -> None:
    """A hidden state that goes through bfloat16."""
    name = "hidden_states.1"
    node = next(node for node in model.graph.node if name in node.output)
    node.output[list(node.output).index(name)] = f"{name}.before"
    place = list(model.graph.node).index(node) + 1
    casts = [
        onnx.helper.make_node("Cast", [f"{name}.before"], [f"{name}.narrow"], to=16),
        onnx.helper.make_node("Cast", [f"{name}.narrow"], [name], to=10),
    ]
    for number, cast in enumerate(casts):
        model.graph.node.insert(place + number, cast)


@pytest.mark.parametrize("plant", [epsilon, louder, narrow])
def test_finds_what_half_precision_hides(
    make_checkpoint: MakeCheckpoint,
    make_ingot: MakeIngot,
    tmp_path: Path,
    plant: Callable[[onnx.ModelProto], None],
) -> None:
    checkpoint = make_checkpoint("granite")
    right = make_ingot(checkpoint, "trt", precision="fp16", builder="none")
    wrong = Path(shutil.copytree(right, tmp_path / "wrong"))
    model = onnx.load(str(wrong / GRAPH), load_external_data=False)
    plant(model)
    onnx.save(model, str(wrong / GRAPH))
    assert judged(wrong, checkpoint, "float16") > 50


def test_finds_one_wrong_element_of_a_norm(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("mamba2")
    right = make_ingot(checkpoint, "trt", precision="bf16", builder="none")
    wrong = Path(shutil.copytree(right, tmp_path / "wrong"))
    weights = load_file(wrong / WEIGHTS)
    (name,) = (each for each in weights if each.endswith("layers.1.norm.weight"))
    value = weights[name]
    before = value.view(torch.int16).numpy().tobytes()
    value[7] *= 1.02
    after = value.view(torch.int16).numpy().tobytes()
    # In the file's own bytes, because writing it anew would move the tensors.
    data = (wrong / WEIGHTS).read_bytes()
    assert data.count(before) == 1 and before != after
    (wrong / WEIGHTS).write_bytes(data.replace(before, after))
    assert judged(wrong, checkpoint, "bfloat16") > 100


def test_the_checkpoint_has_what_the_ingot_stores(
    make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot
) -> None:
    checkpoint = make_checkpoint("granite")
    ingot = make_ingot(checkpoint, "trt", precision="fp16", builder="none")
    found = rounded(Checkpoint.open(checkpoint), "generate", torch.float16, ingot / GRAPH)
    stored = load_file(ingot / WEIGHTS)
    multipliers = found.config["embedding_multiplier"], found.config["residual_multiplier"]
    # A projection is stored with its inputs first.
    for name, factor, wanted in (
        ("model.embed_tokens.weight", multipliers[0], stored["model.embed_tokens.weight"]),
        (DOWN, multipliers[1], stored[DOWN].T),
        (QUERY, 1.0, stored[QUERY].T),
    ):
        read = found.read(name)
        assert read.dtype == found.dtype(name)
        torch.testing.assert_close(read.float() * factor, wanted.float(), rtol=1e-6, atol=1e-9)
