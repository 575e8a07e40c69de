"""Validation of states of fixed size: what it fails of a Mamba2 ingot, and what it passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakeIngot
from forgetful import Forgetful
from judged import judged
from safetensors.torch import load_file, save_file

from ingot.export.ingot import Manifest
from ingot.graphs.checkpoint import Checkpoint
from ingot.runtime.session import Floats, Ids
from ingot.validate.run import validate_ingot
from ingot.validate.truth.eager import EagerSession
from ingot.validate.truth.inputs import make_inputs
from ingot.validate.truth.reference import Reference

LAYERS = 2
VOCAB = 512

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint of two groups and tied embeddings; read only."""
    return make_checkpoint("mamba2", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def ingot(folder: Path, make_ingot: MakeIngot) -> Path:
    """It as an ``ort`` ingot; read only."""
    return make_ingot(folder, "ort")


def _mixer(weight: str) -> str:
    return f"backbone.layers.1.mixer.{weight}"


def _one_head(weight: str, by: float) -> Callable[[Tensors], None]:
    def edit(weights: Tensors) -> None:
        weights[_mixer(weight)][3] += by

    return edit


def _reverse_one_channel(weights: Tensors) -> None:
    weight = weights[_mixer("conv1d.weight")]
    weight[5] = weight[5].flip(-1)


def _swap_b_and_c(weights: Tensors) -> None:
    for name in ("conv1d.weight", "conv1d.bias"):
        x, b, c = torch.split(weights[_mixer(name)], [128, 32, 32])
        weights[_mixer(name)] = torch.cat((x, c, b))


DAMAGED: dict[str, tuple[dict[str, Any], Callable[[Tensors], None]]] = {
    "A_log of one head": ({}, _one_head("A_log", 0.1)),
    "D of one head": ({}, _one_head("D", 0.02)),
    "dt_bias of one head": ({}, _one_head("dt_bias", 0.02)),
    "convolution bias of one channel": ({}, _one_head("conv1d.bias", 0.02)),
    "convolution of one channel reversed": ({}, _reverse_one_channel),
    "norm of one channel": ({}, _one_head("norm.weight", 0.02)),
    "B and C swapped": ({}, _swap_b_and_c),
    "time_step_limit": ({"time_step_limit": [0.0, 0.2]}, lambda _weights: None),
    "layer_norm_epsilon": ({"layer_norm_epsilon": 1e-4}, lambda _weights: None),
}


@pytest.fixture
def variant(folder: Path, tmp_path: Path) -> Callable[..., Reference]:
    """The eager graph of a copy of the base checkpoint with one thing changed."""

    def make(config: dict[str, Any], edit: Callable[[Tensors], None]) -> Reference:
        copy = shutil.copytree(folder, tmp_path / "checkpoint")
        raw = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**raw, **config}))
        weights = load_file(copy / "model.safetensors")
        edit(weights)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return Reference(Checkpoint.open(copy), "generate")

    return make


@pytest.mark.parametrize(
    "damage",
    [n if i < 2 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(DAMAGED)],
)
def test_validation_fails_an_ingot_of_another_model(
    ingot: Path, variant: Callable[..., Reference], damage: str
) -> None:
    report = validate_ingot(ingot, variant(*DAMAGED[damage]))
    assert report.verdict == "failed"
    assert any(tensor.problem for tensor in report.tensors if tensor.name == "logits")


def test_validation_passes_a_copy_of_the_checkpoint(
    ingot: Path, variant: Callable[..., Reference]
) -> None:
    # The control of the controls: copying and writing back changes nothing.
    copy = variant({}, lambda _weights: None)
    assert validate_ingot(ingot, copy).verdict == "passed"


class ScalesAState(Forgetful):
    """One that hands out a state 0.1 % too large."""

    def step(self, input_ids: Ids, attention_mask: Ids, logits_to_keep: int = 0) -> Floats:
        return self.inner.step(input_ids, attention_mask, logits_to_keep)

    def state(self) -> dict[str, Floats]:
        found = self.inner.state()
        name = list(found)[self.index]
        return {**found, name: found[name] * np.float32(1.001)}


@pytest.mark.parametrize("index", range(2 * LAYERS))
@pytest.mark.parametrize(("fault", "step"), [(Forgetful, "decode 1"), (ScalesAState, "prefill")])
def test_validation_fails_a_damaged_state(
    folder: Path, ingot: Path, fault: type[Forgetful], step: str, index: int
) -> None:
    manifest = Manifest.read(ingot)
    faulty = fault(EagerSession(Checkpoint.open(folder), "generate"), index)
    reference = Reference(Checkpoint.open(folder), "generate")
    failures = [tensor for tensor in judged(faulty, reference, manifest) if tensor.problem]
    assert failures[0].stage == step
    assert manifest.states[index].output in {failure.name for failure in failures}


def test_streams_a_checkpoint_to_exactly_the_same_numbers(folder: Path) -> None:
    inputs = make_inputs(VOCAB)
    found = []
    for streamed in (False, True):
        session = EagerSession(Checkpoint.open(folder), "generate", streamed=streamed)
        session.reset(*inputs.input_ids.shape)
        cut = inputs.prefill
        logits = [
            session.step(inputs.input_ids[:, part], inputs.attention_mask[:, part])
            for part in (slice(0, cut), slice(cut, None))
        ]
        found.append({"logits": np.concatenate(logits, axis=1), **session.state()})
    for name, array in found[0].items():
        np.testing.assert_array_equal(found[1][name], array)
