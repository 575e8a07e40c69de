"""Rotary embeddings become one operator: the graph, numbers and conditions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import interface, notices_nothing_done, operators, parsed, run

from ingot.export.passes.rotary import RotationToOperator

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
rotated (float[b, t, 24] q, float[b, t, 1, 4] angles) => (float[b, t, 24] y) {
    one = Constant <value = int64[1] {1}> ()
    zero = Constant <value = int64[1] {0}> ()
    four = Constant <value = int64[1] {4}> ()
    last = Constant <value = int64[1] {3}> ()
    most = Constant <value = int64[1] {9223372036854775807}> ()
    heads = Constant <value = int64[4] {0, 0, 3, 8}> ()
    flat = Constant <value = int64[3] {0, 0, 24}> ()
    twice = Concat <axis = -1> (angles, angles)
    cos = Cos (twice)
    sin = Sin (twice)
    x = Reshape (q, heads)
    first = Slice (x, zero, four, last, one)
    second = Slice (x, four, most, last, one)
    negated = Neg (second)
    turned = Concat <axis = -1> (negated, first)
    straight = Mul (x, cos)
    other = Mul (turned, sin)
    rotated = Add (straight, other)
    merged = Reshape (rotated, flat)
    y = Identity (merged)
}
"""


def lifted(text: str) -> ir.Model:
    """With its constants as initializers, as a capture has them."""
    model = parsed(text)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def feeds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    q = random.normal(size=(2, 5, 24)).astype(np.float32)
    return {"q": q, "angles": random.uniform(-9, 9, (2, 5, 1, 4)).astype(np.float32)}


def definition(q: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Pairs (x_i, x_{i+D/2}) turned by their angles, as complex numbers."""
    x = q.reshape(*q.shape[:2], 3, 8).astype(np.float64)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles.astype(np.float64))
    return np.concatenate([turned.real, turned.imag], axis=-1).reshape(q.shape)


def test_a_rotation_is_one_operator_over_what_was_flat() -> None:
    model = lifted(TEXT)
    before = interface(model)
    assert RotationToOperator()(model).modified
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert interface(model) == before
    found = operators(model.graph)
    assert found["RotaryEmbedding"] == 1
    assert not {"Neg", "Add", "Mul"} & found.keys()
    y = run(model, feeds())["y"]
    np.testing.assert_allclose(y, definition(**feeds()), rtol=0, atol=2e-6)


def test_heads_that_were_not_flat_are_made_so() -> None:
    """Such as those that a norm of each head gives."""
    text = TEXT.replace("x = Reshape (q, heads)", "apart = Reshape (q, heads) x = Neg (apart)")
    model = lifted(text)
    assert RotationToOperator()(model).modified
    ir.passes.common.RemoveUnusedNodesPass()(model)
    found = operators(model.graph)
    assert found["RotaryEmbedding"] == 1
    assert found["Neg"] == 1
    given = feeds()
    expected = definition(-given["q"], given["angles"])
    np.testing.assert_allclose(run(model, given)["y"], expected, rtol=0, atol=2e-6)


def test_who_reads_heads_still_gets_heads_and_tables_are_halved_once() -> None:
    text = TEXT.replace("float[b, t, 24] y)", "float[b, t, 24] y, float[b, t, 3, 8] more)")
    text = text.replace("y = Identity", "more = Identity (rotated) y = Identity")
    model = lifted(text)
    assert RotationToOperator()(model).modified
    found = run(model, feeds())
    expected = definition(**feeds())
    np.testing.assert_allclose(found["y"], expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found["more"].reshape(2, 5, 24), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("said", "other"),
    [
        ("Neg (second)", "Neg (first)"),
        ("(negated, first)", "(first, negated)"),
        ("Slice (x, zero, four", "Slice (x, one, four"),
        ("Mul (turned, sin)", "Mul (turned, cos2)"),
        ("Concat <axis = -1> (angles, angles)", "Concat <axis = -1> (angles, more)"),
        ("rotated = Add", "rotated = Sub"),
    ],
)
def test_what_is_no_rotation_is_left_alone(said: str, other: str) -> None:
    text = TEXT.replace(said, other)
    text = text.replace("x = Reshape", "more = Neg (angles) cos2 = Cos (q2) x = Reshape")
    text = text.replace("angles) =>", "angles, float[b, t, 3, 8] q2) =>")
    model = lifted(text)
    assert not RotationToOperator()(model).modified
    assert "RotaryEmbedding" not in operators(model.graph)


def test_rows_that_were_flat_in_another_order_are_left_alone() -> None:
    """Such as those of chosen experts, ``[tokens, 1, h*D]``."""
    text = TEXT.replace("float[b, t, 24] q", "float[10, 1, 24] q")
    text = text.replace("float[b, t, 1, 4]", "float[2, 5, 1, 4]").replace(
        "float[b, t,", "float[2, 5,"
    )
    model = lifted(text.replace("{0, 0, 3, 8}", "{2, 5, 3, 8}"))
    assert not RotationToOperator()(model).modified
    given = feeds()
    y = run(model, {**given, "q": given["q"].reshape(10, 1, 24)})["y"]
    np.testing.assert_allclose(y, definition(**given), rtol=0, atol=2e-6)


def test_notices_a_rotation_that_is_left() -> None:
    notices_nothing_done(RotationToOperator(), lifted(TEXT), "rotates and is left")
