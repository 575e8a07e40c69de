"""Constant factors go into the weights before them: the graph, its numbers and its conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript import optimizer
from text_graph import (
    Arrays,
    interface,
    notices,
    notices_nothing_done,
    operators,
    parsed,
    refuses,
    run,
    the,
)

from ingot.export.passes.scales import FACTOR, FoldScales, NoteFactors

V, H = 9, 4

# Granite's multipliers: on the embedding, on a residual with and without a bias, on the logits.
TEXT = f"""
<ir_version: 10, opset_import: ["" : 23]>
multiplied (int64[b, t] ids, float[{V}, {H}] table, float[{H}, {H}] w, float[{H}, {H}] biased,
            float[{H}] bias, float[{H}] norm, float[{H}, {V}] head)
    => (float[b, t, {V}] logits)
<float twelve = {{12.0}}, float part = {{0.22}}, float eight = {{8.0}}>
{{
    embedded = Gather (table, ids)
    x = Mul (embedded, twelve)
    mixed = MatMul (x, w)
    residual = Mul (mixed, part)
    y = Add (x, residual)
    product = MatMul (y, biased)
    summed = Add (product, bias)
    again = Mul (summed, part)
    z = Add (y, again)
    normed = RMSNormalization (z, norm)
    all = MatMul (normed, head)
    logits = Div (all, eight)
}}
"""
TIED = TEXT.replace("(normed, head)", "(normed, turned)").replace(
    "all = ", "turned = Transpose <perm = [1, 0]> (table) all = "
)
IDS = np.array([[0, 8, 3], [1, 1, 5]])


def weights() -> Arrays:
    random = np.random.default_rng(0)
    shapes = {
        "table": (V, H),
        "w": (H, H),
        "biased": (H, H),
        "bias": (H,),
        "norm": (H,),
        "head": (H, V),
    }
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def multiplied(text: str = TEXT) -> ir.Model:
    return parsed(text, weights())


def expected(tied: bool) -> np.ndarray:
    """The formula in float64."""
    table, w, biased, bias, norm, head = (a.astype(np.float64) for a in weights().values())
    x = 12 * table[IDS]
    x = x + 0.22 * (x @ w)
    x = x + 0.22 * (x @ biased + bias)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm
    logits: np.ndarray = x @ (table.T if tied else head) / 8
    return logits


@pytest.mark.parametrize("tied", [False, True])
def test_multipliers_cost_nothing_and_the_numbers_stay(tied: bool) -> None:
    model = multiplied(TIED if tied else TEXT)
    before, unfolded = interface(model), run(model, {"ids": IDS})["logits"]
    kinds = operators(model.graph)
    assert kinds["Mul"] == 3 and kinds["Div"] == 1
    assert FoldScales()(model).modified
    assert interface(model) == before
    kinds = operators(model.graph)
    assert kinds["Mul"] == kinds["Div"] == 0
    found = run(model, {"ids": IDS})["logits"]
    assert unfolded.std() > 0.1
    np.testing.assert_allclose(found, unfolded, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found, expected(tied), rtol=0, atol=1e-5)
    # A norm that was scaled is no longer what its name says.
    names = {value.name for node in model.graph for value in node.outputs}
    assert ("scaled.normed" in names) == tied and ("normed" in names) != tied
    assert not FoldScales()(model).modified


def test_a_value_that_is_an_output_keeps_its_multiplication() -> None:
    text = TEXT.replace("logits)\n<", f"logits, float[b, t, {H}] mixed)\n<")
    assert text != TEXT
    model = multiplied(text)
    before = run(model, {"ids": IDS})
    assert FoldScales()(model).modified
    assert operators(model.graph)["Mul"] == 1
    after = run(model, {"ids": IDS})
    for name in ("logits", "mixed"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-6, atol=2e-6)


def test_a_value_with_another_reader_keeps_its_multiplication() -> None:
    model = multiplied(
        TEXT.replace("y = Add (x, residual)", "s = Add (x, mixed) y = Add (s, residual)")
    )
    before = run(model, {"ids": IDS})["logits"]
    FoldScales()(model)
    assert operators(model.graph)["Mul"] == 1
    np.testing.assert_allclose(run(model, {"ids": IDS})["logits"], before, rtol=0, atol=2e-6)


def test_a_weight_with_another_reader_keeps_its_multiplication() -> None:
    model = multiplied(TEXT.replace("(y, biased)", "(y, w)"))
    before = run(model, {"ids": IDS})["logits"]
    FoldScales()(model)
    assert operators(model.graph)["Mul"] == 2
    np.testing.assert_allclose(run(model, {"ids": IDS})["logits"], before, rtol=0, atol=2e-6)


# As the exporter returns it: the number is cast to the precision of what it multiplies.
HALF = """
<ir_version: 10, opset_import: ["" : 23]>
half (float16[n, 4] x, float16[4, 4] w) => (float16[n, 4] y, float16[n, 4] z) {
    number = Constant <value = float {0.22}> ()
    factor = Cast <to = 10> (number)
    product = MatMul (x, w)
    y = Mul (product, factor)
    activated = Relu (x)
    z = Div (activated, factor)
}
"""


def half() -> tuple[ir.Model, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    w, x = (random.normal(size=(n, 4)).astype(np.float16) for n in (4, 50))
    return parsed(HALF, {"w": w}), w, x


def test_a_factor_is_folded_before_it_is_rounded() -> None:
    model, w, x = half()
    assert NoteFactors()(model).modified
    notes = [node.metadata_props.get(FACTOR) for node in model.graph if node.op_type != "Constant"]
    exact = np.float32(0.22)
    assert notes == [None, None, repr(float(exact)), None, repr(float(exact))]
    optimizer.optimize(model, onnx_shape_inference=False)
    assert FoldScales()(model).modified
    stored = model.graph.initializers["w"].const_value
    assert stored is not None
    wide = w.astype(np.float32) * exact
    np.testing.assert_array_equal(stored.numpy(), wide.astype(np.float16))
    assert (wide.astype(np.float16) != (w * np.float16(0.22))).any()
    # What has no weight before it is multiplied in float32 and rounded, as PyTorch does.
    kinds = operators(model.graph)
    assert kinds["Mul"] == 1 and kinds["Div"] == 0 and kinds["Cast"] == 2
    found = run(model, {"x": x})
    quotient = np.maximum(x, 0).astype(np.float32) * np.float32(1 / float(exact))
    np.testing.assert_array_equal(found["z"], quotient.astype(np.float16))
    product = x.astype(np.float64) @ w.astype(np.float64) * 0.22
    np.testing.assert_allclose(found["y"], product, rtol=2e-3, atol=2e-3)


def test_float32_needs_no_note() -> None:
    model = multiplied()
    assert not NoteFactors()(model).modified


def test_refuses_a_factor_that_is_rounded_already() -> None:
    model, _, _ = half()
    optimizer.optimize(model, onnx_shape_inference=False)
    refuses(NoteFactors(), model, "Mul .* has a factor that is rounded already")


def test_notices_a_factor_without_a_note() -> None:
    model, _, _ = half()
    notices_nothing_done(NoteFactors(), model, "Mul y multiplies by 0.2199.* and has None as its")


def note_another(model: ir.Model) -> None:
    the(model, "Div").metadata_props[FACTOR] = "0.25"


def note_a_sum(model: ir.Model) -> None:
    the(model, "MatMul").metadata_props[FACTOR] = "0.25"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (note_another, "Div z multiplies by 0.2199.* and has 0.25 as its note"),
        (note_a_sum, "MatMul product multiplies by None and has 0.25 as its note"),
    ],
)
def test_notices_a_wrong_note(spoil: Callable[[ir.Model], None], why: str) -> None:
    notices(NoteFactors(), half()[0], spoil, why)


def test_refuses_a_note_of_a_factor_on_another_node() -> None:
    model = multiplied()
    note_a_sum(model)
    refuses(FoldScales(), model, "MatMul mixed has a note of a factor and multiplies by none")


@pytest.mark.parametrize(("node", "text"), [("Mul x", TIED), ("Div logits", TEXT)])
def test_leaves_a_zero_that_it_would_have_to_invert(node: str, text: str) -> None:
    factor = "twelve" if node == "Mul x" else "eight"
    start, _, rest = text.partition(f"float {factor} = {{")
    model = multiplied(f"{start}float {factor} = {{0.0}}{rest.partition('}')[2]}")
    FoldScales()(model)
    left = [f"{each.op_type} {each.outputs[0].name}" for each in model.graph]
    assert node in left


def test_notices_factors_that_are_left() -> None:
    why = "Mul residual multiplies what a linear layer's weight could hold"
    notices_nothing_done(FoldScales(), multiplied(), why)
    model, _, _ = half()
    NoteFactors()(model)
    notices_nothing_done(FoldScales(), model, "Mul y has a factor still to be folded")


def rename_the_logits(model: ir.Model) -> None:
    model.graph.outputs[0].name = "all"


def test_notices_an_output_that_lost_its_name() -> None:
    notices(FoldScales(), multiplied(), rename_the_logits, "the graph had .*logits")
