"""The exact twin: the same graph, at the level that rounds no activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from oracle import relative_rms, tokens

from ingot.export.ingot import GRAPH, Manifest
from ingot.runtime.loading import load
from ingot.runtime.ort import OrtSession
from ingot.validate.truth.taps import TappedSession
from ingot.validate.truth.twin import ExactSession, make_exact, no_twin

Ingots = Callable[..., Path]


def levels(model: onnx.ModelProto) -> list[int]:
    return [
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]


def logits(session: OrtSession) -> np.ndarray:
    ids, mask = tokens(512)
    session.reset(len(ids), ids.shape[1])
    return np.asarray(session.step(ids, mask)[mask != 0])


def test_the_twin_is_the_exact_export(ingots: Ingots) -> None:
    fast = ingots("granite", weights="int4", accuracy="fast")
    exact = ingots("granite", weights="int4", accuracy="exact")
    manifest = Manifest.read(fast)
    expected = logits(load(exact, allow_failed=True))  # type: ignore[arg-type]
    for twin in (ExactSession(fast, manifest), TappedSession(fast, manifest, exact=True)):
        np.testing.assert_array_equal(logits(twin), expected)
    # What is delivered rounds.
    for delivered in (OrtSession(fast, manifest), TappedSession(fast, manifest)):
        assert relative_rms(expected, logits(delivered)) > 1e-4


@pytest.mark.parametrize(
    ("family", "weights", "has"),
    [("olmoe", "int4", True), ("granite", "int8", True), ("olmoe", "int8", False)],
)
def test_knows_which_graphs_have_one(family: str, weights: str, has: bool, ingots: Ingots) -> None:
    folder = ingots(family, weights=weights, accuracy="fast")
    why = no_twin(folder)
    assert (why is None) == has
    assert has or (why is not None and "QMoE" in why)
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    assert set(levels(model)) == {4}
    before = {node.name for node in model.graph.node}
    make_exact(model)
    assert set(levels(model)) == {0} and {node.name for node in model.graph.node} == before
