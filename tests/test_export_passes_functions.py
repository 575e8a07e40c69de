"""Function bodies beside the custom nodes: the model, its numbers and its conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from text_graph import Arrays, notices, notices_nothing_done, operators, parsed, refuses, run

from ingot.export.lower_trt import lower_trt
from ingot.export.passes.functions import AttachFunctionBodies, BodyError
from ingot.plugins.operator import DOMAIN, VERSION

# Two layers of experts' linear maps; the second has a row a choice.
TEXT = """
<ir_version: 10, opset_import: ["" : 23, "ingot" : 1]>
two_layers (float[n, 6] x, int64[n, 2] ids, float[3, 4, 6] up, float[3, 6, 4] down) =>
    (float[n, 2, 6] y)
<float[n, 2, 4] middle>
{
    middle = ingot.MoeLinear (x, ids, up)
    y = ingot.MoeLinear (middle, ids, down)
}
"""


def weights() -> Arrays:
    random = np.random.default_rng(0)
    shapes = {"up": (3, 4, 6), "down": (3, 6, 4)}
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def test_a_runtime_without_our_kernels_runs_the_model() -> None:
    model = parsed(TEXT, weights())
    assert AttachFunctionBodies()(model).modified
    # One body serves both nodes, which stay.
    assert [identifier[:2] for identifier in model.functions] == [("ingot", "MoeLinear")]
    assert operators(model.graph) == {"MoeLinear": 2}
    assert model.opset_imports[DOMAIN] == VERSION
    onnx.checker.check_model(ir.serde.serialize_model(model))
    random = np.random.default_rng(1)
    x = random.normal(size=(5, 6)).astype(np.float32)
    ids = random.integers(0, 3, (5, 2))
    up, down = weights().values()
    middle = np.einsum("nkoi,ni->nko", up[ids], x)
    expected = np.einsum("nkoi,nki->nko", down[ids], middle)
    found = run(model, {"x": x, "ids": ids})["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_what_has_its_bodies_is_left_alone() -> None:
    model = parsed(TEXT, weights())
    AttachFunctionBodies()(model)
    before = dict(model.functions)
    assert not AttachFunctionBodies()(model).modified
    assert dict(model.functions) == before


def test_a_graph_of_standard_operators_needs_none() -> None:
    model = parsed("""
        <ir_version: 10, opset_import: ["" : 23]>
        small (float[n] x) => (float[n] y) { y = Relu (x) }
    """)
    assert not AttachFunctionBodies()(model).modified
    assert not model.functions and DOMAIN not in model.opset_imports


def test_refuses_an_operator_it_does_not_know() -> None:
    model = parsed(TEXT.replace("y = ingot.MoeLinear", "y = ingot.Unknown"), weights())
    refuses(AttachFunctionBodies(), model, "Unknown y is no operator of ours")


def test_refuses_two_nodes_that_one_body_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parsed("""
        <ir_version: 10, opset_import: ["" : 23, "ingot" : 1]>
        two_activations (
            float[n, 6] x, float[n, 4] logits, float[4, 8, 6] gate_up, float[4, 6, 4] down
        ) => (float[n, 6] y) <float[n, 6] z> {
            z = ingot.MoeDispatch <top_k = 2, normalize = 1, activation = "silu">
                (x, logits, gate_up, down)
            y = ingot.MoeDispatch <top_k = 2, normalize = 1, activation = "relu">
                (z, logits, gate_up, down)
        }
    """)
    monkeypatch.delenv("INGOT_DEBUG")
    # As an export runs it: what the user reads is the sentence itself.
    with pytest.raises(BodyError, match="MoeDispatch y needs another function body than a node"):
        lower_trt(model)


def test_notices_what_is_left() -> None:
    model = parsed(TEXT, weights())
    notices_nothing_done(AttachFunctionBodies(), model, "MoeLinear middle has no function body")


def forget_a_body(model: ir.Model) -> None:
    model.functions.clear()


def import_another_version(model: ir.Model) -> None:
    model.opset_imports[DOMAIN] = VERSION + 1


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (forget_a_body, "MoeLinear middle has no function body"),
        (import_another_version, "MoeLinear middle has no import of ingot 1"),
    ],
)
def test_notices_its_own_mistakes(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(AttachFunctionBodies(), parsed(TEXT, weights()), spoil, why)
